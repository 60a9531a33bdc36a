"""The pictures of analyze.py: each function draws one result of evaluation/analyses.py with matplotlib.

matplotlib is optional (requirements-plots.txt). Without it this module can be imported, but not drawn with.
"""

import math

import numpy as np
from torch import Tensor

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

BLUE, ORANGE, GREEN, PURPLE = "#0b5394", "#b45309", "#38761d", "#741b47"
DPI = 110


def available() -> bool:
    return Figure is not None


def new(rows: int, columns: int, width: float, height: float, title: str, **options):
    """A figure with an array (rows, columns) of axes, each width x height inches."""
    figure = Figure((width * columns, height * rows + 0.4), dpi=DPI, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def array(values) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def grid(count: int, most: int = 6) -> tuple[int, int]:
    """Rows and columns for so many panels, at most `most` beside one another."""
    columns = min(count, most)
    return -(-count // columns), columns


def hide(axes: np.ndarray, count: int) -> None:
    """Leaves the panels from number `count` on empty."""
    for axis in axes.flat[count:]:
        axis.axis("off")


def bars(axis, values, colour: str, label: str) -> None:
    """One bar per channel; a value that does not exist has none."""
    values = array(values)
    axis.bar(np.arange(len(values)), np.nan_to_num(values), color=colour)
    axis.set(xlabel="latent channel", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)


# ------------------------------------------------------------------------------------------------------------
# latents


def moments(result: dict) -> Figure:
    figure, ((left, middle, right),) = new(1, 3, 4, 3, "Moments of the sampled latents, by channel")
    bars(left, result["channel_mean"], BLUE, "mean")
    bars(middle, result["channel_std"], ORANGE, "standard deviation")
    bars(right, result["channel_kurtosis"], GREEN, "excess kurtosis")
    for axis, value, text in ((left, result["mean"], "all channels"), (middle, result["std"], "all channels"),
                              (right, 0, "Gaussian")):
        axis.axhline(value, color="black", linestyle="--", linewidth=1, label=text)
        axis.legend()
    return figure


def histograms(result: dict) -> Figure:
    """Density of each channel, over the Gaussian of the same mean and variance."""
    edges, density = array(result["edges"]), array(result["density"])
    centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    rows, columns = grid(len(density))
    title = "Histograms of the sampled latents"
    figure, axes = new(rows, columns, 2.4, 1.9, title, sharex=True)
    for i, (axis, values) in enumerate(zip(axes.flat[: len(density)], density, strict=True)):
        axis.stairs(values, edges, fill=True, color=BLUE, alpha=0.6, label="latents")
        mean = (values * centres).sum() * width
        std = max(math.sqrt((values * (centres - mean) ** 2).sum() * width), width)
        curve = np.exp(-0.5 * ((centres - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        axis.plot(centres, curve, color="black", linewidth=1, label="Gaussian of equal mean and variance")
        axis.set_title(f"channel {i}", fontsize="medium")
        if i + columns >= len(density):                       # the last panel of its column
            axis.set_xlabel("value")
            axis.tick_params(labelbottom=True)
    hide(axes, len(density))
    figure.supylabel("probability density")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def kl(result: dict) -> Figure:
    threshold = result["threshold"]
    figure, ((left, right),) = new(1, 2, 4.5, 3.2, "What each channel says about the image")
    bars(left, result["channel_kl"], BLUE, "KL to N(0, 1), nats per element")
    left.set_yscale("log")
    left.margins(y=0.2)                                   # room for the legend
    left.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"dead below {threshold}")
    left.legend()
    bars(right, result["channel_signal"], GREEN, "share of the variance that is signal")
    right.set_ylim(0, 1.02)
    return figure


def correlation(result: dict) -> Figure:
    matrix = array(result["matrix"])
    figure, ((axis,),) = new(1, 1, 5.4, 4.4, "Correlation of latent channels")
    picture = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(xlabel="latent channel", ylabel="latent channel")
    for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
        locator.set_params(integer=True)
    if len(matrix) <= 16:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize="x-small")
    figure.colorbar(picture, label="Pearson correlation")
    return figure


def mmd(result: dict) -> Figure:
    figure, ((axis,),) = new(1, 1, 5.5, 3.4, "Distance of whole latents from N(0, I)")
    value, error = 1000 * array(result["mmd2"]), 1000 * array(result["error"])
    axis.errorbar(result["bandwidth"], value, error, color=BLUE, marker="o", capsize=3,
                  label=f"{result['dimensions']:,} dimensions, with standard errors")
    axis.axhline(0, color="black", linestyle="--", linewidth=1, label="N(0, I)")
    axis.set_xscale("log")
    axis.set_xticks(result["bandwidth"], map(str, result["bandwidth"]))
    axis.minorticks_off()
    axis.set(xlabel="bandwidth of the RBF kernel", ylabel="1000 x MMD$^2$")
    axis.legend()
    return figure


def spectrum(result: dict) -> Figure:
    figure, ((axis,),) = new(1, 1, 5.5, 3.8, "Radial power spectrum")
    for name, colour in (("image", ORANGE), ("latent", BLUE)):
        label = f"{name}s, exponent {result[f'{name}_exponent']:.2f}"
        axis.loglog(array(result[f"{name}_frequency"]), array(result[f"{name}_share"]), color=colour,
                    marker=".", label=label)
    axis.axhline(result["latent_white"], color="black", linestyle="--", linewidth=1,
                 label="white noise of the latents' size")
    powers = 2 ** np.arange(int(math.log2(len(result["image_share"]))) + 1)
    axis.set_xticks(powers, map(str, powers))
    axis.minorticks_off()
    axis.set(xlabel="frequency, cycles per image", ylabel="share of the variance, per frequency")
    axis.legend()
    return figure


def dct(result: dict) -> Figure:
    block = result["block"]
    title = f"DCT of blocks of {block} x {block}, each channel at variance 1"
    figure, ((axis,),) = new(1, 1, 5.5, 3.8, title)
    for name, colour in (("image", ORANGE), ("latent", BLUE)):
        label = f"{name}s, upper half {result[f'{name}_high']:.3f}"
        axis.semilogy(array(result[f"{name}_spectrum"]), color=colour, label=label)
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="white noise")
    axis.set(xlabel="frequency, number in zigzag order", ylabel="mean magnitude / that of the DC")
    axis.legend()
    return figure


def pca(result: dict) -> Figure:
    """Images above the first three principal components of their latents."""
    pairs, explained = result["pictures"], array(result["explained"])[:3]
    shares = ", ".join(f"{share:.0%}" for share in explained)
    title = f"Latents as colours: components 1 to {len(explained)}, {shares} of the variance"
    figure, axes = new(2, max(len(pairs), 4), 1.6, 1.6, title)
    for column, (image, picture) in zip(axes.T[: len(pairs)], pairs, strict=True):
        column[0].imshow(array(image.expand(3, -1, -1).permute(1, 2, 0)))
        column[1].imshow(array(picture.permute(1, 2, 0)), interpolation="nearest")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("latent")
    hide(axes.T[len(pairs):], 0)
    return figure


# ------------------------------------------------------------------------------------------------------------
# reconstructions


def noise(result: dict) -> Figure:
    figure, ((axis,),) = new(1, 1, 5.5, 3.6, "Decoding noisy latents")
    level = result["level"]
    axis.plot(level, array(result["psnr"]), color=BLUE, marker="o", label="against the image")
    axis.plot(level[1:], array(result["psnr_clean"])[1:], color=ORANGE, marker="o",
              label="against the reconstruction without noise")
    axis.set(xlabel=f"noise std / latent std ({result['latent_std']:.3g})", ylabel="PSNR, dB")
    axis.legend()
    return figure


def equivariance(result: dict) -> Figure:
    figure, ((left, right),) = new(1, 2, 4.2, 3.2, "Latents scaled and turned")
    names = ("half", "quarter", "turn")
    left.bar(names, [result[f"encoder_{name}"] for name in names], color=BLUE)
    left.set(ylabel="|| T E(x) - E(T x) || / || E(T x) ||")
    for kind, text, colour, shift in (("decoder", "T D(z)", GREEN, -0.2), ("image", "T x", ORANGE, 0.2)):
        values = [result[f"{kind}_{name}"] for name in names]
        right.bar(np.arange(3) + shift, values, width=0.4, color=colour, label=f"D(T z) against {text}")
    right.set_xticks(range(3), names)
    right.set(ylabel="PSNR, dB")
    right.legend(loc="lower left")
    return figure


def resolution(result: dict) -> Figure:
    figure, axes = new(1, 2, 4.2, 3.2, "Reconstruction against resolution, 95% intervals over images")
    for axis, name, label, colour in zip(axes.flat, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), (BLUE, ORANGE),
                                         strict=True):
        value, ends = array(result[name]), array(result[f"{name}_interval"])
        axis.errorbar(result["resolution"], value, np.abs(ends.T - value), color=colour, marker="o",
                      capsize=3)
        axis.set_xscale("log")
        axis.set_xticks(result["resolution"], map(str, result["resolution"]))
        axis.minorticks_off()
        axis.set(xlabel="side of the image, pixels", ylabel=label)
    return figure


# ------------------------------------------------------------------------------------------------------------
# decoder and training


def layers(result: dict) -> Figure:
    """The columns of the table that analyze.py prints."""
    figure, ((left, right),) = new(1, 2, 5.5, 3.8, "Layers of the decoder")
    names = result["layer"]
    for axis, columns, label in (
        (left, {"feature": "output", "largest": "largest channel / output", "branch": "branch / skip",
                "gradient": "gradient / gradient of conv_out"}, "rms, or ratio of two"),
        (right, {"step": "one rate for all layers", "scaled": "--lr-scaling fan-in"},
         "change of the image by Adam's first step"),
    ):
        colours = (BLUE, ORANGE, PURPLE, GREEN)[: len(columns)]
        for (column, text), colour in zip(columns.items(), colours, strict=True):
            values = np.array(result[column], dtype=float)            # a layer without a branch has None
            axis.semilogy(names, values, color=colour, marker=".", label=text)
        axis.tick_params("x", rotation=90)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set(xlabel="layer, from the latent to the image", ylabel=label)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="small")
    return figure


def norms(result: dict) -> Figure:
    """Heat maps of the first image, each from 0 to its own maximum."""
    maps = result["pictures"]
    rows, columns = grid(len(maps))
    title = "Feature norms of the decoder, each from 0 (black) to its maximum (white)"
    figure, axes = new(rows, columns, 1.8, 2, title)
    shown = zip(axes.flat[: len(maps)], maps, result["layer"], result["peak"], strict=True)
    for axis, picture, name, peak in shown:
        axis.imshow(array(picture), cmap="gray", vmin=0)
        axis.set_title(f"{name}\nmaximum / median {peak:.1f}", fontsize="small")
    hide(axes, 0)
    return figure


def gradients(result: dict) -> Figure:
    figure, ((axis,),) = new(1, 1, 5.5, 3.4, "Ratio of gradient norms at the decoder's last layer")
    axis.semilogy(result["step"], result["ratio"], color=BLUE, marker="o")
    axis.axhline(result["median"], color="black", linestyle="--", linewidth=1,
                 label=f"median {result['median']:.3g}")
    axis.set(xlabel="step", ylabel="reconstruction / adversarial")
    axis.legend()
    return figure
