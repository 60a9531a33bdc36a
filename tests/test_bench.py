"""Run: python -m pytest tests/test_bench.py. Every section at toy size; the peers are the oracles."""

import functools
import json
import sys

import numpy as np
import pytest
import pywt
import skimage.metrics
import torch
from conftest import call

import bench
import train
from bench import Bench, Row, Sizes
from model import Decoder, LiteVAEEncoder, count_parameters, scale_config
from runtime import measure
from runtime.measure import tensors
from variants import options
from variants.sizes import PRESETS

TOY = Sizes(dwt=(2, 16), encoders=((1, 16),), decoders=((2, 16),), steps=((1, 64),), evaluation=(2, 32),
            files=2, matmul=64)  # fmt: skip
WIDTHS = (32, 32, 32, 32)
SMALL = functools.partial(scale_config, decoder_channels=8, decoder_blocks=1)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(flags): the rows that bench.py writes in seconds, and those of its table."""
    monkeypatch.setitem(bench.SIZES, "cpu", TOY)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SCALES", "S")
    monkeypatch.setattr(bench, "SD_VAE", bench.SD_VAE | {"block_out_channels": WIDTHS})
    monkeypatch.setattr(bench, "scale_config", SMALL)
    monkeypatch.setattr(bench, "RECIPE", "--scale S --dec-channels 8 --dec-blocks 1")
    monkeypatch.setattr(bench, "SD_RECIPE", "--decoder-norm group --decoder-attention")

    def run(flags: str) -> list[Row]:
        call("bench", tmp_path, f"{flags} --seconds 0.01 --device cpu --json out/bench.json")
        return [Row(**row) for row in json.loads((tmp_path / "out/bench.json").read_text())["rows"]]

    return run


@pytest.fixture
def on_meta(tmp_path) -> Bench:
    return Bench(torch.device("meta"), "fp32", torch.contiguous_format, False, 0.0, tmp_path)


def numbers_fit(rows: list[Row]) -> bool:
    return all(row.ours > 0 and row.theirs > 0 and row.ratio == row.ours / row.theirs for row in rows)


# ---- the table ---------------------------------------------------------------------------------------------


def test_table_and_json(toy, tmp_path, capsys):
    """--only dwt: the same rows in both, with the sizes; and what the numbers depend on."""
    rows = toy("--only dwt --precision fp32")
    assert numbers_fit(rows) and {row.size for row in rows} == {"2 x 16 px"}
    # forward has four peers, both passes three, the inverse of one level four
    assert len(rows) == 3 * (4 + 3) + 2 * 4
    machine = json.loads((tmp_path / "out/bench.json").read_text())["machine"]
    assert machine["precision"] == "fp32" and machine["threads"] == 1 and not machine["compile"]
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out and "precision fp32" in out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    assert lines[0] == list(Row._fields) and set("".join(lines[1])) == {"-"}
    assert [line[:4] for line in lines[2:]] == [list(row[:4]) for row in rows]
    for line, row in zip(lines[2:], rows, strict=True):
        shown = [float(cell.replace(",", "")) for cell in (line[4], line[6], line[7])]
        assert shown == pytest.approx([row.ours, row.theirs, row.ratio], rel=6e-3)


def test_columns_line_up():
    """Three digits or whole numbers; what is not there is a dash."""
    rows = [Row("dwt", "a", "b", "img/s", 1234.5, "copy", 0.01234, 100041.2),
            Row("dwt", "longer", "b", "waits", 0, "ptwt missing", None, None)]  # fmt: skip
    assert bench.table(rows).splitlines()[2:] == [
        "| dwt     | a      | b    | img/s | 1,234 | copy         | 0.0123 | 100,041 |",
        "| dwt     | longer | b    | waits | 0     | ptwt missing | -      | -       |"]  # fmt: skip


def test_missing_peer_is_named(toy, monkeypatch):
    """Without ptwt its rows have no numbers, and the others are measured."""
    monkeypatch.setitem(sys.modules, "ptwt", None)        # importing it raises ModuleNotFoundError
    rows = toy("--only dwt")
    without = [row for row in rows if row.peer.startswith("ptwt")]
    assert len(without) == 8 and len(rows) == 29
    assert all(row.peer.startswith("ptwt missing: ") for row in without)
    assert all((row.ours, row.theirs, row.ratio) == (None, None, None) for row in without)
    assert numbers_fit([row for row in rows if row not in without])


def test_out_of_memory_ends_a_section_only(toy, monkeypatch):
    """The rows before it stay, and the other sections run."""
    def full(_: Bench):
        yield Row("dwt", "first", "", "img/s", 1.0, "copy", 1.0, 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench.SECTIONS, "dwt", full)
    rows = toy("--only dwt,loader")
    assert [row.section for row in rows] == ["dwt", "dwt", "loader", "loader"] and rows[0].case == "first"
    assert rows[1].case == "out of memory, the rest is left out" and rows[1].ours is None


@pytest.mark.parametrize("flags, line", [
    ("--only dwt,nonsense", "unknown section 'nonsense'; choose from dwt, encoder, decoder, train"),
    ("--seconds -1", "argument --seconds: must be 0 or more, got -1"),
    ("--json file/bench.json", "File exists: 'file'"),
])
def test_wrong_flags(refused, tmp_path, flags, line):
    """One line, before anything is measured."""
    (tmp_path / "file").write_text("not a folder")
    assert line in refused("bench", flags)


# ---- ours and the peers do the same ------------------------------------------------------------------------


@pytest.mark.parametrize("wavelet, levels", [("haar", 1), ("haar", 3), ("db2", 1)])
@pytest.mark.parametrize("name", ["ours", *bench.LIBRARIES[:3]])
def test_libraries_compute_the_same_bands(name, wavelet, levels):
    """Each gives PyWavelets' low band and as many numbers, and inverts its own."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    forward, inverse = bench.library(name, wavelet, levels, x.device)
    expected, bands = pywt.wavedec2(x.numpy(), wavelet, bench.MODE, levels), forward(x)
    if name != "PyWavelets":
        low = tensors(bands)[0][:, :3]
        np.testing.assert_allclose(low, expected[0], atol=1e-5)
        total = expected[0].size + sum(detail.size for level in expected[1:] for detail in level)
        assert sum(band.numel() for band in tensors(bands)) == total
    np.testing.assert_allclose(inverse(bands), x, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "ptwt", "pytorch_wavelets"])
