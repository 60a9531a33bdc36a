"""Claims about synthetic.py; the oracles are PyWavelets, numpy's FFT and real photographs.

Figures called "photographs" were measured on 128 real ones, bicubic short side to 128 and centre crop.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import pywt
from PIL import Image

import synthetic
from synthetic import dead_leaves

ROOT = Path(__file__).parents[1]
PHOTOS = Path(__file__).parents[2] / "shared" / "photos"
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.sqrt([[3], [2], [1.5]])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """(300, 128, 128, 3) in [0, 1]."""
    return np.stack([dead_leaves(0, i, 128) for i in range(300)]) / 255


@pytest.fixture(scope="module")
def luma(images) -> np.ndarray:
    return images @ [0.299, 0.587, 0.114]


def digest(seed: int, index: int, size: int) -> str:
    return hashlib.sha256(dead_leaves(seed, index, size).tobytes()).hexdigest()


def haar_rms(luma: np.ndarray, level: int) -> np.ndarray:
    """Root mean square of the orthonormal Haar details at one level -> (bands H V D, images)."""
    bands = pywt.wavedec2(luma, "haar", level=level, axes=(1, 2))[1]
    return np.sqrt(np.square(bands).mean((2, 3)))


# ---- contract ----------------------------------------------------------------------------------------------


def test_pure_function_of_its_arguments():
    """A fresh process draws the same bytes, in another order and after numpy's global generator was used."""
    wanted = [(0, 0, 64), (0, 1, 64), (7, 1000003, 40)]
    here = [digest(*w) for w in wanted]
    code = (
        "import hashlib, numpy; from synthetic import dead_leaves; numpy.random.seed(5)\n"
        f"for w in {wanted[::-1]}: print(hashlib.sha256(dead_leaves(*w).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == here[::-1]


@pytest.mark.parametrize("size", [8, 9, 31, 64, 200])
def test_shape_dtype_and_range(size):
    """Any size from 8 gives a contiguous uint8 image that spans some of the range."""
    image = dead_leaves(3, 0, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.ptp(image) > 30


def test_small_sizes_hold_at_every_index():
    """No draw of the parameters breaks the smallest picture (few shapes, radii near half the picture)."""
    assert all(dead_leaves(0, i, 8).shape == (8, 8, 3) for i in range(200))


def test_indices_and_seeds_differ():
    """100 indices and 100 seeds are 199 different images, and none is another's near copy."""
    both = [dead_leaves(0, i, 32) for i in range(100)] + [dead_leaves(s, 0, 32) for s in range(1, 100)]
    flat = np.stack(both).reshape(199, -1).astype(np.float32)
    distance = np.abs(flat[:, None, ::16] - flat[None, :, ::16]).mean(-1) + 255 * np.eye(199)
    assert distance.min() > 3


@pytest.mark.parametrize("bad", [(-1, 0, 64), (0, -1, 64), (0, 0, 7)])
def test_bad_arguments_are_named(bad):
    """A negative seed or index and a size below 8 raise a ValueError that shows all three values."""
    with pytest.raises(ValueError, match=f"{bad[0]}, {bad[1]} and {bad[2]}"):
        dead_leaves(*bad)


def test_time_per_image():
    """An image of 128 pixels takes 7 to 10 ms of one core; 60 ms would mean a loop over pixels."""
    dead_leaves(1, 0, 128)
    start = time.process_time()
    for i in range(20):
        dead_leaves(1, i, 128)
    assert (time.process_time() - start) / 20 < 0.06


def test_sheet_is_made_of_the_images():
    """The contact sheet shows image i in row i // 8, column i % 8, and white where there is none."""
    page = np.asarray(synthetic.sheet(10, 24, seed=2))
    assert page.shape == (48, 192, 3)
    assert np.array_equal(page[24:, 24:48], dead_leaves(2, 9, 24))
    assert (page[24:, 48:] == 255).all()


def test_command_line_writes_the_sheet(tmp_path):
    """`python synthetic.py --out FILE` writes the sheet, losslessly for a PNG."""
    command = [sys.executable, "synthetic.py", "--out", tmp_path / "sheet.png", "--n", "3", "--size", "16"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert np.array_equal(Image.open(tmp_path / "sheet.png"), synthetic.sheet(3, 16, 0))


@pytest.mark.parametrize("flags", [["--size", "4"], ["--n", "0"], ["--seed", "-1"], ["--out", "sheet.what"]])
def test_command_line_errors_are_one_line(flags, tmp_path):
    """What the user gets wrong ends with exit code 2, a message and no traceback."""
    command = [sys.executable, ROOT / "synthetic.py", "--n", "1", "--size", "8", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---- statistics of photographs -----------------------------------------------------------------------------


def test_colour_mean_and_spread(images):
    """RGB means are within 0.05 of photographs (0.52 0.49 0.45), deviations within 0.04 (0.28 0.28 0.30)."""
    assert np.abs(images.mean((0, 1, 2)) - [0.52, 0.49, 0.45]).max() < 0.05
    assert np.abs(images.std((0, 1, 2)) - [0.28, 0.28, 0.30]).max() < 0.04


def test_luminance_dominates(images):
    """Luminance holds 88 to 95% of an image's variance (photographs 91), green-magenta 1 to 2.5% (1.6)."""
    variance = (images @ OPPONENT.T).var((1, 2)).mean(0)
    light, warm, green = variance / variance.sum()
    assert 0.88 < light < 0.95 and 0.01 < green < 0.025 < warm


def test_channel_correlation(images):
    """Channels correlate as in photographs: RG 0.88, RB 0.71, GB 0.90, each within 0.08."""
    correlation = np.corrcoef(images.reshape(-1, 3).T)
    assert np.abs(correlation[[0, 0, 1], [1, 2, 2]] - [0.88, 0.71, 0.90]).max() < 0.08


@pytest.mark.parametrize(("level", "photos"), [(1, 0.065), (2, 0.156), (3, 0.358)])
def test_haar_details(luma, level, photos):
    """Haar details have the rms of photographs within 20% at each level, the diagonal ones about half."""
    horizontal, vertical, diagonal = np.sqrt(np.square(haar_rms(luma, level)).mean(1))
    rms = np.sqrt((horizontal**2 + vertical**2 + diagonal**2) / 3)
    assert abs(rms / photos - 1) < 0.2
    assert 1.5 < min(horizontal, vertical) / diagonal < max(horizontal, vertical) / diagonal < 2.6


def test_spectral_slope(luma):
    """The power spectrum falls as f^-2.4 to f^-2.9 (photographs: -2.6; those of another set -2.8)."""
    window = np.outer(np.hanning(128), np.hanning(128))
    power = np.abs(np.fft.fft2((luma - luma.mean((1, 2), keepdims=True)) * window)) ** 2
    ring = np.rint(128 * np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))).astype(int).ravel()
    radial = np.bincount(ring, power.mean(0).ravel()) / np.bincount(ring)
    k = np.arange(3, 52)
    assert -2.9 < np.polyfit(np.log(k), np.log(radial[k]), 1)[0] < -2.4


def test_gradients_are_heavy_tailed(luma):
    """Kurtosis of the horizontal gradient is far above a Gaussian's 3: 12 to 32 (photographs 16)."""
    gradient = np.diff(luma, axis=2)
    assert 12 < (gradient**4).mean() / (gradient**2).mean() ** 2 < 32


def test_images_vary(luma):
    """Smooth and busy images both occur: the finest details' 90th percentile is over 2.2 times the 10th.

    Photographs: 2.2 times, with a median of 0.061.
    """
    low, middle, high = np.quantile(np.sqrt(np.square(haar_rms(luma, 1)).mean(0)), [0.1, 0.5, 0.9])
    assert high > 2.2 * low and 0.05 < middle < 0.075


def test_smaller_pictures_have_the_same_statistics(luma):
    """Details at 64 pixels are 5 to 25% stronger than at 128, as in photographs made smaller (14 to 17%)."""
    small = np.stack([dead_leaves(0, i, 64) for i in range(300)]) / 255 @ [0.299, 0.587, 0.114]
    for level in (1, 2, 3):
        assert 1.05 < haar_rms(small, level).mean() / haar_rms(luma, level).mean() < 1.25


def test_linear_code_transfers_to_photographs(images):
    """12 principal components of 8x8 blocks code photographs within 0.05 dB of those of photographs."""
    if not PHOTOS.is_dir():
        pytest.skip("the shared photographs are not here")
    with tarfile.open(PHOTOS / "train160-0.tar") as tar:
        names = [m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))][:300]
        train = np.stack([crop128(tar.extractfile(m)) for m in names])
    val = np.stack([crop128(path) for path in sorted((PHOTOS / "val").glob("*.jpg"))])
    here, there = klt_psnr(images, val), klt_psnr(train, val)
    assert there > 24 and here > there - 0.05


def crop128(file) -> np.ndarray:
    image = Image.open(io.BytesIO(file.read()) if hasattr(file, "read") else file).convert("RGB")
    scale = 128 / min(image.size)
    image = image.resize([max(128, round(side * scale)) for side in image.size], Image.BICUBIC)
    left, top = (image.width - 128) // 2, (image.height - 128) // 2
    return np.asarray(image.crop((left, top, left + 128, top + 128))) / 255


def klt_psnr(train: np.ndarray, test: np.ndarray) -> float:
    """Mean PSNR of test after projection onto the 12 principal components of train's 8x8x3 blocks."""
    blocks = [x.reshape(-1, 16, 8, 16, 8, 3).swapaxes(2, 3).reshape(len(x), 256, 192) for x in (train, test)]
    mean, covariance = blocks[0].mean((0, 1)), np.cov(blocks[0].reshape(-1, 192).T)
    basis = np.linalg.eigh(covariance)[1][:, -12:]
    x = blocks[1] - mean
    return float((-10 * np.log10(np.square(x - x @ basis @ basis.T).mean((1, 2)))).mean())
