"""Run: python -m pytest tests/test_export.py. export.py from outside; onnxruntime against the model."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, call, equal, tiny_checkpoint
from safetensors.torch import load_file

import export
from checkpoint import load, load_model
from model import GROUP

SIZES = ((1, 16, 16), (2, 24, 8), (3, 20, 36))             # batch and sides of images; f is 4
LATENTS = {"scaling_factor": 0.4, "shift_factor": -0.25}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folder of a tiny LiteVAE's ckpt.pt, with its ONNX files in onnx/; left as it is."""
    folder = tmp_path_factory.mktemp("exported")
    tiny_checkpoint(folder, LATENTS)
    call("export", folder, "ckpt.pt --out onnx --format onnx")
    return folder


def run(file: Path, x: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@torch.no_grad()
def assert_equal(folder: Path, sizes=SIZES) -> None:
    """Both ONNX files, and the checkpoint's own model, which still has its self-modulated convolutions."""
    model, _ = load_model(folder / "ckpt.pt")
    config, generator = model.config, torch.Generator().manual_seed(7)
    for batch, h, w in sizes:
        x = torch.rand(batch, config.in_channels, h, w, generator=generator) * 2 - 1
        posterior = model.encode(x)
        z = torch.randn(posterior.mean.shape, generator=generator)
        expected = posterior.mean, posterior[-1], model.decode(z)
        found = *run(folder / "onnx/encoder.onnx", x), *run(folder / "onnx/decoder.onnx", z)
        for ours, theirs in zip(expected, found, strict=True):
            assert ours.shape == theirs.shape and np.abs(ours.numpy() - theirs).max() < 1e-4
            assert ours.float().std() > 0.01 or (ours == -30).all()      # the log-variance of plain wavelets


# ---- half of the size --------------------------------------------------------------------------------------


def test_half(tmp_path, capsys):
    """fp16 weights, the average or with --raw those of training, and all else of an inference file."""
    path = tiny_checkpoint(tmp_path, LATENTS)
    for flags, part in (("--out a", "ema"), ("--out b --raw", "model")):
        call("export", tmp_path, f"ckpt.pt --format half {flags}")
        found = torch.load(tmp_path / flags.split()[1] / "half.pt", weights_only=True)
        state = load(path)
        assert found.keys() == state.keys() - {"model", "ema"} | {part} and found["latents"] == LATENTS
        assert all(tensor.dtype == torch.float16 and torch.equal(tensor, state[part][name].half())
                   for name, tensor in found[part].items())
        model, _ = load_model(tmp_path / flags.split()[1] / "half.pt")
        wide = {name: tensor.float() for name, tensor in found[part].items()}
        assert equal(model.state_dict(), wide)


# ---- the folder --------------------------------------------------------------------------------------------


def test_folder(tmp_path, capsys):
    """safetensors has the averaged weights, or with --raw those of training; the report says which."""
    state = load_model(tiny_checkpoint(tmp_path, LATENTS))[1]
    for flags, part, word in (("--out a", "ema", "EMA"), ("--out b/c --format folder --raw", "model", "raw")):
        call("export", tmp_path, f"ckpt.pt {flags}")
        folder = flags.split()[1]
        assert equal(load_file(tmp_path / folder / "model.safetensors"), dict(state[part]))
        wrote = f"wrote {folder}/config.json and {folder}/model.safetensors: {word} weights of step 3, "
        assert capsys.readouterr().out.startswith(wrote)


def test_missing_statistics_are_noted(tmp_path, capsys):
    """The folder is written, and the note names the command that measures them."""
    tiny_checkpoint(tmp_path)
    call("export", tmp_path, "ckpt.pt --out folder")
    note, wrote = capsys.readouterr().out.splitlines()
    assert "scaling_factor is 1" in note and "python latents.py stats ckpt.pt --data SRC" in note
    assert wrote.startswith("wrote folder/config.json")


# ---- ONNX --------------------------------------------------------------------------------------------------


def test_onnx(exported):
    """Equal to 1e-4 for three sizes and batches; the wavelet transform is inside, and f stays open."""
    assert_equal(exported)
    for name, shape in (("encoder", ["batch", 3, "4*height", "4*width"]),
                        ("decoder", ["batch", 4, "height", "width"])):
        onnx.checker.check_model(onnx.load(exported / f"onnx/{name}.onnx"), full_check=True)
        session = onnxruntime.InferenceSession(exported / f"onnx/{name}.onnx")
        assert session.get_inputs()[0].shape == shape
        names = {"encoder": ["latent_mean", "latent_logvar"], "decoder": ["images"]}[name]
        assert [output.name for output in session.get_outputs()] == names


def test_onnx_says_where_it_comes_from(exported):
    """The metadata is what config.json would hold; no path of the machine is in the file."""
    for name in ("encoder", "decoder"):
        path = exported / f"onnx/{name}.onnx"
        about = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        assert json.loads(about["latents"]) == LATENTS and json.loads(about["architecture"])["levels"] == 2
        assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(output="wavelet"),
    dict(wavelet="db2", output="wavelet"),
    dict(encoder="sd", sd_channels=32, conv1x1=True, decoder_channels=32, **GROUP),
    dict(encoder="dwt", latent_channels=12),
    dict(encoder="dwt2", latent_channels=48),
    dict(extractor="nafnet", downsample="conv", **GROUP),
    dict(encoder="open-litevae", decoder="open-litevae"),
    dict(codebook_size=32),
    dict(codebook_size=32, encoder="sd", sd_channels=32, conv1x1=True),
], ids=str)  # fmt: skip
def test_onnx_of_every_system(tmp_path, options):
    """All encoders, decoders and wavelets; with a codebook the encoder gives codes and their numbers."""
    tiny_checkpoint(tmp_path, **options)
    call("export", tmp_path, "ckpt.pt --out onnx --format onnx")
    assert_equal(tmp_path)


