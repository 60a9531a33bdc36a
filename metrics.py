"""PSNR and SSIM of reconstructions, and the loop that averages them over a data set and all processes.

One protocol for training and evaluation: every number is computed in float64 from two uint8 images, so it
depends on neither device nor batch size. PSNR and SSIM are taken per image and then averaged; the PSNR of the
mean squared error, torchmetrics' default and 1 to 1.5 dB lower, is given beside them as psnr_pooled.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import distributed

MIN_MSE = 1e-10  # on the 0..1 scale: identical images score 100 dB and not infinity
RADIUS, SIGMA = 5, 1.5  # SSIM's 11 x 11 Gaussian window (Wang et al. 2004)
C1, C2 = 0.01**2, 0.03**2  # its constants, for a range of 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] in any float dtype -> uint8, rounded and clamped: undoes u8 / 127.5 - 1, even in bf16."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------
# per image: uint8 (B, C, H, W) twice -> float64 (B,)


def check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or not a.dtype == b.dtype == torch.uint8:
        got = " and ".join(f"{t.dtype} {tuple(t.shape)}" for t in (a, b))
        raise ValueError(f"expected two uint8 tensors of one shape (B, C, H, W), got {got}")


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error on the 0..1 scale. Raises ValueError unless both are uint8 and of one shape."""
    check(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(dim=1) / 255**2


def decibels(error: Tensor) -> Tensor:
    """Mean squared error on the 0..1 scale -> PSNR in dB, at most 100."""
    return -10 * error.clamp(min=MIN_MSE).log10()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over all channels in dB, at most 100. Raises ValueError as `mse`."""
    return decibels(mse(a, b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), mean over channels and over the windows inside the image.

    Gaussian window 11 x 11, sigma 1.5, range 1; equal to scikit-image with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False. Raises ValueError as `mse`, and on images with a side under 11.
    """
    check(a, b)
    if min(a.shape[-2:]) <= 2 * RADIUS:
        raise ValueError(f"SSIM needs sides of at least {2 * RADIUS + 1} pixels, got {tuple(a.shape[-2:])}")
    # image by image: the maps of one fit in a cache, and the batch size cannot change a bit
    pairs = zip(a.double() / 255, b.double() / 255, strict=True)
    return torch.stack([ssim_map(x, y).mean() for x, y in pairs])


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of two images (C, H, W) in [0, 1] in each window: (C, H - 10, W - 10)."""
    mean_x, mean_y, xx, yy, xy = blur(torch.stack([x, y, x * x, y * y, x * y]))
    covariance, variances = xy - mean_x * mean_y, xx - mean_x**2 + yy - mean_y**2
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return luminance * (2 * covariance + C2) / (variances + C2)


def blur(maps: Tensor) -> Tensor:
    """Mean under the Gaussian window, without padding: (..., H, W) -> (..., H - 10, W - 10).

    Shifted sums, one axis after the other: in float64 conv2d takes 10 times as long on a CPU.
    """
    weights = [math.exp(-((k - RADIUS) ** 2) / (2 * SIGMA**2)) for k in range(2 * RADIUS + 1)]
    for dim in (-2, -1):
        size = maps.shape[dim] - 2 * RADIUS
        total = torch.zeros_like(maps.narrow(dim, 0, size))
        for k, weight in enumerate(weights):
            total.add_(maps.narrow(dim, k, size), alpha=weight / sum(weights))
        maps = total
    return maps


# ------------------------------------------------------------------------------------------------------------
# over a data set


def scores(a: Tensor, b: Tensor) -> Tensor:
    """PSNR, its square, SSIM, mean squared error and 1 of each image: uint8 (B, C, H, W) twice -> (5, B)."""
    error = mse(a, b)
    return torch.stack([decibels(error), decibels(error) ** 2, ssim(a, b), error, torch.ones_like(error)])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device,
    autocast: AbstractContextManager | None = None,
) -> dict[str, float]:
    """Mean PSNR and SSIM of reconstructions from the posterior mean, over the images of all processes.

    model: x (B, C, H, W) in [-1, 1] -> (recon, posterior), run in eval mode inside `autocast`. batches: this
    process's share, uint8 (B, C, H, W); shares and batches may differ in size, an empty batch is passed over.
    Returns psnr, ssim, psnr_std, psnr_pooled, n, alike in all processes. Raises ValueError if n is 0.
    """
    training = model.training
    model.eval()
    home = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    totals = torch.zeros(5, dtype=torch.float64, device=home)
    for images in batches:
        if len(images):
            with autocast or nullcontext():
                recon, _ = model(images.to(device).float() / 127.5 - 1)
            totals += scores(images.to(home), to_uint8(recon).to(home)).sum(dim=1)
    model.train(training)
    # sums and not means are reduced, so that unequal shares give the mean over images
    *sums, n = distributed.sum_(totals).tolist()
    if not n:
        raise ValueError("no images to evaluate")
    mean_psnr, mean_square, mean_ssim, mean_mse = (value / n for value in sums)
    return {
        "psnr": mean_psnr,
        "ssim": mean_ssim,
        "psnr_std": math.sqrt(max(0.0, mean_square - mean_psnr**2)),
        "psnr_pooled": -10 * math.log10(max(mean_mse, MIN_MSE)),
        "n": int(n),
    }
