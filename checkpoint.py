"""Checkpoints, and how a run starts from one.

A checkpoint is a dict of plain types and tensors, written so that a crash never leaves a partial file:

    step, config (variants.config.AutoencoderConfig as a dict), args (the flags), versions, git, data, parent,
    model, ema, disc, lecam, opt, opt_muon, opt_disc
    latents (only after `latents.py stats`: statistics, the arguments of model.LatentScaling.of)

`torch.load(path, weights_only=True)` reads it. `load_model` rebuilds the network from the stored config, so
architecture flags are not needed again. An inference file has only the first line, ema (or model)
and latents.
"""

import argparse
import os
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from model import Autoencoder
from runtime import files, sources
from runtime.distributed import print0
from variants.build import build
from variants.config import AutoencoderConfig

SHIPPED = Path(__file__).parent / "weights/litevae-tiny.pt"


def save(folder: Path, state: dict, keep: int) -> None:
    """Write folder/ckpt.pt (on rank 0 only) and keep the `keep` previous ones as ckpt-<step>.pt.

    ckpt.pt and the newest ckpt-<step>.pt are one file under two names, or two files where the file system has
    no hard links. Raises OSError if the disk is full; the older files are then unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ckpt.pt"
    if keep == 0:
        return write(path, state)
    numbered, newest = folder / f"ckpt-{state['step']:08d}.pt", folder / "newest.tmp"
    write(numbered, state)
    newest.unlink(missing_ok=True)
    try:
        os.link(numbered, newest)                         # a hard link: two names, one file on disk
    except OSError:                                       # buckets and many FUSE and network mounts have none
        write(path, state)
    else:
        os.replace(newest, path)
    written = sorted(numbered_files(folder), key=lambda path: path.stat().st_mtime)
    for old in written[: -keep - 1]:                      # the newest has the step of ckpt.pt
        old.unlink()


def save_weights(path: Path, state: dict) -> None:
    """Write the small inference file: only the averaged weights, or the raw ones if there is no average."""
    write(path, inference_state(state))


def inference_state(state: dict, raw: bool = False, dtype: torch.dtype | None = None) -> dict:
    """What an inference file holds of a checkpoint: one set of weights, in `dtype` unless it is None."""
    parts = ("model", "ema", "disc", "lecam", "opt", "opt_muon", "opt_disc")
    about = {name: value for name, value in state.items() if name not in parts}
    name = "model" if raw or state.get("ema") is None else "ema"
    return about | {name: {key: tensor.to(dtype) for key, tensor in state[name].items()}}


def write(path: Path, state: dict) -> None:
    """Atomic torch.save; raises OSError if the disk is full."""
    with files.whole(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:                     # torch's report of a failed write
            raise OSError(error.__context__ or error) from error


def numbered_files(folder: Path) -> list[Path]:
    """All ckpt-<step>.pt of a folder, sorted by step; files with other names are ignored."""
    return sorted(folder.glob("ckpt-" + 8 * "[0-9]" + ".pt"))


def load(path: str | Path) -> dict:
    """Load a checkpoint onto the CPU. Raises a one-line ValueError if it is missing, damaged or not ours."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name its checkpoint, e.g. {path}/ckpt.pt")
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is not a checkpoint of train.py: name the ckpt.pt that was exported")
    try:
        with zipfile.ZipFile(path) as archive:            # torch.load does not check CRCs
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} fails its CRC check")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # damaged bytes make the unpickler raise almost any exception
        reason = str(error).split("\n")[0].split(". ")[0][:120]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use an older one") from error
    known = isinstance(state, dict) and {"step", "config", "args"} <= state.keys()
    if not known or not {"model", "ema"} & state.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py: step, config, args or weights are missing")
    return state


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that loads, and one line about each newer one that does not.

    (None, []) if there are no checkpoints; raises ValueError if there are some but none loads.
    """
    damaged: list[str] = []
    for path in candidates(folder):
        try:
            load(path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    if damaged:
        raise ValueError(f"{damaged[0]}, but no checkpoint in {folder} loads: choose another --out")
    return None, []


def candidates(folder: Path) -> Iterator[Path]:
    """Yield ckpt.pt, then the numbered checkpoints from newest to oldest, except ckpt.pt's second name.

    A second copy of ckpt.pt is a file of its own, which may be whole if ckpt.pt is damaged, and is yielded.
    """
    path = folder / "ckpt.pt"
    if path.exists():
        yield path
    for numbered in reversed(numbered_files(folder)):
        if not path.exists() or not numbered.samefile(path):
            yield numbered


def load_model(path: str | Path | None = None, raw: bool = False) -> tuple[Autoencoder, dict]:
    """Load the autoencoder of a checkpoint, in eval mode, and the checkpoint itself.

    Without a path it is the small model in weights/, and a line on stdout says so. Uses the EMA weights if
    the checkpoint has them, unless `raw`. Raises ValueError like `load`, and if `raw` is set but the file
    has only averaged weights.
    """
    if path is None:
        path = SHIPPED
        print0("no checkpoint is named: loading weights/litevae-tiny.pt")
    state = load(path)
    model = build(to_config(state, path))
    if raw and "model" not in state:
        raise ValueError(f"{path} has only averaged weights: --raw needs a ckpt.pt")
    weights = state["model"] if raw or state.get("ema") is None else state["ema"]
    load_weights(model, weights, path)
    return model.eval(), state


def to_config(state: dict, path: str | Path) -> AutoencoderConfig:
    """The configuration in a checkpoint; ValueError if it has a field that this version does not know."""
    retired = ("scale_factor", "shift_factor")            # of older checkpoints, where nothing applied them
    fields = {name: value for name, value in state["config"].items() if name not in retired}
    try:
        return AutoencoderConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{path} has a configuration this version does not know: {error}") from error


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Strict load; raises ValueError with the first difference instead of torch's full list of keys."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in [*own, *weights]:
        ours, theirs = own.get(name), getattr(weights.get(name), "shape", None)
        if ours != theirs:
            raise ValueError(f"{path} does not fit: {name} is {show(theirs)} there, but {show(ours)} here")
    module.load_state_dict(weights)


def show(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def check_config(state: dict, config: AutoencoderConfig, path: str | Path) -> None:
    """Raise ValueError with the first difference unless the checkpoint has the architecture of `config`."""
    saved, wanted = asdict(to_config(state, path)), asdict(config)
    for name in wanted:
        if saved[name] != wanted[name]:
            raise ValueError(
                f"{path} was trained with {name}={saved[name]}, the flags ask for {wanted[name]}: "
                f"use the same architecture flags, or start afresh in another --out"
            )


def git_hash() -> str | None:
    """The commit hash of this repository, with a + if files have been changed; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


