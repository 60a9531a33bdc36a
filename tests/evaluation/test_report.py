"""Run: python -m pytest tests/test_report.py. What people see of the scores."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import report

PROTOCOL = {"rfid": ["pytorch", "clean"],
            "headline": {"rfid": "rfid_pytorch", "psnr": "psnr", "ssim": "ssim", "lpips": "lpips_vgg"}}


def scores(res: int, **values) -> dict:
    return {"res": res, "n": 7, "protocol": PROTOCOL, "unavailable": {}, "intervals": {}, **values}


def test_table():
    """Values with their decimals and intervals, * at the headlines, and what should be there but is not."""
    result = scores(64, psnr=26.123456, psnr_pooled=25.0, ssim=0.81234567, rfid_pytorch=1.5,
                    unavailable={"lpips_vgg": "no file", "rfid": "too few"}, intervals={"psnr": [25.0, 27.5]})
    lines = {line[2:].split("  ")[0]: line for line in report.table(result).splitlines()}
    assert lines["PSNR, dB"].split() == ["*", "PSNR,", "dB", "26.123", "25.000", "to", "27.500"]
    assert lines["SSIM, Gaussian 11x11"].endswith("0.8123") and lines["SSIM, Gaussian 11x11"].startswith("*")
    assert lines["PSNR of the mean error, dB"].startswith("  ")
    assert lines["LPIPS, VGG"].split() == ["*", "LPIPS,", "VGG", "-", "unavailable"]
    assert lines["rFID, clean-fid"].endswith("-   unavailable")
    assert not {"LPIPS, Alex", "rFID, TF1 / torch-fidelity"} & lines.keys()      # nobody asked for them


def test_curve_table():
    """One line per resolution; a metric that one of them lacks is a dash there."""
    text = report.curve_table([scores(32, psnr=20.0), scores(64, psnr=21.5, lpips_alex=0.25)])
    rows = [line.split() for line in text.splitlines()]
    assert rows == [["res", "N", "PSNR", "LPIPS-Alex"], ["32", "7", "20.000", "-"],
                    ["64", "7", "21.500", "0.2500"]]


def test_csv(tmp_path):
    """Numbers name their files, commas in names survive, values keep ten digits."""
    table = {"number": np.array([0.0, 2.0]), "psnr": np.array([1 / 3, 20]), "mse": np.array([1e-9, 0.5])}
    report.write_csv(tmp_path / "x.csv", table, {0: "a,b.png", 2: "c.png"}.__getitem__)
    rows = list(csv.reader((tmp_path / "x.csv").open()))
    assert rows == [["number", "file", "psnr", "mse"], ["0", "a,b.png", "0.3333333333", "1e-09"],
                    ["2", "c.png", "20", "0.5"]]


def test_extremes_sheet(tmp_path):
    """Small and grey pictures too: none overlaps, long names lose their beginnings."""
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 16, 16) * 40 + 60
    captions = ["very/long/folder/name_000123.png\n1 dB", "b\n2 dB", "c\n3 dB"]
    blocks = [("lowest", pixels, pixels + 9, captions)]
    report.write_extremes(tmp_path / "x.png", blocks)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    for value in (60, 69, 100, 109, 140, 149):      # each picture is whole
        assert (sheet == value).all(axis=2).sum() >= 256
    draw = report.ImageDraw.Draw(Image.new("RGB", (9, 9)))
    short = report.shorten("very/long/folder/name_000123.png", 98, draw, report.ImageFont.load_default(12))
    assert short.endswith("000123.png") and len(short) < 20


@pytest.mark.parametrize("values", [(20.0, 24.0, 22.0), (20.0, 20.0, 20.0)])
def test_plot(tmp_path, values):
    """A dot at each resolution, equally far apart for doublings, higher for higher values."""
    report.write_plot(tmp_path / "x.png", [scores(32 * 2**i, psnr=value) for i, value in enumerate(values)])
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    blue = (pixels == np.array([11, 83, 148])).all(axis=2)
    dots = [66, 181, 296]
    assert all(blue[:, x].sum() >= 7 for x in dots) and not blue[:, :62].any() and not blue[:, 300:].any()
    assert blue[:, 120].sum() <= 6      # a line alone
    heights = [np.flatnonzero(blue[:, x]).mean() for x in dots]
    if values[0] == values[1]:
        assert max(heights) - min(heights) <= 1
    else:
        assert heights[1] < heights[2] < heights[0]      # rows count from the top
