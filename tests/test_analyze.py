"""Run: python -m pytest tests/test_analyze.py. The script from outside."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, train_in, write_images
from diffusers import AutoencoderKL
from formulas import open_state
from PIL import Image

import checkpoint
import data
from evaluation import analyses, decoding, plots
from evaluation import latent_statistics as stats
from evaluation.equivariance import dct_spectrum, equivariance_error
from runtime import files, sources

NAMES = [analysis.name for analysis in analyses.ANALYSES]
SMALL = "--data synthetic --res 64 --count 2 --samples 4 --resolutions 16,32 --device cpu --out out"


def analyze(folder: Path, flags: str) -> dict:
    """What analysis.json holds after analyze.py with these flags; it names each analysis once."""
    call("analyze", folder, f"{SMALL} {flags}")
    report = json.loads((folder / "out/analysis.json").read_text())
    assert sorted([*report.keys() & set(NAMES), *report["unavailable"]]) == sorted(NAMES)
    return report


# ---- the table, without --out ------------------------------------------------------------------------------


def test_table(tmp_path, capsys):
    """A row per layer of a checkpoint's decoder; raw and averaged weights differ; nothing is written."""
    run = train_in(tmp_path, "--lr 1e-3")
    tables = []
    for flags in ("", "--raw"):
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        call("analyze", tmp_path, f"{run.folder}/ckpt.pt --data synthetic --res 32 --count 2 {flags}")
        tables.append(capsys.readouterr().out)
        assert sorted(tmp_path.rglob("*")) == before
    assert [len(text.splitlines()) for text in tables] == [16, 16] and tables[0] != tables[1]
    assert tables[0].split()[:4] == ["name", "feature", "largest", "branch"]


def test_broken_images_are_left_out(tmp_path, capsys, refused):
    """A file that is cut short is left out; if no file can be read, the first is named. Grey models work."""
    run = train_in(tmp_path, "--in-channels 1 --steps 1")
    folder = write_images(tmp_path / "some", ["0.png", "1.png"], side=32)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:500])
    capsys.readouterr()
    call("analyze", tmp_path, f"{run.folder}/ckpt.pt --data {folder} --res 32")
    assert len(capsys.readouterr().out.splitlines()) == 16
    assert "some/1.png" in refused("analyze", f"--data {folder}/1.png")


# ---- with --out --------------------------------------------------------------------------------------------