# ----------------------------------------------------------------------------
# how a run starts: afresh, where it stopped, or from an earlier phase

def find_start(args: argparse.Namespace, out: Path) -> tuple[str, Path | None]:
    """What to start from: ("resume" or "init", checkpoint) or ("", None); ValueError if --out is taken."""
    taken = next(candidates(out), None)
    if args.resume and args.resume != "latest":
        path = Path(args.resume)
        if taken and path.resolve().parent != out.resolve():
            raise ValueError(f"{out} already holds another run than {path}: choose another --out")
        return "resume", path
    if args.resume and taken:
        path, damaged = newest(out)
        for line in damaged:
            print0(f"note: {line}")
        return "resume", path
    if taken:
        raise ValueError(f"{out} already holds a run: go on with --resume, or choose another --out")
    if args.resume:
        print0(f"resume: nothing saved in {out} yet, starting at step 0")
    return ("init", Path(args.init)) if args.init else ("", None)


BEFORE = {"optimizer": "adam", "lr_scaling": "none"}      # checkpoints from before these flags


def resume(state: dict, path: Path, args: argparse.Namespace, nets: dict, optimizers: dict) -> None:
    """Fill everything from a checkpoint of the same run; flags that do not change the networks may differ."""
    for name in ("disc", "freeze_encoder", "optimizer", "lr_scaling"):
        saved, wanted = (BEFORE | state["args"])[name], getattr(args, name)
        if saved != wanted:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{path} was trained with {name}={saved}, the flags ask for {wanted}: "
                             f"set {flag} as it was, or start a new phase with --init")
    if "opt" not in state:
        raise ValueError(f"{path} has weights alone: start a new phase from it with --init")
    check_batch(state["args"], path, args)
    for name, now in vars(args).items():
        before = state["args"].get(name)
        if before != now and name not in ("resume", "init"):
            print0(f"resume: --{name.replace('_', '-')} was {before} and is now {now}")
    for name, net in nets.items():
        # a run may gain an EMA, which then starts from the weights, or LeCam
        weights = state[name] or (state["model"] if name == "ema" else None)
        if net and weights:
            load_weights(net, weights, path)
    for name, optimizer in optimizers.items():
        if optimizer:
            load_optimizer(optimizer, state[name], path)
            for p, slot in optimizer.state.items():       # fused Adam wants the strides of the parameter
                slot |= {key: torch.empty_like(p).copy_(t) for key, t in slot.items() if t.shape == p.shape}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """load_state_dict; ValueError with the way out if the parameters are grouped in another way."""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as e:                               # --lr-scaling groups them by its factors
        raise ValueError(f"{path} has other groups of parameters ({e}). It was written by another version: "
                         "resume with that version, or start a new phase with --init") from None


