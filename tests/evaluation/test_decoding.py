"""Run: python -m pytest tests/evaluation/test_decoding.py. Models whose scores are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import data
from evaluation import decoding, metrics
from model import Posterior
from runtime import sources
from variants.build import build
from variants.config import AutoencoderConfig

CPU = torch.device("cpu")


def pictures(count: int = 5, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def identity() -> SimpleNamespace:
    """An autoencoder whose latent is the image, with sigma 0.1."""
    return SimpleNamespace(encode=lambda x: Posterior(x, torch.full_like(x, 2 * math.log(0.1))),
                           decode=lambda z: z)


def test_encode():
    """Means and samples of every image in order, whatever the batch; the noise is that of its number."""
    images = pictures()
    whole, parts = (decoding.encode(identity(), images, CPU, size) for size in (5, 2))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(whole.mean, data.to_float(images))
    noise = (whole.z - whole.mean) / 0.1
    assert torch.allclose(noise, metrics.noise(torch.arange(5), (3, 32, 32)), atol=1e-5)


def test_codebook():
    """The latents of a codebook are its entries; there is no variance."""
    torch.manual_seed(0)
    model = build(AutoencoderConfig(decoder_channels=4, decoder_blocks=1, codebook_size=16)).eval()
    latents = decoding.encode(model, pictures(2), CPU, 1)
    assert latents.logvar is None and torch.equal(latents.z, latents.mean)
    vectors = latents.z.movedim(1, -1).flatten(0, 2)
    assert (vectors[:, None] == model.quantizer.codebook).all(dim=-1).any(dim=-1).all()


def test_noise_on_an_identity():
    """Grey with noise has a PSNR of -20 log10(level s / 2), with next to no clipping and rounding."""
    images = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    latents = decoding.encode(identity(), images, CPU, 4)
    result = decoding.noise_robustness(identity(), images, latents, CPU, 3, levels=(0.0, 0.5, 1.0, 2.0))
    s = result["latent_std"]
    assert s == pytest.approx(0.1, rel=0.01) and result["psnr"][0] == result["psnr_clean"][0] == 100
    for i, level in enumerate((0.5, 1.0, 2.0), start=1):
        assert result["psnr"][i].item() == pytest.approx(-20 * math.log10(level * s / 2), abs=0.05)
        assert result["psnr_clean"][i] == result["psnr"][i]


def test_clean_is_the_reconstruction():
    """With a decoder that is off by a constant, psnr has its error as well and psnr_clean has not."""
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    model = identity()
    model.decode = lambda z: z + 20 / 127.5
    latents = decoding.encode(model, images, CPU, 2)
    result = decoding.noise_robustness(model, images, latents, CPU, 2, levels=(0.0, 1.0))
    assert result["psnr"][0].item() == pytest.approx(20 * math.log10(255 / 20), abs=1e-4)
    assert result["psnr_clean"][0] == 100
    both = (20 / 255) ** 2 + (result["latent_std"] / 2) ** 2
    assert result["psnr"][1].item() == pytest.approx(-10 * math.log10(both), abs=0.05)


class Darker(nn.Module):
    """Two grey levels darker, where that is not below black."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x - 2 / 127.5, None


def test_resolution_curve():
    """PSNR and SSIM at each resolution are those of metrics.evaluate, in small and large batches."""
    source = sources.open_source("synthetic")
    sets = [data.ValSet(source, side, 3) for side in (16, 40)]
    results = [decoding.resolution_curve(Darker(), sets, CPU, pixels) for pixels in (1, 10_000)]
    assert results[0] == results[1] and results[0]["resolution"] == [16, 40]
    for i, images in enumerate(sets):
        batch = torch.stack([images[k][0] for k in range(3)])
        scores = metrics.evaluate(Darker(), [batch], CPU)
        assert (results[0]["psnr"][i], results[0]["ssim"][i]) == (scores["psnr"], scores["ssim"])
        low, high = results[0]["psnr_interval"][i]
        assert low <= scores["psnr"] <= high
    assert min(results[0]["psnr"]) > 20 * math.log10(255 / 2) - 1e-3
