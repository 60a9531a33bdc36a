"""What analyze.py measures: one row of ANALYSES for each entry of its JSON and each of its pictures.

An analysis is a function of the Subject that returns a dict of numbers, lists and tensors. The entry
"pictures" is drawn, but not written to the JSON. A row names the analysis, measures it, and draws what was
measured. Adding an analysis means adding its row.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import data
from evaluation import decoding, plots
from evaluation import latent_statistics as latents
from evaluation.equivariance import dct_spectrum, equivariance_error
from evaluation.feature_scales import Layer, feature_norms, feature_scales, part_steps
from model import Autoencoder

LONGEST = 20    # entries of a list that is printed; longer ones are only in the JSON


class Unavailable(ValueError):
    """An analysis that this model does not support; the message says why."""


@dataclass
class Subject:
    """A model and the images to analyse it on; what several analyses need is computed once.

    network: in eval mode on `device`. images: uint8 (N, C, H, W), for statistics. few: uint8, for what needs
    gradients; as many are shown in pictures. sets: the images at several resolutions. log: the log.jsonl of
    the run and disc_weight of its flags, if the model comes from one.
    """

    network: nn.Module
    device: torch.device
    images: Tensor
    few: Tensor
    sets: list[data.ValSet]
    batch_size: int
    log: Path | None = None
    disc_weight: float = 0.0

    @property
    def model(self) -> Autoencoder:
        if not isinstance(self.network, Autoencoder):
            raise Unavailable("a function from images to images has no latent and no decoder")
        return self.network

    @property
    def x(self) -> Tensor:
        """The few images (B, C, H, W) in [-1, 1], on the device."""
        return data.to_float(self.few).to(self.device)

    @cached_property
    def latents(self) -> decoding.Latents:
        return decoding.encode(self.model, self.images, self.device, self.batch_size)

    @property
    def logvar(self) -> Tensor:
        if self.latents.logvar is None:
            raise Unavailable("a codebook has no KL: its latents are entries, not samples of a Gaussian")
        return self.latents.logvar


# ------------------------------------------------------------------------------------------------------------
# analyses that need more than one line


def mmd(subject: Subject) -> dict:
    """Of whole latents, divided by their overall standard deviation as LDM scales them, paper Table 6."""
    vectors = subject.latents.z.double().flatten(1)
    if len(vectors) < 3:
        raise Unavailable(f"the error of MMD needs at least 3 images, got {len(vectors)}")
    std = vectors.std(correction=0).item()
    if std == 0:
        raise Unavailable("all latents are the same constant")
    return latents.mmd_to_gaussian(vectors / std) | {"latent_std": std}


def dct(subject: Subject) -> dict:
    """Blockwise DCT of latents and images, in blocks of 8 x 8 or of the latents' size if that is smaller."""
    z, images = subject.latents.z, data.to_float(subject.images)
    block = min(8, *z.shape[-2:])
    result = {"block": block}
    for name, x in (("latent", z), ("image", images)):
        result[f"{name}_spectrum"] = magnitude = dct_spectrum(x, block)
        result[f"{name}_high"] = magnitude[len(magnitude) // 2:].mean().item()
    return result


def equivariance(subject: Subject) -> dict:
    """Means over the images; a model whose images have one size cannot be asked."""
    model, errors = subject.model, Counter()
    if model.config.resolution:
        raise Unavailable(f"the ViT of this model only takes {model.config.resolution} px, nothing scaled")
    for batch in subject.images.split(subject.batch_size):
        try:
            values = equivariance_error(model, data.to_float(batch).to(subject.device))
        except ValueError as reason:
            raise Unavailable(str(reason)) from None
        for name, value in values.items():
            errors[name] += value * len(batch) / len(subject.images)
    return dict(errors)


def pca(subject: Subject) -> dict:
    """Components of all latents; pictures of the first few, and the images themselves as `images`."""
    result = latents.pca(subject.latents.mean)
    shown = len(subject.few)
    return {"explained": result["explained"],
            "pictures": list(zip(subject.images[:shown], result["pictures"][:shown], strict=True))}


def noise(subject: Subject) -> dict:
    """With the noise on the posterior mean."""
    how = subject.device, subject.batch_size
    return decoding.noise_robustness(subject.model, subject.images, subject.latents, *how)


def resolution(subject: Subject) -> dict:
    pixels = subject.batch_size * subject.images[0, 0].numel()
    return decoding.resolution_curve(subject.network, subject.sets, subject.device, pixels)


def layers(subject: Subject) -> dict:
    """The table of feature_scales.py by columns, and the steps of the whole encoder and decoder."""
    rows, result = feature_scales(subject.model, subject.x), {}
    for part in ("encoder", "decoder"):
        result[f"{part}_step"], result[f"{part}_scaled"] = part_steps(subject.model, subject.x, part)
    names = "layer", *Layer._fields[1:]
    return result | dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def gradient_ratio(subject: Subject) -> dict:
    """|grad L_rec| / (|grad L_adv| + 1e-4) over training, from the log of the run (Fig. 7).

    The gradients are those of the last layer of the decoder. The trainer logs disc_weight times this ratio,
    which it clamps to 1e4, as adaptive_weight.
    """
    if subject.log is None or not subject.log.is_file():
        raise Unavailable("no log.jsonl of a run next to the model")
    whole = (line for line in subject.log.read_text().splitlines() if line.endswith("}"))
    lines = [line for line in map(json.loads, whole) if "adaptive_weight" in line]
    if not lines or not subject.disc_weight:
        raise Unavailable(f"{subject.log} has no adaptive_weight: the run validated no discriminator")
    ratios = [line["adaptive_weight"] / subject.disc_weight for line in lines]
    return {"median": median(ratios), "smallest": min(ratios), "largest": max(ratios),
            "step": [line["step"] for line in lines], "ratio": ratios}


# ------------------------------------------------------------------------------------------------------------
# the list


class Analysis(NamedTuple):
    """Key of the JSON and name of the picture, function of a Subject, function that draws the result."""

    name: str
    measure: Callable[[Subject], dict]
    draw: Callable[[dict], Any]


# fmt: off
ANALYSES = (
    Analysis("moments",     lambda s: latents.moments(s.latents.z),             plots.moments),
    Analysis("histograms",  lambda s: latents.histograms(s.latents.z),          plots.histograms),
    Analysis("kl",          lambda s: latents.kl(s.latents.mean, s.logvar),     plots.kl),
    Analysis("correlation", lambda s: latents.correlation(s.latents.z),         plots.correlation),
    Analysis("mmd",         mmd,                                                plots.mmd),
    Analysis("spectrum",    lambda s: latents.spectra(s.latents.z, s.images),   plots.spectrum),
    Analysis("dct",         dct,                                                plots.dct),
    Analysis("equivariance", equivariance,                                      plots.equivariance),
    Analysis("pca",         pca,                                                plots.pca),
    Analysis("noise",       noise,                                              plots.noise),
    Analysis("resolution",  resolution,                                         plots.resolution),
    Analysis("layers",      layers,                                             plots.layers),
    Analysis("norms",       lambda s: feature_norms(s.model, s.x),              plots.norms),
    Analysis("gradients",   gradient_ratio,                                     plots.gradients),
)
# fmt: on


def measure(subject: Subject, show: Callable[[str], None]) -> tuple[dict[str, dict], dict[str, str]]:
    """Runs every analysis -> results by name, and reasons why the others are unavailable.

    show: prints the summary of each as soon as it is there.
    """
    results, unavailable = {}, {}
    for analysis in ANALYSES:
        try:
            results[analysis.name] = analysis.measure(subject)
            show(summary(analysis.name, results[analysis.name]))
        except Unavailable as reason:
            unavailable[analysis.name] = str(reason)
            show(f"{analysis.name} is unavailable: {reason}")
    return results, unavailable


# ------------------------------------------------------------------------------------------------------------
# output


def plain(value: Any) -> Any:
    """Tensors become lists, numbers keep six digits, and those that are not finite become None, for JSON."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != "pictures"}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_json(value: Any, indent: int = 0) -> str:
    """JSON of a `plain` value with one line for each entry of a dict."""
    if not isinstance(value, dict):
        return json.dumps(value)
    space = indent * " "
    lines = (f"{space}  {json.dumps(key)}: {to_json(item, indent + 2)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{space}}}" if value else "{}"


def summary(name: str, result: dict) -> str:
    """The name and numbers of a result, and its lists as columns, without long lists and matrices."""
    lines, columns = [name], {}
    for key, value in plain(result).items():
        if not isinstance(value, list):
            lines.append(f"  {key:<15}  {cell(value):>10}")
        elif len(value) <= LONGEST and not any(isinstance(item, list) for item in value):
            columns.setdefault(len(value), []).append([key, *value])
    for table in columns.values():
        widths = [max(10, len(column[0])) for column in table]
        for row in zip(*table, strict=True):
            cells = (f"{cell(value):>{width}}" for value, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
