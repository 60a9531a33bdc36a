"""Run: python -m pytest tests/test_checkpoint.py. Files that survive a crash, and errors of one line."""

import copy
import errno
import os
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import equal
from torch import nn

import checkpoint
import data
import train
from evaluation import metrics
from model import Autoencoder
from runtime import sources
from variants import options
from variants.build import build
from variants.config import AutoencoderConfig

SHIPPED_PSNR = 29.0354    # dB, of weights/litevae-tiny.pt on four generated images of 128 px

# far from every default, so that a rebuilt network can only come of the file
ODD = AutoencoderConfig(
    in_channels=1, latent_channels=5, levels=2, extractor_channels=6, extractor_mult=(1, 2),
    aggregator_channels=4, aggregator_mult=(2, 1), decoder_channels=4, decoder_blocks=1, decoder_norm="group",
    decoder_attention=True, output="wavelet", conv1x1=True,
)  # fmt: skip


def write(folder: Path, step: int = 3, keep: int = 0) -> tuple[dict, Autoencoder, Autoencoder]:
    """Save a tiny model and another one as its EMA; returns the state and both."""
    torch.manual_seed(step)
    net, ema = build(ODD), build(ODD)
    weights = dict(model=net.state_dict(), ema=ema.state_dict())
    state = dict(step=step, config=asdict(ODD), args={"res": 16}, **weights)
    checkpoint.save(folder, state, keep)
    return state, net, ema


def test_shipped_model(capsys):
    """load_model() says what it takes: at most 4 MiB of fp16 weights, whose PSNR on four images is known."""
    model, state = checkpoint.load_model()
    assert capsys.readouterr().out == "no checkpoint is named: loading weights/litevae-tiny.pt\n"
    assert checkpoint.SHIPPED.stat().st_size <= 4 * 2**20
    assert all(tensor.dtype == torch.float16 for tensor in state["ema"].values()) and "model" not in state
    recipe = train.parse_args([f"@{checkpoint.SHIPPED.parents[1]}/recipes/litevae-tiny.args"])
    assert state["step"] == recipe.steps and options.build_config(recipe) == model.config
    held_out = data.ValSet(sources.open_source("synthetic", held_out=True), 128, 4)
    images = torch.stack([held_out[i][0] for i in range(4)])
    with torch.no_grad():
        recon = metrics.to_uint8(model.decode(model.encode(data.to_float(images)).mean))
    assert metrics.psnr(images, recon).mean().item() == pytest.approx(SHIPPED_PSNR, abs=1e-3)


def plain(value) -> bool:
    """Nothing but the plainest types, and those exactly: no subclass, no Path, no numpy scalar."""
    if type(value) in (dict, OrderedDict, list, tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(plain, parts))
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- saving ------------------------------------------------------------------------------------------------


def test_checkpoint_of_a_run_is_plain(parent):
    """What train.py saves loads with weights_only=True and holds plain types and tensors only."""
    state = parent.state()
    assert plain(state) and not plain({"a": [Path("x")]}) and not plain(torch.__version__)
    about = {"step", "config", "args", "device", "precision", "versions", "git", "data", "parent"}
    assert set(state) == about | {"model", "ema", "disc", "lecam", "opt", "opt_muon", "opt_disc"}
    assert set(parent.state("model.pt")) == about | {"ema"}
    assert set(parent.state("best.pt")) == about | {"ema", "val_psnr"}
    assert state["step"] == state["args"]["steps"] == 2 and state["args"]["scale"] == "S"
    assert state["versions"]["torch"] == torch.__version__
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in (*state["model"], *state["disc"]))


