"""Run: python -m pytest tests/test_metrics.py. Oracles: scikit-image, vectors.json, sums by hand."""

import json
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import distributed
import metrics

VECTORS = Path(__file__).parents[2] / "shared" / "vectors.json"
CPU = torch.device("cpu")


def random_pair(count: int, channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and noisy copies, noisier from one to the next: uint8 (B, C, H, W) twice."""
    rng = np.random.default_rng(0)
    phase = rng.uniform(0, 6, (count, channels, 1, 1))
    y, x = np.mgrid[:height, :width] / 9.0
    a = 127 + 127 * np.sin(x + 2 * y + phase)
    b = a + rng.normal(size=a.shape) * 4.0 * (1 + np.arange(count).reshape(-1, 1, 1, 1))
    return tuple(torch.from_numpy(t.round().clip(0, 255).astype(np.uint8)) for t in (a, b))


def scikit_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang's settings; scikit-image leaves out its border, so that only windows inside the image count."""
    gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(x / 255, y / 255, data_range=1, channel_axis=0, **gaussian)


# ------------------------------------------------------------------------------------------------------------
# against scikit-image and by hand


@pytest.mark.parametrize("shape", [(3, 3, 32, 47), (1, 1, 11, 11), (2, 4, 16, 11)])
def test_fault_15_16_psnr_and_ssim_equal_scikit_image(shape):
    """Per image, for any channel count and down to a single window."""
    a, b = random_pair(*shape)
    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        assert metrics.ssim(a, b)[i].item() == pytest.approx(scikit_ssim(x, y), abs=1e-13)
        assert metrics.psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y), abs=1e-12)


def test_psnr_by_hand():
    """An error of 51 levels everywhere is 0.2 of the range: 20 log10(5) = 13.979 dB. No error is 100 dB."""
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    b = torch.stack([a[0] + 51, a[1]])
    assert metrics.psnr(a, b).tolist() == pytest.approx([20 * math.log10(5), 100.0], abs=1e-12)


def test_ssim_by_hand():
    """Flat images have no variance, so only luminance is left: black against white is C1 / (1 + C1)."""
    black = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    white = black + 255
    assert metrics.ssim(black, white).item() == pytest.approx(1e-4 / (1 + 1e-4), abs=1e-12)
    assert metrics.ssim(white, white).item() == pytest.approx(1.0, abs=1e-12)


def test_fault_17_to_uint8_undoes_the_normalisation():
    """Every level comes back from fp32, bf16 and fp16; what lies outside [-1, 1] is clamped."""
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(metrics.to_uint8((levels.float() / 127.5 - 1).to(dtype)), levels)
    assert metrics.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("function", [metrics.psnr, metrics.ssim])
def test_bad_pairs_are_refused(function):
    """Floats, different shapes and, for SSIM, images under 11 pixels raise a ValueError with what came."""
    a, _ = random_pair(1, 3, 12, 12)
    with pytest.raises(ValueError, match="uint8 .* and torch.float32"):
        function(a, a.float())
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 12\) and torch.uint8 \(1, 3, 12, 11\)"):
        function(a, a[..., :11])
    with pytest.raises(ValueError, match=r"at least 11 pixels, got \(12, 10\)"):
        metrics.ssim(a[..., :10], a[..., :10])


# ------------------------------------------------------------------------------------------------------------
# evaluate


