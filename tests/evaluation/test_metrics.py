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
from formulas import (
    formula_state,
    image_a,
    image_b,
    image_c,
    known_answers,
    tensor,
    write_formula_file,
)
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from evaluation import fid, metrics
from runtime import distributed, weights
from variants.build import build
from variants.config import scale_config

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


def scikit_ssim_7x7(x: np.ndarray, y: np.ndarray) -> float:
    """Its defaults."""
    return structural_similarity(x / 255, y / 255, data_range=1, channel_axis=0)


# ------------------------------------------------------------------------------------------------------------
# against scikit-image and by hand


@pytest.mark.parametrize("shape", [(3, 3, 32, 47), (1, 1, 11, 11), (2, 4, 16, 11)])
def test_fault_15_16_psnr_and_ssim_equal_scikit_image(shape):
    """Per image, for any channel count and down to a single window."""
    a, b = random_pair(*shape)
    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        assert metrics.ssim(a, b)[i].item() == pytest.approx(scikit_ssim(x, y), abs=1e-13)
        assert metrics.ssim_7x7(a, b)[i].item() == pytest.approx(scikit_ssim_7x7(x, y), abs=1e-13)
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
        "ssim_7x7": pytest.approx(np.mean([scikit_ssim_7x7(x, y) for x, y in pairs]), abs=1e-12),
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


# ------------------------------------------------------------------------------------------------------------
# LPIPS


@pytest.fixture(scope="module")
def squeeze() -> nn.Module:
    state = {key.removeprefix("features."): value for key, value in formula_state("squeeze").items()}
    return metrics.load_lpips("squeeze", state)


def test_lpips_is_fp32_frozen_and_without_dropout(squeeze):
    """bf16 autocast changes nothing; grey counts as RGB; identical images have distance 0."""
    x, y = (t.float() / 127.5 - 1 for t in random_pair(3, 3, 32, 32))
    plain = metrics.lpips_distance(squeeze, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metrics.lpips_distance(squeeze, x, y), plain)
    assert plain.dtype == torch.float64 and (plain > 0).all()
    assert metrics.lpips_distance(squeeze, x, x).tolist() == [0, 0, 0]
    grey = [t[:, :1] for t in (x, y)]
    rgb = [t.expand(-1, 3, -1, -1) for t in grey]
    assert torch.equal(metrics.lpips_distance(squeeze, *grey), metrics.lpips_distance(squeeze, *rgb))
    assert not squeeze.training and not any(p.requires_grad for p in squeeze.parameters())


def test_lpips_refuses_other_networks():
    """Weights of another classifier raise a ValueError in one line."""
    for state in ({"0.weight": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="not the weights of LPIPS's squeeze") as error:
            metrics.load_lpips("squeeze", state)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [
    "squeeze", pytest.param("alex", marks=pytest.mark.slow), pytest.param("vgg", marks=pytest.mark.slow),
])
def test_known_lpips(name, known, tmp_path, monkeypatch):
    """The formula's weights through the offline path, a file in TORCH_HOME, give vectors.json's distance."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = write_formula_file(name, tmp_path)
    expected = known["fake_weight_networks"]["lpips"][name]
    assert path.name == expected["checkpoint file name"]
    loaded = weights.load(name)
    net = metrics.load_lpips(name, loaded.state)
    x, y = (tensor(image).float() / 127.5 - 1 for image in (image_a(64, 64), image_b(64, 64)))
    exact = expected["lpips(A,B) 64x64, inputs /127.5-1, v0.1 lin weights of lpips 0.1.4, float64"]
    got = metrics.lpips_distance(net, x, y).item()
    print(f"LPIPS {name}: {got:.9f}, known {exact:.9f}, off by {abs(got / exact - 1):.1e}")
    assert got == pytest.approx(exact, rel=1e-4)
    assert metrics.lpips_distance(net, x, x).item() == 0
    assert loaded.path == str(path) and not loaded.published


# ------------------------------------------------------------------------------------------------------------
# protocols


def test_truncation(known):
    """The truncating rule at the known values; it takes a level from 63 of the 256, references' too."""
    rule = "clamp to [-1,1], (x+1)/2*255, truncated (lavinal712, SEED-Voken style)"
    x = torch.tensor(known["to_uint8"]["x in [-1,1]"])
    assert metrics.truncate(x).tolist() == known["to_uint8"][rule]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    reference = metrics.pairs(metrics.PROTOCOLS["lavinal712"], levels, levels.float() / 127.5 - 1)[0]
    lost = levels.int() - reference.int()
    assert lost.sum() == 63 and lost.max() == 1 and lost.min() == 0


def test_floats_protocol_by_scikit_image():
    """lavinal712: PSNR and SSIM 7x7 are scikit-image's on clamped floats; LPIPS sees unclamped ones."""
    images = seven_images()
    recon = 1.1 * (images.float() / 127.5 - 1) + 0.01
    a, b, x, y, p, q = metrics.pairs(metrics.PROTOCOLS["lavinal712"], images, recon)
    assert torch.equal(b, metrics.truncate(recon)) and torch.equal(q, recon) and q.max() > 1
    clamped = (recon.clamp(-1, 1).double().numpy() + 1) / 2
    for i, (real, other) in enumerate(zip(images.numpy() / 255, clamped, strict=True)):
        psnr = peak_signal_noise_ratio(real, other, data_range=1)
        assert metrics.psnr(x, y)[i].item() == pytest.approx(psnr, abs=1e-5)
        expected = structural_similarity(real, other, data_range=1, channel_axis=0)
        assert metrics.ssim_7x7(x, y)[i].item() == pytest.approx(expected, abs=1e-6)