def test_everything_of_a_run(tmp_path, parent, capsys):
    """All analyses of a checkpoint with a log: numbers by hand, a summary, pictures that are not blank."""
    report = analyze(tmp_path, f"{parent.folder}/ckpt.pt --samples 3 --batch-size 2 --resolutions 16,64")
    assert report["unavailable"] == {}
    assert (report["n"], report["broken"], report["res"], report["weights"]) == (3, 0, 64, "EMA")

    model, state = checkpoint.load_model(parent.folder / "ckpt.pt")
    images = data.ValSet(sources.open_source("synthetic", held_out=True), 64, 3)
    batch = torch.stack([images[i][0] for i in range(3)])
    latents = decoding.encode(model, batch, torch.device("cpu"), 3)
    assert report["moments"]["std"] == pytest.approx(latents.z.double().std(correction=0).item(), rel=1e-4)
    expected = stats.kl(latents.mean, latents.logvar)["channel_kl"].tolist()
    assert report["kl"]["channel_kl"] == pytest.approx(expected, rel=1e-4)
    scaled = latents.z.double().flatten(1) / report["mmd"]["latent_std"]
    assert report["mmd"]["mmd2"] == pytest.approx(stats.mmd_to_gaussian(scaled)["mmd2"], rel=1e-3)
    assert report["mmd"]["dimensions"] == 12 * 8 * 8
    errors = equivariance_error(model, data.to_float(batch))
    assert report["equivariance"] == {name: pytest.approx(value, rel=1e-3) for name, value in errors.items()}
    assert report["dct"]["block"] == 8
    spectrum = dct_spectrum(latents.z)
    assert report["dct"]["latent_high"] == pytest.approx(spectrum[32:].mean().item(), rel=1e-3)
    assert report["noise"]["psnr"][0] == pytest.approx(report["resolution"]["psnr"][1], abs=1e-3)
    assert report["resolution"]["resolution"] == [16, 64]
    last = parent.lines[-1]
    ratio = last["adaptive_weight"] / state["args"]["disc_weight"]
    assert report["gradients"]["ratio"] == [pytest.approx(ratio, rel=1e-5)]

    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in printed for name in NAMES)
    assert f"{report['kl']['mean']:.4g}" in printed
    for name in NAMES:
        pixels = np.asarray(Image.open(tmp_path / f"out/{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and 0.01 < (pixels < 250).any(axis=-1).mean(), name


def save_diffusers(folder: Path) -> str:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",), layers_per_block=2, latent_channels=4,
    ).save_pretrained(folder / "vae")
    return "--diffusers vae"


def save_open_litevae(folder: Path) -> str:
    torch.save({"state_dict": open_state()}, folder / "public.ckpt")
    return "--open-litevae public.ckpt"


def save_codebook(folder: Path) -> str:
    train_in(folder, "--codebook-size 8 --steps 1")
    return "run/ckpt.pt --raw"


def save_one_channel(folder: Path) -> str:
    train_in(folder, "--latent-channels 1 --in-channels 1 --steps 1")
    return "run/ckpt.pt"


def save_vit(folder: Path) -> str:
    train_in(folder, "--aggregator vit --steps 1")
    return "run/ckpt.pt --res 32"


def write_module(folder: Path) -> str:
    (folder / "of_the_user.py").write_text("def same(x):\n    return x * 1\n")
    return "--model of_the_user:same"


LATENT = {"moments", "histograms", "kl", "correlation", "mmd", "spectrum", "dct", "equivariance", "pca",
          "noise", "layers", "norms"}


@pytest.mark.parametrize("save, unavailable, reason", [
    (save_diffusers, {"gradients"}, "no log.jsonl"),
    (save_open_litevae, {"gradients"}, "no log.jsonl"),
    (save_codebook, {"kl", "gradients"}, "a codebook has no KL"),
    (save_one_channel, {"gradients"}, "no adaptive_weight"),
    (save_vit, {"equivariance", "gradients"}, "the ViT of this model only takes 32 px, nothing scaled"),
    (write_module, LATENT | {"gradients"}, "has no latent and no decoder"),
    (lambda folder: "--preset demo", {"gradients"}, "no log.jsonl"),
])
def test_all_kinds_of_models(tmp_path, monkeypatch, capsys, save, unavailable, reason):
    """Each has all analyses but those that it cannot have, with the reason in one line and in the JSON."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plots, "Figure", None)                         # tests/evaluation/test_plots.py draws
    flags = save(tmp_path)
    capsys.readouterr()
    report = analyze(tmp_path, flags)
    assert report["unavailable"].keys() == unavailable
    assert any(reason in text for text in report["unavailable"].values())
    printed = capsys.readouterr().out.splitlines()
    for name, text in report["unavailable"].items():
        assert f"{name} is unavailable: {text}" in printed
    if save is write_module:
        assert report["resolution"]["psnr"] == [100, 100]
    if save is save_vit:
        assert report["resolution"]["resolution"] == [32]


def test_without_matplotlib(tmp_path, parent, monkeypatch, capsys):
    """One line says what to install, the JSON is written, and no picture of an earlier call remains."""
    monkeypatch.setattr(plots, "Figure", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mmd.png").write_bytes(b"of an earlier call")
    report = analyze(tmp_path, f"{parent.folder}/ckpt.pt")
    assert report["moments"]["std"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "matplotlib" in line]
    assert len(lines) == 1 and "pip install -r requirements-plots.txt" in lines[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["analysis.json"]


def test_sides_without_a_quarter(tmp_path, monkeypatch):
    """At 48 px the latents cannot be scaled to a quarter: no equivariance errors, and the reason."""
    monkeypatch.setattr(plots, "Figure", None)
    report = analyze(tmp_path, "--preset demo --res 48")
    assert "48x48" in report["unavailable"]["equivariance"] and report["dct"]["block"] == 6


def test_full_disk(tmp_path, parent, monkeypatch, capsys):
    """One line and exit code 1; the JSON of an earlier call is still there, and no temporary file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/analysis.json").write_text("earlier")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SystemExit) as stop:
        analyze(tmp_path, f"{parent.folder}/ckpt.pt")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "cannot write out/analysis.json: [Errno 28] No space left" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["analysis.json"]
    assert (tmp_path / "out/analysis.json").read_text() == "earlier"


def test_few_images(tmp_path, monkeypatch):
    """Two images have no MMD and a broken file is counted; all else is there."""
    monkeypatch.setattr(plots, "Figure", None)
    folder = write_images(tmp_path / "some", ["0.png", "1.png", "2.png"], side=32)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:500])
    report = analyze(tmp_path, f"--preset demo --data {folder}")
    assert (report["n"], report["broken"]) == (2, 1)
    assert "at least 3 images, got 2" in report["unavailable"]["mmd"]