class Dimmer(nn.Module):
    """A model that loses a tenth of the contrast, and insists on how it is called."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert not self.training and not torch.is_grad_enabled()
        assert x.dtype == torch.float32
        return 0.9 * x, None


def seven_images() -> torch.Tensor:
    return random_pair(7, 3, 16, 16)[1]


def test_evaluate_is_the_mean_over_images():
    """Batches of 3, none and 4 give the mean of per-image numbers, and the model gets its mode back."""
    images, model = seven_images(), Dimmer().train()
    result = metrics.evaluate(model, [images[:3], images[:0], images[3:]], CPU)
    assert model.training
    recons = metrics.to_uint8(0.9 * (images.float() / 127.5 - 1))
    pairs = list(zip(images.numpy(), recons.numpy(), strict=True))
    values = [peak_signal_noise_ratio(x, y) for x, y in pairs]
    mean_mse = np.mean([((x / 255 - y / 255) ** 2).mean() for x, y in pairs])
    assert result == {
        "psnr": pytest.approx(np.mean(values), abs=1e-12),
        "ssim": pytest.approx(np.mean([scikit_ssim(x, y) for x, y in pairs]), abs=1e-12),
        "psnr_std": pytest.approx(np.std(values), abs=1e-6),
        "psnr_pooled": pytest.approx(-10 * math.log10(mean_mse), abs=1e-12),
        "n": 7,
    }


def test_the_model_runs_under_autocast_and_the_metrics_do_not():
    """Under bf16 autocast the model's output is bf16, and the score that of the images it decodes to."""

    class Half(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            recon = super().forward(x)
            assert recon.dtype == torch.bfloat16
            return recon, None

    model = Half(3, 3, 1, bias=False)
    model.weight.data = torch.eye(3)[:, :, None, None]
    result = metrics.evaluate(model, [seven_images()], CPU, torch.autocast("cpu", dtype=torch.bfloat16))
    assert result["psnr"] == pytest.approx(100, abs=1e-12) and result["ssim"] == pytest.approx(1, abs=1e-12)


def test_no_images_is_an_error():
    """An empty data set raises a ValueError where a division by zero would be."""
    with pytest.raises(ValueError, match="no images to evaluate"):
        metrics.evaluate(Dimmer(), [], CPU)


def worker(rank: int, port: int, folder: Path) -> None:
    """Evaluate every second of the seven images, two at a time."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = distributed.init("cpu")
    result = metrics.evaluate(Dimmer(), seven_images()[rank::2].split(2), device)
    distributed.cleanup()
    (folder / f"{rank}.json").write_text(json.dumps(result))


def test_fault_21_two_processes_give_the_numbers_of_one(tmp_path):
    """Shards of 4 and 3 images: both report the mean over 7, which is not the mean of the two means."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, tmp_path), nprocs=2)
    images = seven_images()
    expected = metrics.evaluate(Dimmer(), [images], CPU)
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {key: pytest.approx(value, abs=1e-12) for key, value in expected.items()}
    halves = [metrics.evaluate(Dimmer(), [images[rank::2]], CPU)["psnr"] for rank in range(2)]
    assert abs(np.mean(halves) - expected["psnr"]) > 1e-3


# ------------------------------------------------------------------------------------------------------------
# known answers (vectors.json)


@pytest.fixture(scope="module")
def known() -> dict:
    if not VECTORS.exists():
        pytest.skip(f"no {VECTORS.name} beside the checkout")
    return json.loads(VECTORS.read_text())


def hash32(i: np.ndarray, seed: int) -> np.ndarray:
    mask = np.uint64(0xFFFFFFFF)
    h = (i.astype(np.uint64) * 2654435761 + seed * 2246822519) & mask
    h = (h ^ (h >> 15)) * 2246822519 & mask
    h = (h ^ (h >> 13)) * 3266489917 & mask
    return h ^ (h >> 16)


def image_a(height: int, width: int) -> np.ndarray:
    y, x, c = np.mgrid[:height, :width, :3]
    return ((4 * x + 3 * y + 40 * c + (x * x + 2 * y * y) // 16) % 256).astype(np.uint8)


def image_b(height: int, width: int, amplitude: int = 16, seed: int = 1) -> np.ndarray:
    index = np.arange(height * width * 3).reshape(height, width, 3)
    noise = (hash32(index, seed) % (2 * amplitude + 1)).astype(np.int64) - amplitude
    return (image_a(height, width) + noise).clip(0, 255).astype(np.uint8)


def image_c(height: int, width: int) -> np.ndarray:
    padded = np.pad(image_a(height, width).astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    return (total // 9).astype(np.uint8)


def tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_known_psnr_and_ssim(known):
    """The formula images against their noisy and blurred copies, at two sizes."""
    default = "ssim_gauss11_valid (default: sigma 1.5, K .01/.03, per channel, no padding)"
    for height, width in ((64, 64), (48, 80)):
        for name, make in (("B", image_b), ("C", image_c)):
            expected = known["psnr_ssim"][f"A_vs_{name} {height}x{width}"]
            a, b = tensor(image_a(height, width)), tensor(make(height, width))
            assert metrics.mse(a, b).item() * 255**2 == pytest.approx(expected["mse_255"], abs=1e-9)
            assert metrics.psnr(a, b).item() == pytest.approx(expected["psnr"], abs=1e-9)
            assert metrics.ssim(a, b).item() == pytest.approx(expected[default], abs=1e-9)


def test_known_averaging(known):
    """Three images of very different quality: per image, the mean of PSNRs, and the pooled one."""
    expected = known["psnr_ssim"]["averaging: A vs B(4,11), B(16,12), B(64,13), 64x64"]
    a = tensor(*[image_a(64, 64)] * 3)
    b = tensor(image_b(64, 64, 4, 11), image_b(64, 64, 16, 12), image_b(64, 64, 64, 13))
    assert metrics.psnr(a, b).tolist() == pytest.approx(expected["per_image_psnr"], abs=1e-9)

    class Answer(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return b.float() / 127.5 - 1, None

    result = metrics.evaluate(Answer(), [a], CPU)
    assert result["psnr"] == pytest.approx(expected["mean_of_psnr (default)"], abs=1e-9)
    pooled = next(value for key, value in expected.items() if key.startswith("psnr_of_mean_mse"))
    assert result["psnr_pooled"] == pytest.approx(pooled, abs=1e-9)


def test_known_identical_images(known):
    """The rule for no error at all: SSIM 1 and, by the clamp, 100 dB."""
    a, expected = tensor(image_a(64, 64)), known["psnr_ssim"]["identical images"]
    assert metrics.mse(a, a).item() == expected["mse"]
    assert metrics.ssim(a, a).item() == pytest.approx(expected["ssim"], abs=1e-12)
    assert metrics.psnr(a, a).item() == pytest.approx(100, abs=1e-12)


def test_known_quantisation(known):
    """to_uint8 is the rule of the protocol, inside and outside [-1, 1]."""
    rule = "clamp(127.5*x+128,0,255) truncated == round (default)"
    levels = metrics.to_uint8(torch.tensor(known["to_uint8"]["x in [-1,1]"]))
    assert levels.tolist() == known["to_uint8"][rule]
