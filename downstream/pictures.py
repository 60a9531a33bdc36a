"""Pictures of any size to latents and back, and their files.

A picture is padded by reflection, on the right and below, to multiples of the downsample factor; the decoded
one is cropped back. A latent file is a dict for torch.load(weights_only=True): z (Z, h, w) fp32, size [H, W]
of the picture, and scaling, what z was scaled by ("none", "scalar" or "channel"). Existing files are only
overwritten on request, and files appear whole or not at all.

C image channels, Z latent channels, H W pixels, f downsample factor, h w latent size.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
from downstream.tiling import decode_tiles, encode_tiled
from evaluation.metrics import to_uint8
from model import Autoencoder
from runtime import files, sources

# ----------------------------------------------------------------------------
# tensors


def pad(pixels: Tensor, f: int) -> Tensor:
    """Reflect uint8 (C, H, W) to multiples of f, at least 2f: a group norm needs more than one latent."""
    sides = (max(2 * f, -(-side // f) * f) for side in pixels.shape[-2:])
    margins = [(0, padded - side) for padded, side in zip(sides, pixels.shape[-2:], strict=True)]
    return torch.from_numpy(np.pad(pixels.numpy(), [(0, 0), *margins], mode="reflect"))


@torch.no_grad()
def encode(model: Autoencoder, pixels: Tensor, tile: int, device: torch.device) -> Tensor:
    """uint8 (C, H, W) -> posterior mean (1, Z, h, w) of the padded picture.

    tile: approximately, in tiles of that many pixels with a quarter of overlap; 0: as a whole.
    """
    f = model.config.downsample_factor
    x = data.to_float(pad(pixels, f))[None]
    if not tile:
        return model.encode(x.to(device)).mean
    return encode_tiled(model, x, tile, max(f, tile // 4 // f * f)).mean


@torch.no_grad()
def decode(model: Autoencoder, z: Tensor, tile: int, device: torch.device) -> Tensor:
    """Latent (1, Z, h, w) -> uint8 (C, f h, f w), in exact tiles of that many latents; 0: as a whole."""
    if not tile:
        return to_uint8(model.decode(z.to(device)))[0].cpu()
    f = model.config.downsample_factor
    picture = torch.empty(model.config.in_channels, f * z.shape[-2], f * z.shape[-1], dtype=torch.uint8)
    for rows, columns, pixels in decode_tiles(model, z, tile):
        picture[:, rows, columns] = to_uint8(pixels)[0].cpu()
    return picture


# ----------------------------------------------------------------------------
# pictures


def open_pictures(spec: str) -> sources.FileSource:
    """A picture, a folder or an archive; ValueError if there is nothing to read."""
    source = sources.open_source(spec)
    if not isinstance(source, sources.FileSource):
        raise ValueError(f"INPUT must be a picture, a folder or an archive, got {spec}")
    if len(source) == 1:
        try:
            source.read(0, 0)
        except sources.BrokenImage as error:
            raise ValueError(f"{source.path(0)}: {error}") from error
    return source


def read(source: sources.FileSource, paths: Sequence[Path], channels: int
         ) -> Iterator[tuple[str, Path, Tensor]]:
    """Yield (name, the path of its output, uint8 (C, H, W)); broken pictures are reported and left out."""
    for i, path in enumerate(tqdm(paths, unit="img", disable=len(paths) == 1, dynamic_ncols=True)):
        try:
            picture = source.read(i, 0)
        except sources.BrokenImage as error:
            tqdm.write(f"broken image: {source.path(i)}: {error}", file=sys.stderr)
        else:
            yield source.name(i), path, data.to_tensor(picture, channels)


def write(path: Path, picture: Image.Image) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        picture.save(file, "PNG")


# ----------------------------------------------------------------------------
# latents


class Latents(NamedTuple):
    """What a latent file holds."""

    z: Tensor                 # (N, Z, h, w), fp32
    size: list[int]           # [H, W] of the picture
    scaling: str | None       # None: the file does not say


def write_latent(path: Path, z: Tensor, size: Sequence[int], scaling: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        torch.save({"z": z, "size": list(size), "scaling": scaling}, file)


def read_latents(path: Path, model: Autoencoder) -> Latents:
    """Read what `write_latent` wrote, or a bare tensor (Z, h, w) or (N, Z, h, w) of torch.save.

    Raises ValueError if the file is missing, damaged, or has no latents of this model.
    """
    if not path.is_file():
        raise ValueError(f"no latent file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # damaged bytes make the unpickler raise almost any exception
        raise ValueError(f"{path} is damaged or not a file of torch.save ({type(error).__name__})") from error
    content = content if isinstance(content, dict) else {"z": content}
    z, channels, f = content.get("z"), model.config.latent_channels, model.config.downsample_factor
    is_latent = isinstance(z, Tensor) and z.is_floating_point() and z.ndim in (3, 4) and z.numel()
    if not is_latent or z.shape[-3] != channels:
        found = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else f"z = {type(z).__name__}"
        raise ValueError(f"{path} must have floats of shape ({channels}, h, w) or (N, {channels}, h, w), the "
                         f"latents of this model, but has {found}")
    z = z.float().reshape(-1, *z.shape[-3:])
    if not z.isfinite().all():
        raise ValueError(f"{path} has latents that are NaN or infinite")
    return Latents(z, content.get("size", [f * z.shape[-2], f * z.shape[-1]]), content.get("scaling"))


# ----------------------------------------------------------------------------
# where the outputs go


def targets(names: Sequence[str], out: str, suffix: str, force: bool) -> list[Path]:
    """The output file for each name.

    One name goes to `out` itself if that ends in `suffix`, else names go into the folder `out`. Raises
    ValueError if a file exists (unless `force`), if two names have one file, or if it lies outside of `out`.
    """
    folder = Path(out)
    if folder.suffix.lower() in (".pt", *sources.EXTENSIONS):
        if folder.suffix != suffix or len(names) > 1:
            raise ValueError(f"--out {out} must end in {suffix}, or be a folder if there are several files; "
                             f"there are {len(names)}")
        paths = [folder]
    else:
        paths = [folder / Path(name).with_suffix(suffix) for name in names]
    owners: dict[Path, str] = {}
    for name, path in zip(names, paths, strict=True):
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{name!r} would be written outside of {out}")
        if path in owners:
            raise ValueError(f"{owners[path]} and {name} would both become {path}: rename one of them")
        if path.exists() and not force:
            raise ValueError(f"{path} exists: choose another --out, or overwrite it with --force")
        owners[path] = name
    return paths