def test_default_protocol_sees_8_bits_alone():
    """A change of the reconstruction below half a level changes no input of any metric."""
    images, protocol = seven_images(), metrics.PROTOCOLS["default"]
    recon = images.float() / 127.5 - 1
    first, second = (metrics.pairs(protocol, images, recon + shift) for shift in (0, 0.4 / 127.5))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_intervals_are_those_of_a_mean():
    """For many images the bootstrap's interval is mean +- 1.96 std / sqrt(n), to a tenth of its width."""
    values = np.random.default_rng(1).gamma(2.0, size=2000)
    table = {"number": np.arange(2000.0), "psnr": values, "mse": 10 ** (-values)}
    ends = metrics.intervals(table)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert ends["psnr"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    low, high = ends["psnr_pooled"]
    assert low < -10 * math.log10(table["mse"].mean()) < high


# ------------------------------------------------------------------------------------------------------------
# processes and batch sizes: real networks, 101 images

class Features(nn.Module):
    """A small random feature network in the place of Inception."""

    dims = 24

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.conv = nn.Conv2d(3, self.dims, 24, stride=16)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.05

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean(dim=(2, 3))


def score_share(count: int, batch_size: int, protocol: str) -> dict:
    """This process's share of the images through every metric: all that eval.py reports, and the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(scale_config("S", decoder_channels=8, decoder_blocks=1)).eval()
    state = {key.removeprefix("features."): value for key, value in formula_state("squeeze").items()}
    chosen = metrics.PROTOCOLS[protocol]
    rfid = fid.RFID(Features(), chosen.rfid, fid.chunks(count, 10), CPU)
    nets = {"squeeze": metrics.load_lpips("squeeze", state)}
    scorer = metrics.Scorer(model, CPU, None, chosen, nets, rfid, batch_size)
    images = random_pair(count, 3, 32, 32)[1]
    share = torch.arange(distributed.rank(), count, distributed.world_size())
    for numbers in share.split(batch_size):
        scorer.add(images[numbers], numbers)
    table = scorer.table()
    result = {**metrics.summary(table), **scorer.rfid.result(), "intervals": metrics.intervals(table)}
    return result | {f"column {name}": column.tolist() for name, column in table.items()}


def worker(rank: int, ports: list[int], folder: Path) -> None:
    """101 images on 3 processes, with the posterior sampled, then on the first two of them."""
    for world, port in zip((3, 2), ports, strict=True):
        if rank < world:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            distributed.init("cpu")
            share = seven_images()[rank::world].split(2)
            results = [score_share(101, 16, "lavinal712"), metrics.evaluate(Dimmer(), share, CPU)]
            distributed.cleanup()
            (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_fault_21_processes_give_the_numbers_of_one(tmp_path):
    """On 2 and 3 processes each value, mean, interval and rFID of 101 images has the same bits as on one.

    So have training's numbers for 7 images, in shares whose means have another mean.
    """
    mp.spawn(worker, ([free_port(), free_port()], tmp_path), nprocs=3)
    images = seven_images()
    expected = [score_share(101, 16, "lavinal712"), metrics.evaluate(Dimmer(), [images], CPU)]
    expected = json.loads(json.dumps(expected))
    for name in ("3-0", "3-1", "3-2", "2-0", "2-1"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == expected
    halves = [metrics.evaluate(Dimmer(), [images[rank::2]], CPU)["psnr"] for rank in range(2)]
    assert abs(np.mean(halves) - expected[1]["psnr"]) > 1e-3


def test_batch_sizes_agree():
    """Batches of 1, 7 and 32 differ by what fp32 kernels do, which is printed: at most 1e-5, 1e-3 dB."""
    runs = [score_share(33, size, "default") for size in (32, 7, 1)]
    for name in ("psnr", "ssim", "ssim_7x7", "lpips_squeeze", "rfid_pytorch", "rfid_clean"):
        first, *others = (run[name] for run in runs)
        print(f"{name}: {first:.9f}; batches of 7, 1: " + ", ".join(f"{v - first:+.1e}" for v in others))
        assert max(abs(v - first) for v in others) < (1e-3 if name == "psnr" else 1e-5)


# ------------------------------------------------------------------------------------------------------------
# known answers (vectors.json)


@pytest.fixture(scope="module")
def known() -> dict:
    return known_answers()


def test_known_psnr_and_ssim(known):
    """The formula images against their noisy and blurred copies, at two sizes."""
    default = "ssim_gauss11_valid (default: sigma 1.5, K .01/.03, per channel, no padding)"
    uniform = "ssim_uniform7 (skimage default, sample covariance n/(n-1))"
    for height, width in ((64, 64), (48, 80)):
        for name, make in (("B", image_b), ("C", image_c)):
            expected = known["psnr_ssim"][f"A_vs_{name} {height}x{width}"]
            a, b = tensor(image_a(height, width)), tensor(make(height, width))
            assert metrics.mse(a, b).item() * 255**2 == pytest.approx(expected["mse_255"], abs=1e-9)
            assert metrics.psnr(a, b).item() == pytest.approx(expected["psnr"], abs=1e-9)
            assert metrics.ssim(a, b).item() == pytest.approx(expected[default], abs=1e-9)
            assert metrics.ssim_7x7(a, b).item() == pytest.approx(expected[uniform], abs=1e-9)


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
