"""Output of eval.py: tables, per-image values, pictures and the resolution curve.

A report is the dict that --json writes. It maps metric names to numbers and also holds the intervals, the
protocol and other entries (see eval.py). Pictures are drawn with Pillow only.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# name: (title, short title, decimals), in the order used by papers
METRICS = {
    "rfid_pytorch": ("rFID, pytorch-fid", "rFID", 3),
    "rfid_clean": ("rFID, clean-fid", "rFID-clean", 3),
    "rfid_tf": ("rFID, TF1 / torch-fidelity", "rFID-TF", 3),
    "psnr": ("PSNR, dB", "PSNR", 3),
    "psnr_pooled": ("PSNR of the mean error, dB", "PSNR-pool", 3),
    "ssim": ("SSIM, Gaussian 11x11", "SSIM", 4),
    "ssim_7x7": ("SSIM, uniform 7x7", "SSIM-7x7", 4),
    "lpips_vgg": ("LPIPS, VGG", "LPIPS-VGG", 4),
    "lpips_alex": ("LPIPS, Alex", "LPIPS-Alex", 4),
    "lpips_squeeze": ("LPIPS, Squeeze", "LPIPS-Sq", 4),
}
HEADLINES = ("rfid", "psnr", "ssim", "lpips")
COLOURS = ("#0b5394", "#b45309", "#38761d", "#741b47")
GAP, TEXT = 2, 12   # gap between pictures and height of text, pixels


# ------------------------------------------------------------------------------------------------------------
# tables


def table(report: dict) -> str:
    """Every metric of one report with its 95% interval; * marks the protocol's headline variants."""
    stars = report["protocol"]["headline"].values()
    rfid = [f"rfid_{convention}" for convention in report["protocol"]["rfid"]]
    lines = [f"  {'metric':<28}{'value':>10}   95% interval"]
    for name, (title, _, digits) in METRICS.items():
        star = "* " if name in stars else "  "
        if name in report:
            ends = report["intervals"].get(name)
            interval = f"   {ends[0]:.{digits}f} to {ends[1]:.{digits}f}" if ends else ""
            lines.append(f"{star}{title:<28}{report[name]:>10.{digits}f}{interval}")
        elif name in report["unavailable"] or name in rfid and "rfid" in report["unavailable"]:
            lines.append(f"{star}{title:<28}{'-':>10}   unavailable")
    return "\n".join(lines)


def curve_table(reports: Sequence[dict]) -> str:
    """One line per resolution."""
    names = [name for name in METRICS if any(name in report for report in reports)]
    lines = [f"{'res':>5}{'N':>8}" + "".join(f"{METRICS[name][1]:>12}" for name in names)]
    for report in reports:
        cells = (f"{report[name]:.{METRICS[name][2]}f}" if name in report else "-" for name in names)
        lines.append(f"{report['res']:>5}{report['n']:>8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def about(report: dict) -> str:
    """The lines above the table: model, images, protocol, versions and weight files."""
    protocol, precision = report["protocol"], report["precision"]
    latent = "posterior sample" if protocol["sample"] else "posterior mean"
    bits = "truncated" if protocol["truncate"] else "rounded"
    pixels = "floats" if protocol["floats"] else "8-bit images"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([
        f"model     {report['checkpoint']}, step {report['step']}, {report['weights']} weights, {precision}",
        f"images    {report['n']:,} of {report['data']} (sha256 of names {report['names_sha256'][:16]}), "
        f"{report['res']} px",
        f"protocol  {protocol['name']}: {protocol['resize']} to the short side, centre crop, {latent}, "
        f"{bits} to 8 bits; PSNR, SSIM, LPIPS of {pixels}",
        f"versions  {versions}",
        *(f"weights   {file['path']}, sha256 {file['sha256'][:16]}" for file in report["files"].values()),
    ])


def speed(report: dict) -> str:
    """Time per stage on the first process."""
    images = -(-report["n"] // report["processes"])
    stages = (f"{name} {seconds:.1f} s ({images / max(seconds, 1e-9):,.1f} img/s)"
              for name, seconds in report["seconds"].items() if name != "covariances")
    last = report["seconds"].get("covariances")
    return "time      " + ", ".join(stages) + (f", rFID covariances {last:.1f} s" if last else "")


def write_csv(path: str | Path, values: dict[str, np.ndarray], name_of: Callable[[int], str]) -> None:
    """Writes one line per image: number, file and every per-image metric."""
    columns = {name: column for name, column in values.items() if name != "number"}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "file", *columns])
        for row, number in enumerate(values["number"].astype(int)):
            writer.writerow([number, name_of(number), *(f"{c[row]:.10g}" for c in columns.values())])