def test_files_of_the_user_stay(tmp_path):
    """Without --keep nothing is deleted, with it only ckpt-<8 digits>.pt, the longest unwritten first."""
    for name in ("ckpt-best.pt", "ckpt-00000009.pt"):
        (tmp_path / name).write_bytes(b"mine")
        os.utime(tmp_path / name, (1, 1))
    write(tmp_path, step=1, keep=0)
    assert (tmp_path / "ckpt-00000009.pt").exists()
    for step in (2, 3):
        write(tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ckpt-00000002.pt", "ckpt-00000003.pt", "ckpt-best.pt", "ckpt.pt"]


@pytest.mark.parametrize("keep, kept", [(0, []), (1, [3, 4]), (2, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_keep(tmp_path, keep, kept):
    """`keep` older checkpoints stay, besides the newest, which is ckpt.pt; no temporary file does."""
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep)
    numbered = [f"ckpt-{step:08d}.pt" for step in kept]
    assert names(tmp_path) == [*numbered, "ckpt.pt"]
    assert [checkpoint.load(tmp_path / name)["step"] for name in (*numbered, "ckpt.pt")] == [*kept, 4]
    assert not keep or os.path.samefile(tmp_path / numbered[-1], tmp_path / "ckpt.pt")


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_crash_while_saving(tmp_path, monkeypatch, failing):
    """A full disk at any moment of a save: the error comes out, the old file loads, no half one is left."""
    write(tmp_path, step=1, keep=2)

    def fail(*args):
        if failing == "torch.save":
            args[1].write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, step=2, keep=2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 1
    left = names(tmp_path)
    assert left in (["ckpt-00000001.pt", "ckpt.pt"], ["ckpt-00000001.pt", "ckpt-00000002.pt", "ckpt.pt"])
    for name in left:
        checkpoint.load(tmp_path / name)
    write(tmp_path, step=2, keep=2)                                   # nothing is in the way of the next save
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 2


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links."""
    def link(*names):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("keep, kept", [(1, [3, 4]), (2, [2, 3, 4])])
def test_without_hard_links(tmp_path, no_links, keep, kept):
    """ckpt.pt and the newest ckpt-<step>.pt are two files with the same bytes; as many older ones stay."""
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep)
    numbered = [f"ckpt-{step:08d}.pt" for step in kept]
    assert names(tmp_path) == [*numbered, "ckpt.pt"]
    newest, twin = tmp_path / "ckpt.pt", tmp_path / numbered[-1]
    assert not os.path.samefile(newest, twin) and equal(checkpoint.load(newest), checkpoint.load(twin))
    assert [checkpoint.load(tmp_path / name)["step"] for name in numbered] == kept


def test_second_copy_saves_a_damaged_checkpoint(tmp_path, no_links):
    """If only ckpt.pt is damaged, a run goes on from the copy of the same step, and says so once."""
    for step in (1, 2):
        write(tmp_path, step, keep=1)
    os.truncate(tmp_path / "ckpt.pt", 1000)
    path, damaged = checkpoint.newest(tmp_path)
    assert path.name == "ckpt-00000002.pt" and len(damaged) == 1 and "ckpt.pt is damaged" in damaged[0]


def test_full_disk_without_hard_links(tmp_path, no_links, monkeypatch):
    """A disk that is full at the second copy: the error comes out and each file that is left is whole."""
    write(tmp_path, step=1, keep=2)
    real, calls = torch.save, iter(range(9))

    def save(state, file):
        if next(calls) == 1:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, step=2, keep=2)
    assert names(tmp_path) == ["ckpt-00000001.pt", "ckpt-00000002.pt", "ckpt.pt"]
    assert [checkpoint.load(tmp_path / name)["step"] for name in names(tmp_path)] == [1, 2, 1]
    write(tmp_path, step=2, keep=2)
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 2


# ---- loading -----------------------------------------------------------------------------------------------


def test_load_model_needs_the_file_alone(tmp_path):
    """Architecture from the config inside, EMA weights, or the model's with raw or where there is no EMA."""
    state, net, ema = write(tmp_path)
    x = torch.rand(2, 1, 16, 24) * 2 - 1
    for raw, expected in ((False, ema), (True, net)):
        rebuilt, loaded = checkpoint.load_model(tmp_path / "ckpt.pt", raw)
        assert rebuilt.config == ODD and not rebuilt.training and loaded["step"] == 3
        assert torch.equal(rebuilt(x)[0], expected(x)[0])
    checkpoint.save(tmp_path, state | {"ema": None}, 0)
    assert torch.equal(checkpoint.load_model(tmp_path / "ckpt.pt")[0](x)[0], net(x)[0])


def test_damaged_file(tmp_path):
    """Cut short, empty, text, with flipped bytes, a folder or missing: ValueError, one line with the path."""
    write(tmp_path)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    contents = [whole[: len(whole) * part // 8] for part in range(8)]
    contents += [b"hello\n", b"import torch", b"{}", b"journal", b"(abc", b"e", b"# LiteVAE\n"]
    for _ in range(100):                                              # the pickle lies in the first kilobytes
        broken = bytearray(whole)
        for position in torch.randint(64, 4096, (20,), generator=generator).tolist():
            broken[position] ^= 85
        contents.append(bytes(broken))
    bad = tmp_path / "bad.pt"
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(ValueError) as error:
            checkpoint.load(bad)
        assert str(bad) in str(error.value) and "\n" not in str(error.value)
    for path, words in ((tmp_path, f"{tmp_path} is a folder: name its checkpoint, e.g. {tmp_path}/ckpt.pt"),
                        (tmp_path / "nothing.pt", f"no checkpoint at {tmp_path}/nothing.pt")):
        with pytest.raises(ValueError, match=f"^{words}$"):
            checkpoint.load(path)


def test_foreign_file(tmp_path):
    """A weights file of someone else, or one that carries code, is refused, and no code runs."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for content in ({"weight": torch.ones(1)}, [1], Code()):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(ValueError, match="foreign.pt is (not a checkpoint of train.py|damaged)"):
            checkpoint.load(tmp_path / "foreign.pt")
    assert not (tmp_path / "ran").exists()


def test_fault_09_first_mismatch_is_named():
    """load_weights is strict, names the first difference with both shapes, and loads all or nothing."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = {name: torch.full_like(tensor, 7.0) for name, tensor in net.state_dict().items()}
    before = copy.deepcopy(net.state_dict())
    less = {name: tensor for name, tensor in good.items() if name != "1.bias"}
    for weights, message in (
        (good | {"0.bias": torch.ones(4)}, r"x.pt does not fit: 0.bias is \(4,\) there, but \(3,\) here$"),
        (good | {"0.bias": None}, r"0.bias is absent there, but \(3,\) here$"),
        (less, r"1.bias is absent there, but \(1,\) here$"),
        (good | {"2.bias": torch.ones(1)}, r"2.bias is \(1,\) there, but absent here$"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load_weights(net, weights, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    checkpoint.load_weights(net, good, "x.pt")
    assert all((tensor == 7).all() for tensor in net.state_dict().values())


@pytest.mark.parametrize("name, value", [("levels", 3), ("decoder_norm", "smc"), ("extractor_mult", (1, 3))])
def test_other_architecture_shows_both_values(tmp_path, name, value):
    """check_config names the first field that differs with both values."""
    state, _, _ = write(tmp_path)
    checkpoint.check_config(state, ODD, "x.pt")
    other = AutoencoderConfig(**asdict(ODD) | {name: value})
    with pytest.raises(ValueError) as error:
        checkpoint.check_config(state, other, "x.pt")
    assert f"{name}={getattr(ODD, name)}" in str(error.value) and f"ask for {value}" in str(error.value)


def test_config_of_another_version(tmp_path):
    """Two fields of older checkpoints are dropped; a field that this version does not know is named."""
    state, _, _ = write(tmp_path)
    state["config"] |= dict(scale_factor=1.0, shift_factor=0.0)
    assert checkpoint.to_config(state, "x.pt") == ODD
    state["config"]["discrete"] = True
    with pytest.raises(ValueError, match="x.pt has a configuration this version does not know.*'discrete'"):
        checkpoint.to_config(state, "x.pt")
