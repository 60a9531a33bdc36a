"""Run: python -m pytest tests/evaluation/test_plots.py. Every picture, of latents of every shape."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import analyses, plots
from evaluation import latent_statistics as stats
from evaluation.equivariance import dct_spectrum


def latents(channels: int, constant: bool = False) -> torch.Tensor:
    z = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    if constant:
        z[:, 0] = 0.5
    return z


def images(side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 1, side, side), generator=generator, dtype=torch.uint8)


def check(figure) -> None:
    """It has a title, every panel that shows an axis is labelled, and it is not blank."""
    assert figure.get_suptitle()
    panels = [axis for axis in figure.axes if axis.axison and len(axis.get_xticks())]
    named = figure.get_supxlabel() or figure.get_supylabel()
    assert all(axis.get_ylabel() or named for axis in panels)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert 0.01 < (pixels < 250).any(axis=-1).mean() and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_latents():
    """Everything that is drawn of latents, here with a constant channel among them."""
    z = latents(4, constant=True)
    check(plots.moments(stats.moments(z)))
    check(plots.histograms(stats.histograms(z)))
    check(plots.kl(stats.kl(z, torch.zeros_like(z))))
    check(plots.correlation(stats.correlation(z)))
    check(plots.spectrum(stats.spectra(z, images())))
    check(plots.mmd(stats.mmd_to_gaussian(z.flatten(1))))
    pictures = stats.pca(z)
    check(plots.pca(pictures | {"pictures": list(zip(images(), pictures["pictures"], strict=True))}))


@pytest.mark.parametrize("channels", [1, 17])
def test_channels(channels):
    """One channel alone, and more than a row of panels or a matrix with numbers holds."""
    check(plots.histograms(stats.histograms(latents(channels))))
    check(plots.correlation(stats.correlation(latents(channels))))


def test_equivariance():
    """Three transforms, two kinds of PSNR; both spectra of the blockwise DCT."""
    errors = {f"{kind}_{name}": 1.0 + i for i, kind in enumerate(("encoder", "decoder", "image"))
              for name in ("half", "quarter", "turn")}
    figure = plots.equivariance(errors)
    check(figure)
    assert [bar.get_height() for bar in figure.axes[1].patches] == 3 * [2.0] + 3 * [3.0]
    z = latents(2)
    check(plots.dct({"block": 8, "image_spectrum": dct_spectrum(z), "image_high": 0.1,
                     "latent_spectrum": dct_spectrum(2 * z), "latent_high": 0.2}))


def test_constant_latents():
    """Nothing exists, and everything is drawn: no spread, no spectrum, no correlation."""
    z = torch.zeros(3, 2, 8, 8)
    result = stats.spectra(z, images())
    assert math.isnan(result["latent_exponent"]) and result["latent_share"].isnan().all()
    for name, value in (("spectrum", result), ("moments", stats.moments(z)),
                        ("histograms", stats.histograms(z)), ("correlation", stats.correlation(z))):
        check(getattr(plots, name)(value))


def test_values_that_are_drawn():
    """Lines pass through the numbers of the result, bars have their heights."""
    result = {"bandwidth": [25, 50], "mmd2": [0.001, 0.002], "error": [0.1, 0.1], "dimensions": 8}
    line = plots.mmd(result).axes[0].lines[0]
    assert line.get_xdata().tolist() == [25, 50] and line.get_ydata().tolist() == [1.0, 2.0]
    z = latents(4)
    bars = plots.moments(stats.moments(z)).axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(z.std(dim=(0, 2, 3), correction=0).tolist())
    ratio = {"step": [10, 20], "ratio": [3.0, 30.0], "median": 16.5, "smallest": 3.0, "largest": 30.0}
    assert plots.gradients(ratio).axes[0].lines[0].get_ydata().tolist() == [3.0, 30.0]


def test_names():
    """Analyses have different names, for each is a file and a key."""
    names = [analysis.name for analysis in analyses.ANALYSES]
    assert len(set(names)) == len(names)
