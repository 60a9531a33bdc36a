"""Load other people's autoencoders as our own model, or wrap any function of images.

    load_diffusers(path)            AutoencoderKL folders and .safetensors files: SD 1.x, SDXL, SD3, FLUX, ...
    load_open_litevae(path)         open-LiteVAE's public checkpoints, in its own architecture
    load_callable("module:name")    anything that maps images to images

Weight files are parsed, never executed. A file that does not fit is rejected with the first tensors that
differ, named as in the file; nothing is guessed, skipped or filled in.
"""

import hashlib
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import PYRAMID_MULT, Autoencoder
from variants.build import build
from variants.config import AutoencoderConfig
from variants.sizes import PRESETS

# ----------------------------------------------------------------------------
# safetensors: 8 bytes with the length of the header, a JSON header, then the tensors one after another

# fmt: off
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on
MAX_HEADER = 100_000_000   # bytes, the format's own limit


class Entry(NamedTuple):
    """One tensor of a safetensors file: dtype as spelt in the file, shape, first byte, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: str | Path) -> dict[str, Entry]:
    """Read the header of a safetensors file: its tensors by name, without their data.

    Raises a one-line ValueError if the file is missing, truncated, damaged or in another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    total = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(total - 8, MAX_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or truncated: {length} bytes of header?")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        entries = {name: to_entry(item, 8 + length) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: cannot read its header") from error
    check_layout(entries, 8 + length, total, path)
    return entries


def to_entry(item: dict, data: int) -> Entry:
    """Parse one value of the JSON header; read_header catches what this raises."""
    dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    size = end - begin
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, size)):
        raise ValueError("not natural numbers")
    if dtype in DTYPES and size != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("shape and bytes disagree")
    return Entry(dtype, shape, data + begin, size)


def check_layout(entries: dict[str, Entry], data: int, total: int, path: Path) -> None:
    """Check that the tensors fill the file from byte `data` to its end, without gaps or overlaps."""
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            raise ValueError(f"{path} is damaged: {name} starts at byte {entry.start}, expected {position}")
        position += entry.size
    if position != total:
        raise ValueError(f"{path} is truncated or damaged: {total} bytes, but its header needs {position}")


def read_tensors(path: str | Path, entries: dict[str, Entry]) -> dict[str, Tensor]:
    """Read these tensors in their stored dtype; raises ValueError for a dtype outside DTYPES."""
    tensors = {}
    with open(path, "rb") as file:
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise ValueError(f"{path}: {name} has dtype {entry.dtype}, not one of {', '.join(DTYPES)}")
            buffer, dtype = bytearray(entry.size), DTYPES[entry.dtype]
            file.seek(entry.start)
            if file.readinto(buffer) != entry.size:
                raise ValueError(f"{path} is truncated: {name} cannot be read")
            flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry.shape)
    return tensors


# ----------------------------------------------------------------------------
# tensor names: ours, and those of three generations of files

DIFFUSERS, OLD_DIFFUSERS, LDM = "diffusers", "old diffusers", "LDM"
QKV = {DIFFUSERS: ("to_q", "to_k", "to_v"), OLD_DIFFUSERS: ("query", "key", "value"), LDM: ("q", "k", "v")}
# fmt: off
NAMES = {  # ours: (diffusers, LDM); replaced in this order, so mid.1.norm comes before mid.1
    "mid.0.":      ("mid_block.resnets.0.",               "mid.block_1."),
    "mid.2.":      ("mid_block.resnets.1.",               "mid.block_2."),
    "mid.1.norm.": ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
    "mid.1.proj.": ("mid_block.attentions.0.to_out.0.",   "mid.attn_1.proj_out."),
    "mid.1.":      ("mid_block.attentions.0.",            "mid.attn_1."),
    ".skip.":      (".conv_shortcut.",                    ".nin_shortcut."),
    ".norm_out.":  (".conv_norm_out.",                    ".norm_out."),
}
# fmt: on
PREFIXES = ("first_stage_model.", "vae.")   # of the autoencoder in the file of a whole pipeline
EXTRAS = ("loss.", "model_ema.")            # what LDM's training saves besides the weights


def find_names(names: Iterable[str]) -> str:
    """The generation of tensor names in a file."""
    if any(re.search(r"\.(block\.\d|attn_1|block_1)\.", name) for name in names):
        return LDM
    return OLD_DIFFUSERS if any(".attentions.0.query." in name for name in names) else DIFFUSERS


