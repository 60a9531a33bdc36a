"""Regularisers of the latent space: scale equivariance and EQ-VAE, which make it easier to diffuse.

Scale equivariance (Skorokhodov et al. 2025, arXiv 2502.14831) decodes a second, bilinearly downsampled latent
and compares the result with the equally downsampled image; the distance has a weight of its own. EQ-VAE
(Kouzelis et al. 2025, arXiv 2502.09509) changes the training objective itself: in a part of the steps,
reconstruction and adversarial loss compare the image tau x with the decoded latent D(tau E(x)), where tau
turns by multiples of 90 degrees and scales (Eq. 5 to 7). Both are meant to fine-tune a trained autoencoder.

What differs: the images of a step have one size, so factor and scale are drawn once per step, not per image;
turns are drawn per image. Both papers leave open whether the resampling filter is antialiased; here it is,
as aliasing would be the noise that they fight. All draws are functions of (seed, step, row).

docs/equivariance.md has measurements, and evaluation/equivariance.py what they measure.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wavelets import full_precision

FACTORS = (2, 4)           # of scale equivariance, one of them in each step
SCALES = (0.25, 1.0)       # of EQ-VAE, uniform between them (Sec. 3.3)
MIN_SIDE = 16              # pixels of the smallest image that LPIPS can judge

# ----------------------------------------------------------------------------
# transforms of images and of latents


def resize(x: Tensor, side: int, mode: str) -> Tensor:
    """(B, C, H, H) -> (B, C, side, side), fp32; "bilinear" or "bicubic", antialiased."""
    return F.interpolate(full_precision(x), (side, side), mode=mode, antialias=True)


def turn(x: Tensor, quarters: Tensor) -> Tensor:
    """Turns each square image of x (B, C, H, H) by its own number of quarters, 0 to 3: (B,) integers.

    Counter-clockwise, like torch.rot90. All turns are computed and one is chosen, since a selection of rows
    would have to wait for the device.
    """
    turned = x
    for k in (1, 2, 3):
        turned = torch.where((quarters == k)[:, None, None, None], x.rot90(k, (2, 3)), turned)
    return turned


# ----------------------------------------------------------------------------
# scale equivariance


def draw_factor(generator: np.random.Generator) -> int:
    """By how much a step downsamples: 2 or 4, equally often."""
    return FACTORS[generator.integers(len(FACTORS))]


def shrink(x: Tensor, factor: int) -> Tensor:
    """Images or latents (B, C, H, H) downsampled bilinearly to (B, C, H / factor, H / factor)."""
    return resize(x, x.shape[-1] // factor, "bilinear")


@dataclass(frozen=True)
class Shrunk:
    """The latents that are decoded for scale equivariance: z itself, and z downsampled."""

    factor: int

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, shrink(z, self.factor)


def check_resolution(res: int, f: int) -> None:
    """ValueError unless images of res x res and their latents can be downsampled by each factor."""
    grid = max(FACTORS) * f
    if res % grid or res < max(FACTORS) * MIN_SIDE:
        raise ValueError(f"--se-weight downsamples by {max(FACTORS)}: --res must be a multiple of {grid} and "
                         f"at least {max(FACTORS) * MIN_SIDE}, got {res}")


# ----------------------------------------------------------------------------
# EQ-VAE


@dataclass(frozen=True)
class Tau:
    """EQ-VAE's transform of a batch: quarter turns, then a scale. Calling it gives the latents to decode."""

    side: int                # of the scaled image, pixels
    quarters: Tensor         # (B,) quarter turns of each image
    f: int                   # pixels per latent position

    def image(self, x: Tensor) -> Tensor:
        """tau x: (B, C, H, H) -> (B, C, side, side)."""
        return resize(turn(x, self.quarters), self.side, "bicubic")

    def __call__(self, z: Tensor) -> tuple[Tensor]:
        return (resize(turn(z, self.quarters), self.side // self.f, "bicubic"),)


def sides(res: int, f: int, stride: int = 1, least: int = 1) -> range:
    """The sides of tau x that latents and discriminator allow, in pixels; ValueError if that is res alone.

    f: downsample factor of the autoencoder. stride, least: the discriminator takes multiples of stride, of at
    least `least` pixels.
    """
    grid = math.lcm(f, stride)
    smallest = max(round(SCALES[0] * res / grid), math.ceil(max(least, MIN_SIDE) / grid)) * grid
    if smallest >= res:
        raise ValueError(f"--eq-vae scales images down, and below --res {res} there is no side that the "
                         "latents and the discriminator take: choose a larger --res or another --disc")
    return range(smallest, res + 1, grid)


def draw_side(generator: np.random.Generator, identity: float, allowed: range) -> int | None:
    """The side of a step's tau x, from `sides`; None is the identity, which has probability `identity`.

    Otherwise the scale is uniform in SCALES and rounded to the nearest side that is allowed.
    """
    p, scale = generator.random(), generator.uniform(*SCALES)
    if p < identity:
        return None
    nearest = allowed.step * round(scale * allowed[-1] / allowed.step)
    return max(nearest, allowed[0])


def draw_quarters(generator: torch.Generator, batch: int) -> Tensor:
    """Turns of a global batch: 1, 2 or 3 quarters, uniform and never 0 (Sec. 3.3)."""
    return torch.randint(1, 4, (batch,), generator=generator)
