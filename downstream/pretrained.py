"""A trained autoencoder for other people's code: a folder to share, and the interface of diffusers.

    vae = PretrainedAutoencoder.from_checkpoint("out/demo/ckpt.pt")     # a checkpoint of train.py
    vae.save_pretrained("shared/demo")                                  # config.json and model.safetensors
    vae = PretrainedAutoencoder.from_pretrained("shared/demo")

The object has the methods, properties and configuration of diffusers' AutoencoderKL that pipelines and
training scripts use, so it can take the place of a pipeline's `vae`. diffusers itself is not needed.

config.json holds the architecture (variants.config.AutoencoderConfig), the statistics of the latents as
stored in the checkpoint (null if they have not been measured), and the origin of the weights. What differs
from a folder of diffusers: the weights are in model.safetensors under our own names.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from checkpoint import load_model, load_weights, to_config
from model import Autoencoder, Posterior
from runtime.weights import sha256
from variants.build import build
from variants.config import AutoencoderConfig
from variants.foreign import read_config, read_header, read_tensors
from variants.quantize import Quantized

CONFIG, WEIGHTS = "config.json", "model.safetensors"

# ------------------------------------------------------------------------------------------------------------
# diffusers' interface: what encode, decode and config give


@dataclass(frozen=True)
class DiffusersConfig:
    """The fields of AutoencoderKL's configuration that diffusers' image pipelines read."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]        # of the decoder; the downsample factor is 2 ** (length - 1)
    scaling_factor: float                      # diffusion latents are (z - shift_factor) * scaling_factor
    shift_factor: float
    # None even if they are known: pipelines that find them apply them in addition to scaling_factor
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = False                 # True would make pipelines decode in fp32