def test_json_has_no_nan(tmp_path):
    """Numbers that do not exist are null, tensors are lists, six digits are kept, pictures are left out."""
    value = {"a": torch.tensor([1.23456789, float("nan")]), "b": {"c": float("inf")}, "pictures": 1, "d": {}}
    plain = analyses.plain(value)
    assert plain == {"a": [1.23457, None], "b": {"c": None}, "d": {}}
    assert json.loads(analyses.to_json(plain)) == plain


def test_docs_explain_every_analysis():
    """docs/analysis.md has a row in its table and a paragraph for each, in the order of the list."""
    text = (ROOT / "docs/analysis.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == NAMES
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.M) == NAMES


# ---- wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, line", [
    ("nowhere.pt --data synthetic", "no checkpoint at nowhere.pt"),
    ("--data nowhere", "'nowhere' not found"),
    ("--data synthetic --count 0", "must be at least 1, got 0"),
    ("--data synthetic --preset tiny", "invalid choice: 'tiny'"),
    ("--data synthetic --raw", "--raw needs a checkpoint"),
    ("--data synthetic --preset demo --res 36", "--res 36 is not a multiple of 8"),
    ("--data synthetic --preset litevae-b-vit", "--res 64: the ViT of this model only takes 256"),
    ("--data synthetic --preset demo --out out --resolutions 32,36", "--resolutions 36 is not a multiple"),
    ("--data synthetic --preset demo --out out --resolutions 8", "--resolutions 8 is below 16"),
    ("--data synthetic --out out --resolutions x", "invalid resolutions value: 'x'"),
    ("--data synthetic --out out --samples 0", "must be at least 1, got 0"),
    ("--data synthetic --out out --batch-size 0", "must be at least 1, got 0"),
    ("--data synthetic --preset demo --device tpu", "no device 'tpu'"),
    ("--data synthetic --preset demo --out taken", "taken"),
    ("--data synthetic --diffusers taken --out out", "taken is not a safetensors file"),
    ("--data synthetic --open-litevae taken --out out", "taken is damaged"),
    ("--data synthetic --model nowhere:f --out out", "cannot import nowhere"),
    ("--data synthetic --model builtins:id --out out", "builtins:id returned int"),
    ("--data synthetic --model builtins:id", "--model has no decoder to look into; give --out"),
    ("nowhere.pt --data synthetic --preset demo", "--preset demo is for an untrained model, got nowhere.pt"),
    ("--data synthetic --diffusers a --model b:c", "give one of a checkpoint, --diffusers"),
])
def test_wrong_input(tmp_path, refused, flags, line):
    """One line with the value received, before anything is written."""
    (tmp_path / "taken").write_text("not a folder")
    assert line in refused("analyze", flags)