def test_both_passes_reach_the_image(name):
    """The orthonormal transform keeps the energy, so the gradient of half the bands' energy is x itself."""
    x = torch.randn(1, 3, 16, 16)
    bands = tensors(bench.library(name, "haar", 3, x.device)[0](x.requires_grad_()))
    (gradient,) = torch.autograd.grad(bands, x, bands)
    np.testing.assert_allclose(gradient, x.detach(), atol=1e-5)
    (timed,) = bench.wavelet_call(name, "haar", 3, "forward+backward", x)()
    assert timed.shape == x.shape and timed.std() > 0.5


def test_peer_has_its_published_size(on_meta):
    """SD-VAE's encoder and decoder as released: 34.16 and 49.49 million parameters."""
    sizes = [network(on_meta).size() // 4 for network in (bench.sd_encoder, bench.sd_decoder)]
    assert sizes == [34_163_592, 49_490_179]


def test_trained_peer_is_sd_vae():
    """The flags of the second trainer give SD-VAE's architecture."""
    config = options.build_config(train.parse_args(bench.SD_RECIPE.split()))
    assert config == PRESETS["sd-vae"]


def test_scores_are_the_same():
    """PSNR and SSIM of both libraries on the arguments that are timed."""
    a, b = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    theirs = bench.skimage_scores(skimage.metrics, a.numpy(), b.numpy())
    np.testing.assert_allclose(torch.stack(bench.scores(a, b), dim=1), theirs, rtol=1e-6)


# ---- every section -----------------------------------------------------------------------------------------


def test_networks(toy):
    """Speed and memory of each pass: more than the weights, with gradients more than twice as much."""
    rows = toy("--only encoder,decoder")
    assert numbers_fit(rows) and {row.peer for row in rows} == {"diffusers"}
    assert [row.unit for row in rows] == ["img/s", "peak MB"] * 5
    assert {row.size for row in rows} == {"1 x 16 px", "2 x 16 px"}
    peaks = {row.case: row for row in rows if row.unit == "peak MB"}
    for case, net in (("LiteVAE-S", LiteVAEEncoder), ("SMC", Decoder), ("SMC folded", Decoder)):
        weights = 4e-6 * count_parameters(net(SMALL("S")))
        assert peaks[f"{case}, forward"].ours > weights
        if both := peaks.get(f"{case}, forward+backward"):
            assert both.ours > 2 * weights and both.theirs > peaks[f"{case}, forward"].theirs


def test_compiled_networks(toy, monkeypatch):
    """--compile: our decoder, folded and not, and the peer's two networks; traced, but not made into C++."""
    compiled, traced = [], functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda net, **how: compiled.append(net) or traced(net, **how))
    rows = toy("--only decoder --compile --precision bf16")
    assert numbers_fit(rows) and len(rows) == 6
    assert [type(net).__name__ for net in compiled] == ["Decoder", "Encoder", "Decoder", "Decoder"]


@pytest.mark.slow
def test_training(toy):
    """Whole steps: none waits, and the discriminator adds operations."""
    rows = toy("--only train")
    assert [row.unit for row in rows] == ["img/s", "peak MB", "operations", "waits", "TFLOP/s"] * 2
    assert numbers_fit([row for row in rows if row.unit != "waits"])
    assert {(row.ours, row.theirs, row.ratio) for row in rows if row.unit == "waits"} == {(0, 0, None)}
    with_disc, without = (row for row in rows if row.unit == "operations")
    assert with_disc.ours > without.ours and with_disc.theirs > without.theirs
    assert {row.size for row in rows} == {"1 x 64 px"}


def test_images_and_evaluation(toy):
    """Decoding for training and for evaluation, and every stage of eval.py."""
    rows = toy("--only loader,eval")
    assert numbers_fit(rows) and [row.section for row in rows[:3]] == ["loader", "loader", "eval"]
    assert [row.case for row in rows[2:]] == ["decode and resize to 32 px", "model, LiteVAE-B",
                                              "PSNR and SSIM", "LPIPS", "Inception"]
