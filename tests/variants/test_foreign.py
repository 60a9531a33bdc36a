"""Run: python -m pytest tests/test_foreign.py. Oracles: diffusers, its LDM converter, safetensors itself."""

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from formulas import open_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint import load_model, save
from evaluation import metrics
from model import LatentScaling
from variants.foreign import (
    DIFFUSERS,
    LDM,
    OLD_DIFFUSERS,
    load_callable,
    load_diffusers,
    load_open_litevae,
    read_header,
    read_tensors,
)
from variants.sizes import PRESETS

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def peer(channels: int = 4, quant: bool = True, mult: tuple = (1, 2, 4, 4), **options) -> AutoencoderKL:
    """diffusers' own AutoencoderKL at width 32, random in every parameter, norms too."""
    torch.manual_seed(channels)
    options = dict(use_quant_conv=quant, use_post_quant_conv=quant, layers_per_block=2) | options
    vae = AutoencoderKL(
        block_out_channels=tuple(32 * m for m in mult),
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(mult),
        up_block_types=("UpDecoderBlock2D",) * len(mult),
        **options,
    )
    vae.eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What save_pretrained writes for a 4-channel AutoencoderKL; left as it is."""
    path = tmp_path_factory.mktemp("vae")
    peer().save_pretrained(path)
    return path


@torch.no_grad()
def assert_equal(ours: nn.Module, theirs: AutoencoderKL) -> None:
    """Loaded in fp32; mean, log-variance and decoding then agree to 1e-12 in float64, and are not near 0."""
    assert not ours.training and {p.dtype for p in ours.parameters()} == {torch.float32}
    ours, theirs, f = ours.double(), theirs.double(), ours.config.downsample_factor
    x = torch.rand(2, 3, 4 * f, 6 * f, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    pairs = [(posterior.mean, expected.mean), (posterior.logvar, expected.logvar)]
    pairs.append((ours.decode(expected.mean), theirs.decode(expected.mean).sample))
    for a, b in pairs:
        assert a.shape == b.shape and b.abs().mean() > 0.01
        assert (a - b).abs().max() < 1e-12


LDM_WORDS = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def ldm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict under LDM's names, as in SD 1.x files; projections become 1x1 convolutions."""
    last = max(int(key.split(".")[2]) for key in state if ".up_blocks." in key)
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if "down_blocks" in key or "up_blocks" in key:
            side, level, kind, block, *rest = parts[1][:-7], int(parts[2]), *parts[3:]
            level = last - level if side == "up" else level
            place = f"block.{block}" if kind == "resnets" else f"{side}sample"
            key = ".".join([parts[0], side, str(level), place, *rest])
        for theirs, old in LDM_WORDS.items():
            key = key.replace(theirs, old)
        projection = "attn_1" in key and tensor.ndim == 2
        renamed[key] = tensor[..., None, None].contiguous() if projection else tensor
    return renamed


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict with the attention's names of the first releases."""
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in pairs.items():
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    return state


# ------------------------------------------------------------------------------------------------------------
# equal to diffusers


@pytest.mark.parametrize("channels, quant", [(4, True), (4, False), (8, True), (16, False), (16, True)])
def test_folder_equals_diffusers(tmp_path, channels, quant):
    """4, 8 and 16 latent channels, with and without quant convs, from save_pretrained's folder."""
    theirs = peer(channels, quant, scaling_factor=0.3611, shift_factor=0.1159)
    theirs.save_pretrained(tmp_path)
    ours, source = load_diffusers(tmp_path)
    assert_equal(ours, theirs)
    config = ours.config
    assert (config.latent_channels, config.conv1x1) == (channels, quant)
    z = torch.randn(1, channels, 2, 2)                                # as in diffusers' pipelines
    torch.testing.assert_close(LatentScaling.of(source["latents"]).scale(z), (z - 0.1159) * 0.3611)
    assert source["path"] == str(tmp_path / WEIGHTS) and source["dtypes"] == ["F32"]
    assert source["sha256"] == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    assert source["config"] == json.loads((tmp_path / CONFIG).read_text())