def their_keys(name: str, names: str, levels: int) -> list[str]:
    """The names of a file's tensors that form our parameter `name`: one, or three for attention's qkv."""

    def place(match: re.Match) -> str:
        part, blocks = match[1], 2 if match[1] == "down" else 3       # ResBlocks per resolution
        level, block = divmod(int(match[2]), blocks + 1)
        if names == LDM:
            level = level if part == "down" else levels - level       # LDM counts both ways from the image
            return f".{part}.{level}." + (f"block.{block}." if block < blocks else f"{part}sample.")
        return f".{part}_blocks.{level}." + (f"resnets.{block}." if block < blocks else f"{part}samplers.0.")

    name = re.sub(r"\.(down|up)\.(\d+)\.", place, name)
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs[names == LDM])
    if names == OLD_DIFFUSERS:
        name = name.replace("to_out.0", "proj_attn")
    return [name.replace("qkv", part) for part in QKV[names]] if "qkv" in name else [name]


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop trailing ones, since a linear layer and a 1x1 convolution are equivalent here."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def check_fit(path: Path, what: str, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise ValueError with the first tensors that differ unless names and shapes match exactly."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} is {tuple(found[key])}, expected {shape}" for key, shape in wanted.items()
              if key in found and squeeze(tuple(found[key])) != squeeze(shape)]
    wrong += [f"{key} is unexpected" for key in found if key not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} is not {what}: {'; '.join(wrong[:3])}{more}")


# ----------------------------------------------------------------------------
# from their tensors to our model


