"""Checkpoints: one dict of plain types and tensors, written so that a crash never leaves half a file.

    step, config (model.AutoencoderConfig as a dict), args (the flags), model, ema, disc, opt, opt_disc,
    versions

`torch.load(path, weights_only=True)` reads it. `load_model` rebuilds the network from the config inside, so
nobody repeats architecture flags.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from model import Autoencoder, AutoencoderConfig


def save(folder: Path, state: dict, keep: int) -> None:
    """Write folder/ckpt.pt (rank 0 calls this); `keep` older ones stay beside it as ckpt-<step>.pt.

    The file is written under a temporary name, flushed to disk and renamed, so ckpt.pt is always a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / "ckpt.pt", folder / "ckpt.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 0:
            numbered = folder / f"ckpt-{state['step']:08d}.pt"
            numbered.unlink(missing_ok=True)
            os.link(temporary, numbered)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if keep > 0:
        numbered = sorted(folder.glob("ckpt-" + 8 * "[0-9]" + ".pt"), key=lambda path: path.stat().st_mtime)
        for old in numbered[: -keep - 1]:                 # the newest is ckpt.pt under a second name
            old.unlink()


def load(path: str | Path) -> dict:
    """A checkpoint, on the CPU. Raises ValueError in one line if it is missing, damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # on damaged bytes the unpickler raises nearly every type
        reason = str(error).split("\n")[0].split(". ")[0][:120]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}): use an older one") from error
    if not isinstance(state, dict) or not {"step", "config", "args", "model"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py: step, config, args or model is missing")
    return state


def load_model(path: str | Path, raw: bool = False) -> tuple[Autoencoder, dict]:
    """The autoencoder of a checkpoint, in eval mode, and the checkpoint itself.

    EMA weights where the checkpoint has them, unless `raw`. Raises ValueError as `load` does.
    """
    state = load(path)
    model = Autoencoder(to_config(state, path))
    weights = state["model"] if raw or state.get("ema") is None else state["ema"]
    load_weights(model, weights, path)
    return model.eval(), state


def to_config(state: dict, path: str | Path) -> AutoencoderConfig:
    try:
        return AutoencoderConfig(**state["config"])
    except TypeError as error:
        raise ValueError(f"{path} has a configuration this version does not know: {error}") from error


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Strict load; ValueError with the first difference instead of torch's page of key names."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in [*own, *weights]:
        ours, theirs = own.get(name), getattr(weights.get(name), "shape", None)
        if ours != theirs:
            raise ValueError(f"{path} does not fit: {name} is {show(theirs)} there and {show(ours)} here")
    module.load_state_dict(weights)


def show(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def check_config(state: dict, config: AutoencoderConfig, path: str | Path) -> None:
    """ValueError, naming the first difference, unless the checkpoint has the architecture of `config`."""
    saved, wanted = asdict(to_config(state, path)), asdict(config)
    for name in wanted:
        if saved[name] != wanted[name] and name not in ("scale_factor", "shift_factor"):
            raise ValueError(
                f"{path} was trained with {name}={saved[name]}, the flags ask for {wanted[name]}: "
                f"use the same architecture flags, or start afresh in another --out"
            )