@pytest.mark.parametrize("names", [DIFFUSERS, OLD_DIFFUSERS, LDM])
@pytest.mark.parametrize("quant", [True, False])
def test_bare_file_equals_diffusers(tmp_path, names, quant):
    """One file without a config, under each generation of names: the architecture comes from the shapes."""
    theirs = peer(8, quant)
    state = theirs.state_dict()
    state = {DIFFUSERS: lambda s: s, OLD_DIFFUSERS: old_names, LDM: ldm_names}[names](state)
    assert names == DIFFUSERS or state.keys() != theirs.state_dict().keys()
    save_file(state, tmp_path / "any.safetensors", metadata={"format": "pt"})
    ours, source = load_diffusers(tmp_path / "any.safetensors")
    assert_equal(ours, theirs)
    assert source["names"] == names and source["config"] is None
    assert source["latents"] is None


def test_ldm_names_of_this_test_are_those_of_diffusers_converter():
    """diffusers' own LDM converter undoes ldm_names(), so the names of these tests are the real ones."""
    theirs = peer()
    config = dict(theirs.config)
    back = convert_ldm_vae_checkpoint(ldm_names(theirs.state_dict()), config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_autoencoder_of_a_whole_pipeline(tmp_path, prefix):
    """A single-file pipeline gives its autoencoder; UNet, text encoder and training extras stay unread."""
    theirs = peer()
    state = {prefix + key: tensor for key, tensor in ldm_names(theirs.state_dict()).items()}
    extras = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.encoder.conv_in.weight",
              prefix + "loss.logvar", prefix + "model_ema.decay")  # fmt: skip
    state |= {key: torch.ones(2, dtype=torch.float8_e4m3fn) for key in extras}
    save_file(state, tmp_path / "pipeline.safetensors")
    assert_equal(load_diffusers(tmp_path / "pipeline.safetensors")[0], theirs)


@pytest.mark.parametrize("mult", [(1, 2, 4), (1, 1, 2, 2, 4)])
def test_f4_and_f16(tmp_path, mult):
    """Three and five resolutions, LDM's kl-f4 and kl-f16 without attention outside the middle."""
    theirs = peer(mult=mult)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_diffusers(tmp_path)
    assert ours.config.levels == len(mult) - 1
    assert_equal(ours, theirs)


def test_half_precision_variant_in_a_pipeline_folder(tmp_path):
    """vae/ of a pipeline with .fp16 weights alone: exactly the weights rounded to half, in fp32."""
    theirs = peer()
    theirs.half().save_pretrained(tmp_path / "vae", variant="fp16")
    ours, source = load_diffusers(tmp_path)
    assert source["path"].endswith("vae/diffusion_pytorch_model.fp16.safetensors")
    assert source["dtypes"] == ["F16"]
    assert_equal(ours, theirs)
    peer(4).save_pretrained(tmp_path / "vae")
    assert load_diffusers(tmp_path)[1]["dtypes"] == ["F32"]        # full precision is preferred


def test_old_config_without_scaling_factor(folder, tmp_path):
    """The oldest config.json has no scaling_factor: it means SD's 0.18215, as in diffusers."""
    config = json.loads((folder / CONFIG).read_text())
    for key in ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv"):
        del config[key]
    copy_folder(folder, tmp_path, config)
    _, source = load_diffusers(tmp_path)
    assert source["latents"] == {"scaling_factor": 0.18215, "shift_factor": 0.0}


def test_loaded_model_becomes_a_checkpoint_of_ours(folder, tmp_path):
    """Its config and weights go through checkpoint.save and load_model bit by bit."""
    ours, _ = load_diffusers(folder)
    save(tmp_path, dict(step=0, config=asdict(ours.config), args={}, model=ours.state_dict()), keep=0)
    again, _ = load_model(tmp_path / "ckpt.pt")
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in ours.state_dict().items())


# ------------------------------------------------------------------------------------------------------------
# refused


def copy_folder(folder: Path, to: Path, config: dict | None = None, state: dict | None = None) -> None:
    to.mkdir(exist_ok=True)
    (to / CONFIG).write_text(json.dumps(config) if config else (folder / CONFIG).read_text())
    save_file(load_file(folder / WEIGHTS) if state is None else state, to / WEIGHTS)