def fill(
    config: AutoencoderConfig,
    rename: Callable[[str], list[str]],
    found: dict[str, tuple[int, ...]],
    read: Callable[[], dict[str, Tensor]],
    path: Path,
) -> Autoencoder:
    """Build our model with the weights of a file, in fp32 and eval mode; ValueError unless it fits exactly.

    rename: our parameter name -> the names of the file's tensors whose rows form it. found: the shapes of the
    tensors in the file. read: returns the tensors; called only after the shapes have been checked.
    """
    with torch.device("meta"):
        model = build(config)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources, wanted, weights = {name: rename(name) for name in own}, {}, {}
    for name, keys in sources.items():
        rows, *rest = own[name] or (1,)                   # our scalar may be a vector of length 1 there
        wanted |= dict.fromkeys(keys, (rows // len(keys), *rest))
    check_fit(path, "an autoencoder of this architecture", wanted, found)
    tensors = read()
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} has dtype {tensor.dtype}: quantised weights are not supported")
    for name, keys in sources.items():
        parts = [tensors[key].float().reshape(wanted[key]) for key in keys]
        weights[name] = torch.cat(parts).reshape(own[name])
    model.load_state_dict(weights, assign=True)
    return model.eval()


def describe(path: Path, names: str, dtypes: Iterable[str], config: dict | None) -> dict:
    """The origin of the weights, in plain types."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    dtypes = sorted(set(dtypes))
    return {"path": str(path), "sha256": sha256, "names": names, "dtypes": dtypes, "config": config}


# ----------------------------------------------------------------------------
# AutoencoderKL

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def load_diffusers(path: str | Path) -> tuple[Autoencoder, dict]:
    """Load an AutoencoderKL of diffusers or LDM as our own Autoencoder (fp32, eval mode), and its origin.

    path: a diffusers folder with config.json next to the weights (or a pipeline with such a `vae` subfolder;
    full precision is preferred to .fp16), or one .safetensors file of an autoencoder or of a whole pipeline
    (first_stage_model.*, vae.*). The architecture is inferred from the shapes, and config.json must agree
    with it. Supported are three to five resolutions with LDM's widths, two ResBlocks each, attention in the
    middle, any width and number of latent channels, and both quant convs or none. Half precision is widened
    exactly.

    The second value is a dict of plain types: path (of the weights), sha256, names (their generation), dtypes
    (as stored), config (config.json) and latents (its scaling, for model.LatentScaling.of). The last two are
    None for a bare file.

    Raises a one-line ValueError if something is missing, damaged or of another architecture.
    """
    path, declared = find_files(Path(path))
    entries = autoencoder_entries(read_header(path))
    config = infer_config({key: entry.shape for key, entry in entries.items()}, path)
    latents = None
    if declared is not None:
        check_declared(declared, config, path.parent / "config.json")
        latents = declared_latents(declared, path.parent / "config.json")
    names = find_names(entries)
    model = fill(
        config,
        lambda name: their_keys(name, names, config.levels),
        {key: entry.shape for key, entry in entries.items()},
        lambda: read_tensors(path, entries),
        path,
    )
    dtypes = (entry.dtype for entry in entries.values())
    return model, describe(path, names, dtypes, declared) | {"latents": latents}


def find_files(path: Path) -> tuple[Path, dict | None]:
    """The weight file for a path, and the content of config.json if the path is a folder."""
    if not path.is_dir():
        return path, None
    folder = path / "vae" if (path / "vae").is_dir() else path
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"no {' or '.join(WEIGHT_FILES)} in {folder}: only safetensors files are read")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"no config.json in {folder}: give {weights} itself to load without it")
    return weights, read_config(config)


def read_config(path: Path) -> dict:
    """The content of a config.json; ValueError unless it is a JSON object."""
    try:
        declared = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(declared, dict):
        raise ValueError(f"{path} is not a JSON object")
    return declared


def autoencoder_entries(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The autoencoder's tensors by name without prefix, without the rest of a pipeline and LDM's extras."""
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
        entries = inside or entries
    return {key: entry for key, entry in entries.items() if not key.startswith(EXTRAS)}


def infer_config(shapes: dict[str, tuple[int, ...]], path: Path) -> AutoencoderConfig:
    """Infer the configuration of an AutoencoderKL from its shapes; ValueError for any other network."""
    keys = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    for key in keys:
        if len(shapes.get(key, ())) != 4:
            found = ", ".join(list(shapes)[:3]) or "nothing"
            raise ValueError(f"{path} is not an AutoencoderKL: no convolution {key}; it begins with {found}")
    (width, channels), (_, latents), (_, decoder_width) = (shapes[key][:2] for key in keys)
    downs = {m[1] for m in (re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key) for key in shapes) if m}
    levels = len(downs) - 1
    if levels not in PYRAMID_MULT or width % 32 or not width or decoder_width != width:
        raise ValueError(
            f"{path} has widths {width} and {decoder_width} and {len(downs)} resolutions: "
            "this architecture needs equal widths, a multiple of 32, and 3, 4 or 5 resolutions"
        )
    return AutoencoderConfig(
        encoder="sd",
        in_channels=channels,
        latent_channels=latents,
        levels=levels,
        sd_channels=width,
        decoder_channels=decoder_width,
        decoder_norm="group",
        decoder_attention=True,
        conv1x1="quant_conv.weight" in shapes or "post_quant_conv.weight" in shapes,
    )


def check_declared(declared: dict, config: AutoencoderConfig, path: Path) -> None:
    """ValueError if config.json disagrees with the architecture that the weights have."""
    expected = {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.sd_channels * m for m in config.pyramid_mult],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
    }
    for key, value in expected.items():
        if declared.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {declared[key]!r}, weights and architecture say {value!r}")


def declared_latents(declared: dict, path: Path) -> dict[str, float]:
    """config.json's scaling of the latents, the argument of model.LatentScaling.of."""
    scale = declared.get("scaling_factor", 0.18215)      # diffusers' default; the oldest files lack the key
    shift = declared.get("shift_factor") or 0.0
    if not all(isinstance(value, int | float) for value in (scale, shift)):
        raise ValueError(f"{path}: scaling_factor and shift_factor must be numbers, got {scale!r}, {shift!r}")
    return {"scaling_factor": float(scale), "shift_factor": float(shift)}


# ----------------------------------------------------------------------------
# open-LiteVAE