# ------------------------------------------------------------------------------------------------------------
# pictures


def write_grid(path: str | Path, rows: Sequence[Tensor]) -> None:
    grid(rows).save(path)


def grid(rows: Sequence[Tensor]) -> Image.Image:
    """Draws rows of uint8 images (N, 1 or 3, H, W) from top to bottom, with white gaps."""
    pictures = [[to_image(image) for image in row] for row in rows]
    height, width = rows[0].shape[-2] + GAP, rows[0].shape[-1] + GAP
    sheet = Image.new("RGB", (len(rows[0]) * width + GAP, len(rows) * height + GAP), "white")
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            sheet.paste(picture, (GAP + j * width, GAP + i * height))
    return sheet


def write_extremes(path: str | Path, blocks: Sequence[tuple[str, Tensor, Tensor, Sequence[str]]]) -> None:
    """Draws blocks (title, images, recons, captions): title, captions, and images above reconstructions."""
    _, first, _, _ = blocks[0]
    count, side = len(first), first.shape[-1]
    cell = max(side, 8 * TEXT) + GAP
    block = 3 * (TEXT + 4) + 2 * (side + GAP)
    sheet = Image.new("RGB", (max(count * cell, 300) + GAP, len(blocks) * block + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for b, (title, images, recons, captions) in enumerate(blocks):
        top = GAP + b * block
        draw.text((GAP, top), title, "black", font)
        for i, caption in enumerate(captions):
            left, line = GAP + i * cell, top + TEXT + 4
            for word in caption.split("\n"):
                draw.text((left, line), shorten(word, cell, draw, font), "black", font)
                line += TEXT + 4
            sheet.paste(to_image(images[i]), (left, line))
            sheet.paste(to_image(recons[i]), (left, line + side + GAP))
    sheet.save(path)


def shorten(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """Drops leading characters until the text fits the width, because file names differ at their ends."""
    while draw.textlength(text, font) > width - 4 and len(text) > 1:
        text = text[1:]
    return text


def to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())


# ------------------------------------------------------------------------------------------------------------
# the resolution curve


def write_plot(path: str | Path, reports: Sequence[dict]) -> None:
    """Plots the headline metrics against resolution, one panel each (paper Fig. 5)."""
    headline = reports[0]["protocol"]["headline"]
    names = [headline[kind] for kind in HEADLINES if all(headline[kind] in report for report in reports)]
    width, height = 320, 240
    sheet = Image.new("RGB", (width * len(names), height), "white")
    resolutions = [report["res"] for report in reports]
    for i, name in enumerate(names):
        draw_panel(sheet, (i * width, width, height), METRICS[name], COLOURS[i % len(COLOURS)],
                   resolutions, [report[name] for report in reports])
    sheet.save(path)


def draw_panel(sheet: Image.Image, place: tuple[int, int, int], titles: tuple[str, str, int], colour: str,
               xs: Sequence[int], ys: Sequence[float]) -> None:
    """Draws a line with dots; x is logarithmic with a label per point, y spans lowest to highest value."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    offset, width, height = place
    left, right, top, bottom = offset + 58, offset + width - 24, 34, height - 44
    low, high = min(ys), max(ys)
    high = high if high > low else low + 1
    logs = np.log2(xs)
    across = np.interp(logs, [logs.min(), max(logs.max(), logs.min() + 1)], [left + 8, right])
    up = np.interp(ys, [low, high], [bottom - 10, top + 10])
    draw.text((left, 8), titles[0], "black", font)
    draw.line([(left, top), (left, bottom), (right + 8, bottom)], "black")
    for share in (0, 0.5, 1):
        y = bottom - 10 - share * (bottom - top - 20)
        draw.line([(left - 4, y), (left, y)], "black")
        label = f"{low + share * (high - low):.{max(titles[2] - 1, 2)}f}"
        draw.text((left - 6, y), label, "black", font, anchor="rm")
    for x, res in zip(across, xs, strict=True):
        draw.line([(x, bottom), (x, bottom + 4)], "black")
        draw.text((x, bottom + 6), str(res), "black", font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 22), "resolution, px", "black", font, anchor="ma")
    points = [(float(x), float(y)) for x, y in zip(across, up, strict=True)]
    draw.line(points, colour, 2)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
