"""The model that eval.py scores and analyze.py analyses: its flags, and how it is opened.

It is a checkpoint of train.py or open-LiteVAE, an AutoencoderKL of diffusers, or any function of images.
"""

import argparse
from dataclasses import asdict

import torch
from torch import nn

import checkpoint
from model import Autoencoder
from runtime import weights
from variants import foreign


def add_flags(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """otherwise: what is used if no model is named."""
    add = parser.add_argument
    add("ckpt", metavar="CKPT", nargs="?", help=f"checkpoint from train.py (default: {otherwise})")
    add("--raw", action="store_true", help="use the raw weights, not their moving average")
    add("--diffusers", metavar="PATH", help="use an AutoencoderKL instead: a folder or a .safetensors file")
    add("--open-litevae", metavar="FILE", help="use an open-LiteVAE checkpoint instead")
    add("--model", metavar="MODULE:NAME",
        help="use a callable importable from here instead; images are (B, 3, H, W) in [-1, 1]")


def named(args: argparse.Namespace) -> list[str]:
    """The models that the flags name."""
    return [name for name in (args.ckpt, args.diffusers, args.open_litevae, args.model) if name is not None]


def open_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Returns the network that the flags name, in eval mode on the CPU, and a report's entries about it."""
    if args.ckpt:
        return open_checkpoint(args.ckpt, args.raw)
    if args.raw:
        raise ValueError("--raw needs a checkpoint from train.py; other models have only one set of weights")
    name = args.diffusers or args.open_litevae or args.model
    about = {"checkpoint": name, "step": None, "weights": "its own"}
    if args.model:
        return foreign.load_callable(name), about
    load = foreign.load_diffusers if args.diffusers else foreign.load_open_litevae
    model, source = load(name)
    about |= {"checkpoint_sha256": source["sha256"], "config": asdict(model.config), "source": source}
    return model, about


def open_checkpoint(path: str, raw: bool) -> tuple[Autoencoder, dict]:
    model, state = checkpoint.load_model(path, raw=raw)
    training = {key: state[key] for key in ("args", "versions", "git", "data") if key in state}
    return model, {
        "checkpoint": path,
        "checkpoint_sha256": weights.sha256(path),
        "step": state["step"],
        "weights": "raw" if raw or not state.get("ema") else "EMA",
        "config": state["config"],
        "training": training,
    }


def exact_fp32(device: torch.device) -> None:
    """Turns TF32 off, so that scores do not depend on the GPU."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"


def check_res(res: int, model: nn.Module, flag: str = "--res") -> int:
    """Returns the number of image channels; ValueError if the model or SSIM does not support this side."""
    config = model.config if isinstance(model, Autoencoder) else None
    if config and res % config.downsample_factor:
        raise ValueError(f"{flag} {res} is not a multiple of {config.downsample_factor}")
    if config and config.resolution not in (0, res):
        raise ValueError(f"{flag} {res}: the ViT of this model only takes {config.resolution}")
    if res < 16:
        raise ValueError(f"{flag} {res} is below 16, the minimum for SSIM")
    return config.in_channels if config else 3