def load_open_litevae(path: str | Path) -> tuple[Autoencoder, dict]:
    """Load a checkpoint of open-LiteVAE as our Autoencoder (fp32, eval mode), and its origin.

    path: a torch.save file, either Lightning's (weights under "state_dict") or a bare dict of tensors; loss.*
    and *_ema.* keys are ignored. The scale (S, B, M or L), the number of latent channels (any) and the
    decoder width (any) are inferred from the shapes. The second value is as in load_diffusers, with names
    "open-LiteVAE" and config None.

    Raises a one-line ValueError if the file is missing or damaged, needs code execution, or does not fit.
    """
    path = Path(path)
    tensors = {key: tensor for key, tensor in read_pickle(path).items() if not beside(key)}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = open_litevae_config(shapes, path)
    model = fill(config, open_litevae_keys, shapes, lambda: tensors, path)
    dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return model, describe(path, "open-LiteVAE", dtypes, None)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a torch.save file by name, without executing code."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # damaged bytes make the unpickler raise almost any exception
        reason = str(error).split("\n")[0].split(". ")[0][:120]
        raise ValueError(f"{path} is damaged, or would execute code, which is refused ({reason})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights: neither a dict of tensors nor one under 'state_dict'")
    return state


def beside(key: str) -> bool:
    """Whether a tensor is not part of the model itself: networks of the losses and moving averages."""
    part = key.split(".")[0]
    return part == "loss" or part.endswith("_ema")


def open_litevae_keys(name: str) -> list[str]:
    """The same names as ours, except for the 1x1 convolutions beside a ResBlock."""
    return [name.replace(".skip.", ".residual_conv." if name.startswith("encoder.") else ".nin_shortcut.")]


def open_litevae_config(shapes: dict[str, tuple[int, ...]], path: Path) -> AutoencoderConfig:
    """The preset with the file's extractor and aggregator widths, and its latent and decoder widths."""
    names = ("extractors.0.init_conv", "aggregator.init_conv", "aggregator.conv_out")
    keys = [*(f"encoder.{name}.weight" for name in names), "decoder.conv_out.weight"]
    for key in keys:
        if len(shapes.get(key, ())) != 4:
            found = ", ".join(list(shapes)[:3]) or "nothing"
            raise ValueError(f"{path} is not open-LiteVAE's: no convolution {key}; it begins with {found}")
    extractor, aggregator, moments = (shapes[key][0] for key in keys[:3])
    for config in (PRESETS[f"open-litevae-{scale}"] for scale in "sbml"):
        if (config.extractor_channels, config.aggregator_channels) == (extractor, aggregator):
            decoder = shapes[keys[3]][1]
            return replace(config, latent_channels=moments // 2, decoder_channels=decoder)
    widths = f"{extractor} and {aggregator}"
    raise ValueError(f"{path} has extractor and aggregator widths {widths}, unlike S, B, M and L")


# ----------------------------------------------------------------------------
# anything that maps images to images


class Reconstructor(nn.Module):
    """Wrap a function of images for metrics.evaluate: x -> (recon, None).

    x: (B, 3, H, W) float in [-1, 1] -> recon of the same shape, floats on the same scale. Raises ValueError
    for any other return value. The function receives x on the caller's device and in the caller's dtype, and
    provides no latent. If it is an nn.Module, eval() and to() apply to it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        recon = self.function(x)
        if not isinstance(recon, Tensor):
            raise ValueError(f"{self.name} returned {type(recon).__name__}: expected one tensor of images")
        if recon.shape != x.shape or not recon.is_floating_point():
            raise ValueError(
                f"{self.name} returned {recon.dtype} {tuple(recon.shape)} for images {tuple(x.shape)}: "
                "expected floats in [-1, 1] of the same shape"
            )
        return recon, None


def load_callable(spec: str) -> Reconstructor:
    """Import the user's `module:name` from the current directory for metrics.evaluate, in eval mode.

    name: any callable, a function or an nn.Module instance, that maps (B, 3, H, W) in [-1, 1] to the same.
    This runs the user's code, and the current directory stays on sys.path. Raises a one-line ValueError if
    the module or the name does not exist, if the import fails, or if the name is not callable. Wrong outputs
    raise when the result is called.
    """
    module_name, _, name = spec.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name) or not name.isidentifier():
        raise ValueError(f"expected module:callable, for example mymodel:reconstruct, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # by default, Python searches the script's folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:           # the user's file may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        reason = f"no such module in {os.getcwd()}" if missing else reason
        raise ValueError(f"cannot import {module_name}: {reason}") from error
    if not hasattr(module, name):
        raise ValueError(f"{module_name} ({getattr(module, '__file__', 'built in')}) has no {name}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{spec} is not callable, but of type {type(function).__name__}")
    return Reconstructor(function, spec).eval()
