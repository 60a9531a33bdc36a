"""How far an autoencoder is from commuting with scaling and quarter turns, and the spectrum of its latents.

A latent diffusion model has less to learn if the latent space is built like an image (Kouzelis et al. 2025,
arXiv 2502.09509; Skorokhodov et al. 2025, arXiv 2502.14831): a smaller image has the smaller latent, and high
frequencies are as weak in the latents as they are in images. `equivariance_error` measures the first,
`dct_spectrum` the second. variants/equivariance.py trains for both.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Autoencoder

# ----------------------------------------------------------------------------
# equivariance


def shrink(x: Tensor, factor: int) -> Tensor:
    """Bilinear, antialiased downsampling: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    size = x.shape[-2] // factor, x.shape[-1] // factor
    return F.interpolate(x, size, mode="bilinear", antialias=True)


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {   # name -> transforms to average over
    "half": (lambda x: shrink(x, 2),),
    "quarter": (lambda x: shrink(x, 4),),
    "turn": tuple(lambda x, k=k: x.rot90(k, (2, 3)) for k in (1, 2, 3)),
}


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| of each image, averaged over images."""
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean().item()


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of images in [-1, 1], clamped but not rounded; averaged over images."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).flatten(1).square().mean(dim=1)
    return 10 * (4 / mse.clamp_min(1e-10)).log10().mean().item()


@torch.no_grad()
def equivariance_error(model: Autoencoder, x: Tensor) -> dict[str, float]:
    """Errors under scaling to a half and a quarter (bilinear) and under turns of 90, 180 and 270 degrees.

    For images x (B, C, H, W) in [-1, 1], a transform T, the posterior mean E and the decoder D:

        encoder_<T>  ||T E(x) - E(T x)|| / ||E(T x)||; EQ-VAE's App. C.3 has the squares of both norms
        decoder_<T>  PSNR between D(T z) and T D(z) for z = E(x), dB
        image_<T>    PSNR between D(T z) and T x, dB: what both regularisers train

    with T in half, quarter, turn. All are means over images, and turn is the mean over the three turns.
    Raises ValueError unless H and W are multiples of 4 f and at least 8 f: group norm needs two positions.
    """
    grid, (H, W) = 4 * model.config.downsample_factor, x.shape[-2:]
    if H % grid or W % grid or min(H, W) < 2 * grid:
        raise ValueError(f"image size {H}x{W}: to scale the latents to a quarter, both sides have to be "
                         f"multiples of {grid} and at least {2 * grid}")
    training = model.training
    model.eval()
    z = model.encode(x).mean
    recon, rows = model.decode(z), {}
    for name, transforms in TRANSFORMS.items():
        sums = torch.zeros(3)
        for transform in transforms:
            decoded, smaller = model.decode(transform(z)), transform(x)
            sums += torch.tensor([
                relative_error(transform(z), model.encode(smaller).mean),
                psnr(decoded, transform(recon)),
                psnr(decoded, smaller),
            ])
        rows[name] = (sums / len(transforms)).tolist()
    model.train(training)
    kinds = ("encoder", "decoder", "image")
    return {f"{kind}_{name}": row[i] for i, kind in enumerate(kinds) for name, row in rows.items()}


# ----------------------------------------------------------------------------
# spectrum


def dct_matrix(block: int) -> Tensor:
    """Orthonormal DCT-II, (block, block), float64; rows are frequencies."""
    k, n = torch.arange(block, dtype=torch.float64), torch.arange(block, dtype=torch.float64)
    rows = torch.cos(math.pi / block * k[:, None] * (n + 0.5)) * math.sqrt(2 / block)
    rows[0] /= math.sqrt(2)
    return rows


def zigzag(block: int) -> list[int]:
    """Positions of a flattened (block, block) table from low to high frequency, in JPEG's order."""
    def key(i: int) -> tuple[int, int]:
        row, column = divmod(i, block)
        return row + column, row if (row + column) % 2 else column
    return sorted(range(block * block), key=key)


@torch.no_grad()
def dct_spectrum(x: Tensor, block: int = 8) -> Tensor:
    """Mean magnitude of each frequency of a blockwise DCT, relative to the DC: (block^2,), zigzag, float64.

    x: images or latents (B, C, H, W). Each channel is first brought to mean 0 and variance 1 over the batch,
    as a diffusion model gets its latents, so shifts and scales of channels do not count. Then |D_uv| is
    averaged over images, channels and blocks and divided by the average of |D_00|: white noise gives 1
    everywhere, natural images fall from 1 to about 0.01. Rows and columns beyond the last whole block are
    left out. Raises ValueError if no block fits.
    """
    # ours: Skorokhodov et al. 2025 divide |D_uv| by |D_00|; our sources do not say where they average
    B, C, H, W = x.shape
    h, w = H // block, W // block
    if not h or not w:
        raise ValueError(f"size {H}x{W}: a spectrum of {block}x{block} blocks needs at least one block")
    x = x.double()
    std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    x = ((x - mean) / std.clamp_min(1e-12))[..., : h * block, : w * block]
    blocks = x.reshape(B, C, h, block, w, block).transpose(3, 4)                # (B, C, h, w, block, block)
    dct = dct_matrix(block).to(x.device)
    table = (dct @ blocks @ dct.T).abs().mean(dim=(0, 1, 2, 3)).flatten()
    return table[zigzag(block)] / table[0].clamp_min(1e-12)