def refusal(path: Path, load=load_diffusers) -> str:
    """The message of the ValueError, which is one line and names the path."""
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 600, message
    return message.replace(str(path), "PATH")


def text_encoder() -> dict[str, Tensor]:
    return {"text_model.embeddings.token_embedding.weight": torch.ones(8, 4),
            "text_model.final_layer_norm.weight": torch.ones(4)}  # fmt: skip


def unet() -> dict[str, Tensor]:
    return {"conv_in.weight": torch.ones(32, 4, 3, 3), "down_blocks.0.attentions.0.norm.bias": torch.ones(32)}


@pytest.mark.parametrize("other, first", [(text_encoder, "text_model"), (unet, "conv_in.weight")])
def test_other_networks_are_refused(folder, tmp_path, other, first):
    """A text encoder's or a UNet's file is refused by the convolution it lacks and the tensors it has."""
    save_file(other(), tmp_path / "x.safetensors")
    line = refusal(tmp_path / "x.safetensors")
    assert "is not an AutoencoderKL: no convolution encoder.conv_in.weight; it begins with" in line
    assert first in line
    save_file({}, tmp_path / "x.safetensors")
    assert "it begins with nothing" in refusal(tmp_path / "x.safetensors")


CHANGES = {   # name: (keys that go, tensors that come, what the line must say)
    "missing": (["decoder.up_blocks.3.resnets.0.conv_shortcut.bias"], {},
                "decoder.up_blocks.3.resnets.0.conv_shortcut.bias is missing"),
    "one quant conv": (["post_quant_conv.weight", "post_quant_conv.bias"], {},
                       "post_quant_conv.weight is missing"),
    "vq": ([], {"quantize.embedding.weight": torch.ones(16, 4)}, "quantize.embedding.weight is unexpected"),
    "shape": ([], {"encoder.conv_out.weight": torch.ones(4, 128, 3, 3)},
              "encoder.conv_out.weight is (4, 128, 3, 3), expected (8, 128, 3, 3)"),
    "3d": ([], {"encoder.conv_in.weight": torch.ones(32, 3, 3, 3, 3)}, "no convolution encoder.conv_in"),
    "attention": ([], {"decoder.mid_block.attentions.0.to_q.weight": torch.ones(128, 64)},
                  "decoder.mid_block.attentions.0.to_q.weight is (128, 64), expected (128, 128, 1, 1)"),
    "more blocks": ([], {"encoder.down_blocks.0.resnets.2.conv1.weight": torch.ones(32, 32, 3, 3)},
                    "encoder.down_blocks.0.resnets.2.conv1.weight is unexpected"),
    "levels": ([], {f"encoder.down_blocks.{i}.x": torch.ones(1) for i in (4, 5)}, "6 resolutions"),
    "width": ([], {"encoder.conv_in.weight": torch.ones(24, 3, 3, 3)}, "widths 24 and 32"),
    "quantised": ([], {"quant_conv.bias": torch.ones(8, dtype=torch.int8)},
                  "quant_conv.bias has dtype torch.int8"),
    "fp8": ([], {"quant_conv.bias": torch.ones(8, dtype=torch.float8_e4m3fn)},
            "quant_conv.bias has dtype F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_architectures_are_refused(folder, tmp_path, change):
    """One tensor too few, too many or of another shape or kind: the line names it as the file does."""
    gone, new, message = CHANGES[change]
    state = {key: tensor for key, tensor in (load_file(folder / WEIGHTS) | new).items() if key not in gone}
    save_file(state, tmp_path / "x.safetensors")
    assert message in refusal(tmp_path / "x.safetensors")


def test_only_the_first_three_mismatches_are_named(tmp_path):
    """A model without attention lacks 20 tensors: three are named, and how many more there are."""
    peer(mid_block_add_attention=False).save_pretrained(tmp_path)
    line = refusal(tmp_path / WEIGHTS)
    assert line.endswith("; and 17 more") and line.count("missing") == 3


@pytest.mark.parametrize("key, value, message", [
    ("_class_name", "AsymmetricAutoencoderKL", "_class_name is 'AsymmetricAutoencoderKL'"),
    ("norm_num_groups", 16, "norm_num_groups is 16, weights and architecture say 32"),
    ("act_fn", "gelu", "act_fn is 'gelu', weights and architecture say 'silu'"),
    ("latent_channels", 8, "latent_channels is 8, weights and architecture say 4"),
    ("block_out_channels", [32, 64, 64, 128], "say [32, 64, 128, 128]"),
    ("scaling_factor", "0.2", "scaling_factor and shift_factor must be numbers, got '0.2'"),
])  # fmt: skip
def test_config_that_disagrees_is_refused(folder, tmp_path, key, value, message):
    """What the shapes cannot show, or show otherwise, is refused with config.json's value."""
    copy_folder(folder, tmp_path, json.loads((folder / CONFIG).read_text()) | {key: value})
    assert message in refusal(tmp_path)


def test_missing_files_are_named(folder, tmp_path):
    """No file, no weights (pickles are not read), no config, a config that is no JSON object."""
    assert refusal(tmp_path / "x.safetensors") == "no file PATH"
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    assert "only safetensors files are read" in refusal(tmp_path)
    copy_folder(folder, tmp_path)
    for text, message in (("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"),
                          ("[]", "is not a JSON object")):
        (tmp_path / CONFIG).write_text(text)
        assert message in refusal(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert "no config.json in PATH: give" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# the safetensors reader


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
])  # fmt: skip
def test_reader_equals_the_library(tmp_path, dtype):
    """Every dtype, scalars, empty tensors and 3 dimensions: bit by bit what the safetensors library wrote."""
    values = torch.arange(-3, 21).view(2, 3, 4).to(dtype)
    state = {"cube": values, "scalar": values[0, 0, 0].clone(), "empty": torch.empty(0, 5, dtype=dtype)}
    save_file(state, tmp_path / "x.safetensors", metadata={"note": "text"})
    entries = read_header(tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path / "x.safetensors", entries)
    assert tensors.keys() == state.keys()
    for key, tensor in state.items():
        assert tensors[key].dtype == dtype and torch.equal(tensors[key], tensor)
    assert list(read_tensors(tmp_path / "x.safetensors", {"cube": entries["cube"]})) == ["cube"]


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(name: str, begin: int, end: int, **options) -> str:
    item = dict(dtype="F32", shape=[(end - begin) // 4], data_offsets=[begin, end]) | options
    return json.dumps({name: item})[1:-1]


DAMAGED = {
    "empty file": b"",
    "short": b"\x01\x02\x03",
    "a zip": b"PK\x03\x04" + bytes(100),
    "header longer than the file": file_of(b"{}", length=3),
    "header over the limit": file_of(b"{}", length=1 << 60),
    "not JSON": file_of(b"{nonsense}"),
    "not utf-8": file_of(b'{"\xff": 1}'),
    "not an object": file_of(b"[1, 2]"),
    "deep nesting": file_of(b"[" * 200_000),
    "no dtype": file_of(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "entry is a list": file_of(b'{"a": [1]}'),
    "negative shape": file_of(f"{{{entry('a', 0, 4, shape=[-1, -1])}}}".encode(), bytes(4)),
    "fractional shape": file_of(f"{{{entry('a', 0, 4, shape=[1.0])}}}".encode(), bytes(4)),
    "negative size": file_of(f"{{{entry('a', 4, 0, shape=[1])}}}".encode(), bytes(4)),
    "shape and bytes disagree": file_of(f"{{{entry('a', 0, 8, shape=[1])}}}".encode(), bytes(8)),
    "truncated data": file_of(f"{{{entry('a', 0, 8)}}}".encode(), bytes(7)),
    "data after the end": file_of(f"{{{entry('a', 0, 8)}}}".encode(), bytes(9)),
    "gap": file_of(f"{{{entry('a', 0, 4)}, {entry('b', 8, 12)}}}".encode(), bytes(12)),
    "overlap": file_of(f"{{{entry('a', 0, 8)}, {entry('b', 4, 12)}}}".encode(), bytes(12)),
    "overlap of the right sum": file_of(f"{{{entry('a', 0, 8)}, {entry('b', 4, 12)}}}".encode(), bytes(16)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(tmp_path, damage):
    """Truncated, foreign or damaged bytes raise one line with the path, and never anything else."""
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[damage])
    assert any(word in refusal(tmp_path / "x.safetensors") for word in ("not a safetensors file", "damaged"))


def test_every_truncation_is_refused(folder, tmp_path):
    """A download that stopped anywhere is no file: cut at 40 places of a real one, each is refused."""
    whole = (folder / WEIGHTS).read_bytes()
    for i in range(40):
        (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) * i // 40])
        refusal(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------------------------
# open-LiteVAE; its names, shapes and known answers are in test_openlitevae.py


@pytest.mark.parametrize("scale, channels", [("s", 12), ("b", 4), ("m", 12), ("l", 16)])
def test_open_litevae_scale_is_read_off_the_shapes(tmp_path, scale, channels):
    """S, B, M and L, any latent, with and without Lightning's wrapper, in half precision too."""
    state = open_state(scale, latent_channels=channels)
    torch.save({"state_dict": state, "epoch": 1} if scale == "b" else state, tmp_path / "x.ckpt")
    ours, source = load_open_litevae(tmp_path / "x.ckpt")
    wanted = replace(PRESETS[f"open-litevae-{scale}"], decoder_channels=4, latent_channels=channels)
    assert ours.config == wanted and not ours.training
    assert ours.decoder.conv_norm.gain.shape == () and source["dtypes"] == ["float32"]
    assert source["sha256"] == hashlib.sha256((tmp_path / "x.ckpt").read_bytes()).hexdigest()
    torch.save({key: tensor.half() for key, tensor in state.items()}, tmp_path / "x.ckpt")
    halved, source = load_open_litevae(tmp_path / "x.ckpt")
    assert source["dtypes"] == ["float16"] and {p.dtype for p in halved.parameters()} == {torch.float32}
    for key, tensor in ours.state_dict().items():
        assert torch.equal(halved.state_dict()[key], tensor.half().float())


OPEN_CHANGES = {   # name: (keys that go, tensors that come, what the line must say)
    "missing": (["decoder.conv_norm.gain"], {}, "decoder.conv_norm.gain is missing"),
    "missing first": (["encoder.aggregator.init_conv.weight"], {},
                      "is not open-LiteVAE's: no convolution encoder.aggregator.init_conv.weight"),
    "shortcut": (["decoder.up.0.block.0.nin_shortcut.bias"],
                 {"decoder.up.0.block.0.skip.bias": torch.ones(4)},
                 "block.0.nin_shortcut.bias is missing; decoder.up.0.block.0.skip.bias is unexpected"),
    "more": ([], {"quant_conv.weight": torch.ones(2)}, "quant_conv.weight is unexpected"),
    "shape": ([], {"decoder.conv_in.bias": torch.ones(5)}, "decoder.conv_in.bias is (5,), expected (16,)"),
    "scale": ([], {"encoder.aggregator.init_conv.weight": torch.ones(24, 36, 3, 3)}, "widths 16 and 24"),
    "integers": ([], {"decoder.conv_in.bias": torch.ones(16, dtype=torch.int32)}, "dtype torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("change", OPEN_CHANGES)
def test_other_checkpoints_are_no_open_litevae(tmp_path, change):
    """One tensor too few, too many or of another shape or kind: the line names it as the file does."""
    gone, new, message = OPEN_CHANGES[change]
    state = {key: tensor for key, tensor in (open_state() | new).items() if key not in gone}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert message in refusal(tmp_path / "x.ckpt", load_open_litevae)


def test_files_that_hold_no_weights(tmp_path, parent):
    """No file, damaged bytes, a pickle that would run code, other dicts, and a checkpoint of train.py."""
    path = tmp_path / "x.ckpt"
    assert refusal(path, load_open_litevae) == "no file PATH"
    path.write_bytes(b"PK" + bytes(50))
    assert "is damaged, or would execute code" in refusal(path, load_open_litevae)
    torch.save({"state_dict": open_state(), "hyper_parameters": Path("x")}, path)
    assert "would execute code, which is refused" in refusal(path, load_open_litevae)
    for other in ([1], {"state_dict": 3}, {"a": "b"}):
        torch.save(other, path)
        assert "holds no weights" in refusal(path, load_open_litevae)
    assert "holds no weights" in refusal(parent.folder / "ckpt.pt", load_open_litevae)
    torch.save(text_encoder(), path)
    assert "it begins with text_model.embeddings" in refusal(path, load_open_litevae)


# ------------------------------------------------------------------------------------------------------------
# any function of images

MODULE = """
import torch

def identity(x): return x
def darker(x): return x - 0.25
def smaller(x): return x[..., ::2, ::2]
def pair(x): return x, x
def bytes_(x): return ((x + 1) * 127.5).to(torch.uint8)
def lazy(x):
    import {name}_lazy
    return x
net = torch.nn.Dropout(1.0)
number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch, request) -> str:
    """A module with a name of its own in the current directory, which is on no path yet."""
    name = "user_" + hashlib.sha1(request.node.name.encode()).hexdigest()[:8]
    (tmp_path / f"{name}.py").write_text(MODULE.replace("{name}", name))
    (tmp_path / f"{name}_lazy.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return name


def test_callable_is_scored_by_metrics(user_module):
    """metrics.evaluate takes it: identity has 100 dB; a shift of 0.25 in [-1, 1] is 32 of 255, 18.03 dB."""
    images = [torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)]
    score = metrics.evaluate(load_callable(f"{user_module}:identity"), images, torch.device("cpu"))
    assert score["psnr"] == pytest.approx(100) and score["n"] == 2
    score = metrics.evaluate(load_callable(f"{user_module}:darker"), images, torch.device("cpu"))
    assert score["psnr"] == pytest.approx(18.028, abs=1e-3)         # -20 log10(32 / 255)


def test_module_is_put_into_eval_mode(user_module):
    """An nn.Module instance is run in eval mode: dropout of everything changes nothing."""
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(load_callable(f"{user_module}:net")(x)[0], x)
    assert torch.equal(load_callable(f"{user_module}:lazy")(x)[0], x)      # imports at call time work too


@pytest.mark.parametrize("spec, message", [
    ("NAME", "expected module:callable, for example mymodel:reconstruct, got 'NAME'"),
    ("NAME:", "expected module:callable"),
    (":identity", "expected module:callable"),
    ("NAME.py:identity:x", "expected module:callable"),
    ("./NAME:identity", "expected module:callable"),
    ("nowhere_to_be_found:f", "cannot import nowhere_to_be_found: no such module in HERE"),
    ("NAME.inner:f", "cannot import NAME.inner: "),
    ("NAME:nothing", r"NAME \(.*NAME.py\) has no nothing"),
    ("NAME:number", "NAME:number is not callable, but of type int"),
])  # fmt: skip
def test_bad_specs_are_refused(user_module, tmp_path, spec, message):
    """No such module, no such name, not callable, not of the form module:name: one line each."""
    message = message.replace("NAME", user_module).replace("HERE", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_callable(spec.replace("NAME", user_module))


@pytest.mark.parametrize("text, message", [
    ("import a_missing_package", "ModuleNotFoundError: No module named 'a_missing_package'"),
    ("def f(:", "SyntaxError"),
    ("raise OSError('first\\nsecond')", "OSError: first$"),
])  # fmt: skip
def test_modules_that_do_not_import_say_why(user_module, tmp_path, text, message):
    """A module that is there and fails gives its own error's first line, not "no such module"."""
    (tmp_path / f"{user_module}.py").write_text(text)
    with pytest.raises(ValueError, match=f"cannot import {user_module}: {message}"):
        load_callable(f"{user_module}:f")


@pytest.mark.parametrize("name, message", [
    ("smaller", r"returned torch.float32 \(2, 3, 4, 4\) for images \(2, 3, 8, 8\): expected floats"),
    ("pair", "returned tuple: expected one tensor"),
    ("bytes_", r"returned torch.uint8 \(2, 3, 8, 8\)"),
])  # fmt: skip
def test_wrong_outputs_are_refused(user_module, name, message):
    """Another shape, a tuple, 8-bit values: one line that says what came back."""
    with pytest.raises(ValueError, match=f"{user_module}:{name} {message}"):
        load_callable(f"{user_module}:{name}")(torch.zeros(2, 3, 8, 8))