@pytest.mark.slow
def test_onnx_of_a_vit(tmp_path):
    """Its encoder takes any batch of its one size, its decoder any size."""
    tiny_checkpoint(tmp_path, aggregator="vit", resolution=16)
    call("export", tmp_path, "ckpt.pt --out onnx --format onnx")
    assert_equal(tmp_path, ((1, 16, 16), (3, 16, 16)))
    images = run(tmp_path / "onnx/decoder.onnx", torch.zeros(2, 4, 3, 5))[0]
    assert images.shape == (2, 3, 12, 20)


# ---- what a user can get wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, names", export.FILES.items())
def test_nothing_is_overwritten(tmp_path, refused, monkeypatch, exported, kind, names):
    """A file in the way is named before anything is computed; --force replaces it and leaves the rest."""
    tiny_checkpoint(tmp_path)
    files = {name: (exported / "onnx" / name).read_bytes() for name in export.FILES["onnx"]}
    monkeypatch.setattr(export, "export_onnx", lambda vae: files)          # takes a while
    monkeypatch.setattr(export, "largest_difference", lambda model, files: 0.0)
    (tmp_path / "out").mkdir()
    for name in (names[-1], "README.md"):
        (tmp_path / "out" / name).write_text("mine")
    line = refused("export", f"ckpt.pt --out out --format {kind}")
    assert f"out already holds {names[-1]}: choose another folder, or give --force" in line
    call("export", tmp_path, f"ckpt.pt --out out --format {kind} --force")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "README.md"])
    assert (tmp_path / "out/README.md").read_text() == "mine" != (tmp_path / "out" / names[-1]).read_bytes()


def test_missing_packages(tmp_path, refused, monkeypatch):
    """ONNX without its packages is one line with the command that installs them; the folder needs none."""
    tiny_checkpoint(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name in ("onnx", "onnxruntime") else find(name, *rest))
    line = refused("export", "ckpt.pt --out out --format onnx")
    assert "--format onnx needs onnx, onnxruntime: pip install onnx onnxruntime" in line
    call("export", tmp_path, "ckpt.pt --out out")


def test_a_wrong_graph_is_not_written(tmp_path, refused, monkeypatch, exported):
    """Files of other weights differ from the model, which onnxruntime finds before they are written."""
    tiny_checkpoint(tmp_path)
    files = {name: (exported / "onnx" / name).read_bytes() for name in export.FILES["onnx"]}
    monkeypatch.setattr(export, "export_onnx", lambda vae: files)
    line = refused("export", "ckpt.pt --out out --format onnx --raw")
    assert "the ONNX files would differ from the model by more than 0.0001" in line


@pytest.mark.parametrize("flags, expected", [
    ("ckpt.pt", "the following arguments are required: --out"),
    ("nowhere.pt --out out", "no checkpoint at nowhere.pt"),
    ("text.pt --out out", "text.pt is damaged or not a checkpoint"),
    ("text.pt --out out --format tflite", "argument --format: invalid choice: 'tflite'"),
    ("ckpt.pt --out text.pt", "text.pt"),
])  # fmt: skip
def test_wrong_input(tmp_path, refused, flags, expected):
    """One line with the value received, and nothing written."""
    tiny_checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert expected in refused("export", flags)