class LatentDistribution:
    """q(z|x) with the methods of diffusers' DiagonalGaussianDistribution; tensors (B, Z, h, w) in `dtype`.

    A codebook gives one code without any spread: mode and samples are that code, and std and logvar raise
    AttributeError.
    """

    def __init__(self, posterior: Posterior | Quantized, dtype: torch.dtype) -> None:
        self.posterior, self.dtype = posterior, dtype

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, with noise drawn on the generator's device, like diffusers' randn_tensor."""
        mean = self.posterior.mean
        device = generator.device if generator else mean.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=self.dtype)
        return self.posterior.sample(noise.to(mean.device)).to(self.dtype)

    def mode(self) -> Tensor:
        return self.mean

    @property
    def mean(self) -> Tensor:
        return self.posterior.mean.to(self.dtype)

    @property
    def logvar(self) -> Tensor:
        if isinstance(self.posterior, Quantized):
            raise AttributeError("this model has a codebook: its latents have a mode, but no variance")
        return self.posterior.logvar.to(self.dtype)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)


# diffusers returns an object, or with return_dict=False a tuple; a named tuple is both
class EncoderOutput(NamedTuple):
    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    sample: Tensor


# ------------------------------------------------------------------------------------------------------------
# the autoencoder


class PretrainedAutoencoder(nn.Module):
    """Our model with diffusers' interface. Images are (B, C, H, W) in [-1, 1], latents (B, Z, h, w).

    As in diffusers, encode and decode do not scale latents: the caller multiplies by config.scaling_factor
    and divides by it. Inputs are converted to the dtype of the weights, and outputs have that dtype.

    It starts in eval mode. latents: the statistics of a checkpoint, or None; scaling_factor and shift_factor
    are then 1 and 0. origin: where the weights come from, in plain types, to be kept in config.json.
    """

    def __init__(self, model: Autoencoder, latents: dict | None = None, origin: dict | None = None) -> None:
        super().__init__()
        self.model, self.latents, self.origin = model, latents, origin
        self.config = diffusers_config(model, latents or {})
        self.eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, raw: bool = False) -> "PretrainedAutoencoder":
        """The model of a checkpoint of train.py, in eval mode; ValueError as in checkpoint.load_model."""
        model, state = load_model(path, raw)
        origin = {name: state.get(name) for name in ("step", "git", "versions")}
        origin |= {"weights": "raw" if raw or state.get("ema") is None else "EMA", "sha256": sha256(path)}
        return cls(model, state.get("latents"), origin)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, subfolder: str = "", torch_dtype: torch.dtype | None = None,
        revision: str | None = None, variant: str | None = None,
    ) -> "PretrainedAutoencoder":  # fmt: skip
        """The model of a folder written by `save_pretrained`, in eval mode, on the CPU.

        revision and variant name files on a hub; they are accepted as None, as most scripts pass them. Raises
        a one-line ValueError for any other value, and if a file is missing, damaged or of another kind.
        """
        if revision or variant:
            raise ValueError(f"revision and variant belong to a hub, and this reads a local folder: got "
                             f"{revision or variant!r}")
        folder = Path(path) / subfolder
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"no {name} in {folder}: expected a folder written by export.py")
        declared = read_config(folder / CONFIG)
        if not isinstance(declared.get("architecture"), dict):
            raise ValueError(f"{folder / CONFIG} has no architecture: it was not written by export.py")
        model = build(read_architecture(declared["architecture"], folder / CONFIG))
        load_weights(model, read_tensors(folder / WEIGHTS, read_header(folder / WEIGHTS)), folder / WEIGHTS)
        check_latents(declared.get("latents"), folder / CONFIG)
        return cls(model, declared.get("latents"), declared.get("origin")).to(dtype=torch_dtype)

    def about(self) -> dict:
        """The content of config.json."""
        return {"architecture": asdict(self.model.config), "latents": self.latents, "origin": self.origin}

    def save_pretrained(self, folder: str | Path, force: bool = False) -> None:
        """Write config.json and model.safetensors; ValueError if one of them exists, unless `force`.

        If writing fails (OSError, a full disk), nothing is written and older files stay.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
        config = f"{json.dumps(self.about(), indent=2)}\n".encode()
        write_files(Path(folder), {WEIGHTS: weights, CONFIG: config}, force)

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """encode(x).latent_dist, or encode(x, return_dict=False)[0]. Raises ValueError like Autoencoder."""
        return EncoderOutput(LatentDistribution(self.model.encode(x.to(self.dtype)), self.dtype))

    def decode(self, z: Tensor, return_dict: bool = True, generator: None = None) -> DecoderOutput:
        """decode(z).sample, or decode(z, return_dict=False)[0]: images, not clamped."""
        return DecoderOutput(self.model.decode(z.to(self.dtype)).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def diffusers_config(model: Autoencoder, latents: dict) -> DiffusersConfig:
    config = model.config
    return DiffusersConfig(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.decoder_channels * m for m in config.pyramid_mult),
        scaling_factor=latents.get("scaling_factor", 1.0),
        shift_factor=latents.get("shift_factor", 0.0),
    )


# ------------------------------------------------------------------------------------------------------------
# files


def read_architecture(declared: dict, path: Path) -> AutoencoderConfig:
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in declared.items()}
    return to_config({"config": plain}, path)              # JSON has no tuples


def check_latents(latents, path: Path) -> None:
    """Raise ValueError unless the statistics are null, or have a positive scale and a finite shift."""
    if latents is None:
        return
    names = ("scaling_factor", "shift_factor")
    scale, shift = (latents.get(name) for name in names) if isinstance(latents, dict) else (None, None)
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in (scale, shift))
    if not numbers or scale <= 0:
        raise ValueError(f"{path}: latents must have a scaling_factor above 0 and a finite shift_factor, "
                         f"got {scale!r} and {shift!r}")


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the folder already has a file with one of these names."""
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise ValueError(f"{folder} already holds {', '.join(taken)}: choose another folder, or give --force")


def write_files(folder: Path, files: dict[str, bytes], force: bool) -> None:
    """Write all files or, if the disk is full (OSError), none; ValueError if one exists, unless `force`."""
    if not force:
        check_free(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f"{name}.tmp" for name in files}
    try:
        for name, path in temporary.items():
            path.write_bytes(files[name])
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
