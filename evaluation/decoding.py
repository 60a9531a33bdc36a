"""Reconstructions under other conditions than training: with noise on the latent, and at other resolutions.

Scores follow the default protocol of metrics.py: both images have 8 bits, and scores are means over images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data
from evaluation import metrics
from model import Autoencoder

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)   # noise std / latent std; ours


class Latents(NamedTuple):
    """Posterior of N images and one sample of it, (N, Z, h, w) on the CPU; a codebook has no logvar."""

    mean: Tensor
    logvar: Tensor | None
    z: Tensor


@torch.no_grad()
def encode(model: Autoencoder, images: Tensor, device: torch.device, batch_size: int) -> Latents:
    """Latents of uint8 images (N, C, H, W); the noise of a sample depends only on its number."""
    means, logvars = [], []
    for batch in images.split(batch_size):
        posterior = model.encode(data.to_float(batch.to(device)))
        means.append(posterior.mean.cpu())
        logvars.append(posterior.logvar.cpu() if hasattr(posterior, "logvar") else None)
    mean = torch.cat(means)
    if logvars[0] is None:
        return Latents(mean, None, mean)
    logvar = torch.cat(logvars)
    noise = metrics.noise(torch.arange(len(mean)), mean.shape[1:])
    return Latents(mean, logvar, mean + (0.5 * logvar).exp() * noise)


@torch.no_grad()
def noise_robustness(
    model: Autoencoder, images: Tensor, latents: Latents, device: torch.device, batch_size: int,
    levels: Sequence[float] = LEVELS,
) -> dict:  # fmt: skip
    """PSNR in dB of decode(mean + level s n), n ~ N(0, 1), s the standard deviation of all sampled latents.

    psnr compares with the image, psnr_clean with decode(mean). images: uint8 (N, C, H, W). The first level is
    0, where psnr_clean is 100 dB. The noise of an image is the same at every level.
    """
    std, numbers = latents.z.double().std(correction=0).item(), torch.arange(len(images))
    noise, rows = metrics.noise(numbers, latents.mean.shape[1:]), []
    for part in numbers.split(batch_size):
        clean, scores = None, []
        for level in levels:
            z = latents.mean[part] + level * std * noise[part]
            recon = metrics.to_uint8(model.decode(z.to(device))).cpu()
            clean = recon if clean is None else clean
            scores.append(torch.stack([metrics.psnr(images[part], recon), metrics.psnr(clean, recon)]))
        rows.append(torch.stack(scores))                                  # (levels, 2, images)
    psnr, psnr_clean = torch.cat(rows, dim=2).mean(dim=2).unbind(dim=1)
    return {"latent_std": std, "level": list(levels), "psnr": psnr, "psnr_clean": psnr_clean}


def resolution_curve(
    model: nn.Module, sets: Sequence[data.ValSet], device: torch.device, pixels: int
) -> dict:
    """PSNR in dB and SSIM with 95% bootstrap intervals over images, at the resolution of each set (Fig. 5).

    pixels: of all images of a batch together, so that larger images come in smaller batches. model: as in
    metrics.Scorer. Broken files are left out.
    """
    rows = []
    for images in sets:
        size = max(1, min(len(images), pixels // images.res**2))
        scorer = metrics.Scorer(model, device, batch_size=size)
        for first in range(0, len(images), size):
            numbers = range(first, min(first + size, len(images)))
            scorer.add(data.collate([images[i] for i in numbers])[0])
        table = scorer.table()
        scores, ends = metrics.summary(table), metrics.intervals(table)
        rows.append((images.res, scores["psnr"], ends["psnr"], scores["ssim"], ends["ssim"]))
    names = ("resolution", "psnr", "psnr_interval", "ssim", "ssim_interval")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