def check_batch(saved: dict, path: Path, args: argparse.Namespace) -> None:
    """ValueError if a resumed run would go on with another global batch, unless --allow-batch-change."""
    if args.allow_batch_change:
        return
    if "accumulate" in saved:                             # from before --batch-size meant all processes
        raise ValueError(f"{path} was trained with {saved['batch_size']} x {saved['accumulate']} images in "
                         "each process: set --batch-size to that times its processes, with "
                         "--allow-batch-change")
    if saved["batch_size"] != args.batch_size:
        raise ValueError(f"{path} was trained with --batch-size {saved['batch_size']}, not "
                         f"{args.batch_size}: set it as it was, or give --allow-batch-change")


def init(state: dict, path: Path, args: argparse.Namespace, nets: dict) -> None:
    """Fill the networks from a checkpoint of an earlier phase, or from a file of averaged weights alone.

    With a frozen encoder both go on from the average, so that the latents stay those of the parent.
    """
    average = state.get("ema") or state["model"]
    weights = {"model": average if args.freeze_encoder else state.get("model") or average, "ema": average}
    for name in weights:
        if nets[name]:
            load_weights(nets[name], weights[name], path)
    if nets["disc"] and state.get("disc") and state["args"]["disc"] == args.disc:
        load_weights(nets["disc"], state["disc"], path)
        if nets["lecam"] and state["lecam"]:
            load_weights(nets["lecam"], state["lecam"], path)
    elif nets["disc"]:
        print0(f"init: the discriminator {args.disc} starts afresh, {path} has none of its kind")


def provenance(how: str, state: dict | None, path: Path | None, source: sources.Source) -> dict:
    """Where a checkpoint comes from: code, data, and the phase before it, with its own provenance."""
    parent = state.get("parent") if state else None
    if how == "init":
        about = {name: state.get(name) for name in ("step", "args", "versions", "git", "data", "parent")}
        parent = {"path": str(path), **about}
    versions = {"torch": str(torch.__version__), "numpy": np.__version__}
    return {"versions": versions, "git": git_hash(), "data": sources.summary(source),
            "parent": parent}
