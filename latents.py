"""Latents for diffusion models: their statistics, a data set of them, and encoding and decoding of pictures.

    python latents.py stats CKPT --data SRC                 # scale and shift of the latents, into CKPT
    python latents.py cache CKPT --data SRC --out DIR       # a data set of latents; also under torchrun
    python latents.py encode CKPT photo.jpg --out z.pt      # or a folder; any size
    python latents.py decode CKPT z.pt --out photo.png      # large ones in tiles that equal the whole
    python latents.py reconstruct CKPT photos --out DIR     # input beside reconstruction, with PSNR

The latent of a picture is the mean of its posterior; `stats` and `cache` are about samples. Pictures are read
as in training: grey and palette become RGB, alpha is composited over white.

Exit codes: 0 done; 1 failed on the way, files already written are whole; 2 rejected before anything was
written. docs/latents.md explains the formats.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
from downstream import cache, pictures
from downstream.tiling import halo
from evaluation import metrics, report
from model import Autoencoder, LatentScaling
from runtime import cli, distributed, sources
from runtime.distributed import print0
from runtime.failures import failures

TILE = 1024     # pixels; ours: larger pictures are decoded in tiles
SCALINGS = ("none", "scalar", "channel")

# ----------------------------------------------------------------------------
# flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     help="its flags: latents.py COMMAND --help")

    add = add_command(commands, "stats", "mean and deviation of sampled latents, into the checkpoint")
    add_data_flags(add)
    add("--count", type=cli.positive, default=10_000, help="images, spread over the source")

    add = add_command(commands, "cache", "a data set as moments of posteriors, see downstream/cache.py")
    add_data_flags(add)
    add("--count", type=cli.positive, help="images, spread over the source (default: all)")
    add("--out", metavar="DIR", required=True, help="folder of the cache; an unfinished one is continued")
    add("--shard-size", type=cli.positive, default=1024, help="images in a file")
    add("--dtype", choices=tuple(cache.DTYPES), default="bf16", help="of the stored moments")

    add = add_command(commands, "encode", "pictures to latent files, the means of their posteriors")
    add_file_flags(add, "a picture, a folder or an archive", "z.pt, or a folder for several pictures")
    add_encode_tile(add)
    add("--scaling", choices=SCALINGS, default="none",
        help="scalar: (z - shift_factor) scaling_factor; channel: (z - latents_mean) / latents_std")

    add = add_command(commands, "decode", "latent files to pictures")
    add_file_flags(add, "a latent file or a folder of them", "picture.png, or a folder for several latents")
    add_tile(add)
    add("--scaling", choices=SCALINGS,
        help="what the latents were scaled by (default: what the file says, else none)")

    add = add_command(commands, "reconstruct", "pictures beside their reconstructions, with PSNR")
    add_file_flags(add, "a picture, a folder or an archive", "pair.png, or a folder for several pictures")
    add_encode_tile(add)
    add_tile(add)
    return parser.parse_args(argv)


def add_command(commands, name: str, text: str):
    add = commands.add_parser(name, help=text, description=text).add_argument
    add("ckpt", metavar="CKPT", help="checkpoint from train.py")
    add("--raw", action="store_true", help="use the raw weights, not their moving average")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return add


def add_data_flags(add) -> None:
    add("--data", metavar="SRC", required=True, help="images, as in train.py")
    add("--res", type=cli.positive, help="side of the centre crops, pixels (default: the checkpoint's)")
    add("--batch-size", type=cli.positive, default=32, help="images that each process encodes at once")
    add("--num-workers", type=cli.natural, default=data.default_workers(),
        help="loader processes of each process; unless given, 4 or the number of cores if smaller")


def add_file_flags(add, what: str, where: str) -> None:
    add("input", metavar="INPUT", help=what)
    add("--out", metavar="PATH", required=True, help=where)
    add("--force", action="store_true", help="overwrite files that exist")


def add_tile(add) -> None:
    add("--tile", type=cli.natural,
        help=f"decode in tiles of N pixels; 0: as a whole (default: {TILE}, or 0 where tiles are not exact)")


def add_encode_tile(add) -> None:
    add("--encode-tile", type=cli.natural, default=0,
        help="encode in tiles of N pixels, approximately; 0: as a whole")


# ----------------------------------------------------------------------------
# data sets: stats and cache


def open_images(args: argparse.Namespace, model: Autoencoder, state: dict) -> data.ValSet:
    """Centre crops of --data at --res; ValueError if the model does not take them."""
    res = args.res or state["args"].get("res")
    if not res:
        raise ValueError(f"{args.ckpt} does not record its resolution: give --res")
    channels = model.config.in_channels
    model.check_size(torch.empty(1, channels, res, res, device="meta"))
    source = distributed.from_main(lambda: sources.open_source(args.data))
    images = data.ValSet(source, res, args.count, channels)
    data.check_readable(images)
    return images


@torch.no_grad()
def latent_sums(model: Autoencoder, batches, device: torch.device) -> Tensor:
    """float64 (3, Z): number, sum and sum of squares of sampled latents in each channel, of all processes.

    batches yields (numbers, uint8 images); a number fixes the noise of its sample.
    """
    sums = torch.zeros(3, model.config.latent_channels, dtype=torch.float64)
    for numbers, images in batches:
        if len(numbers):
            posterior = model.encode(data.to_float(images).to(device))
            noise = metrics.noise(numbers, posterior.mean.shape[1:]).to(device)
            z = posterior.sample(noise).cpu().double()
            powers = torch.ones_like(z), z, z.square()
            sums += torch.stack([power.sum(dim=(0, 2, 3)) for power in powers])
    return sum(distributed.gather(sums))


def statistics(sums: Tensor) -> dict:
    """The entries of LatentScaling.of from `latent_sums`; ValueError if the latents have no finite spread."""
    count, total, squares = sums
    mean, shift = total / count, total.sum() / count.sum()
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    spread = (squares.sum() / count.sum() - shift.square()).clamp(min=0).sqrt().item()
    if not all(0 < value < math.inf for value in (spread, *std.tolist())):
        raise ValueError(f"latents with standard deviations {std.tolist()} cannot be scaled to 1")
    return {"scaling_factor": 1 / spread, "shift_factor": shift.item(),
            "latents_mean": mean.tolist(), "latents_std": std.tolist()}


def stats(args: argparse.Namespace, model: Autoencoder, state: dict, device: torch.device) -> None:
    with cli.user_errors():
        images = open_images(args, model, state)
        loader = data.numbered_loader(images, args.batch_size, args.num_workers, device, distributed.rank(),
                                      distributed.world_size())
        if len(images) < 2:
            raise ValueError(f"statistics need at least 2 images, got {len(images)}")
    if before := state.get("latents"):
        print0(f"replacing the statistics of {before['count']:,} images of {before['data']['spec']}, "
               f"{before['res']} px")
    with failures("the checkpoint is unchanged"):
        bar = tqdm(loader, disable=not distributed.is_main(), dynamic_ncols=True)
        sums = latent_sums(model, data.report_broken(bar, set()), device)
        with cli.user_errors():
            latents = statistics(sums)
        raw = args.raw or state.get("ema") is None
        area = (images.res // model.config.downsample_factor) ** 2
        latents |= {"count": int(sums[0, 0]) // area, "data": sources.summary(images.source),
                    "res": images.res, "weights": "raw" if raw else "ema"}
        if distributed.is_main():
            checkpoint.write(Path(args.ckpt).resolve(), state | {"latents": latents})
    print0(f"{latents['count']:,} images of {args.data}, {images.res} px, {latents['weights']} weights")
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        print0(f"{name:<15} " + " ".join(f"{value:.4f}" for value in np.atleast_1d(latents[name])))
    print0(f"stored in {args.ckpt}")


def cache_latents(args: argparse.Namespace, model: Autoencoder, state: dict, device: torch.device) -> None:
    with cli.user_errors():
        check_gaussian(model, "cache")
        images, folder = open_images(args, model, state), Path(args.out)
        index = cache.describe(model, images, args.shard_size, args.dtype)
        distributed.from_main(lambda: cache.open_folder(folder, index))
    with failures("repeat the command to go on"):
        count = cache.write(model, images, folder, index, args.batch_size, args.num_workers, device)
    print0(f"{count:,} images and their mirror images in {folder}")


def check_gaussian(model: Autoencoder, what: str) -> None:
    if model.config.moment_channels == model.config.latent_channels:
        raise ValueError(f"{what} needs a Gaussian posterior, and this model has a codebook")


# ----------------------------------------------------------------------------
# pictures and latent files: encode, decode, reconstruct


def check_encoder(args: argparse.Namespace, model: Autoencoder) -> None:
    """ValueError if the model takes no pictures of any size, or no tiles of --encode-tile."""
    f, tile = model.config.downsample_factor, args.encode_tile
    if side := getattr(model.config, "resolution", 0):
        raise ValueError(f"this model has a ViT aggregator, which takes {side}x{side} only: use eval.py")
    if tile:
        check_gaussian(model, f"--encode-tile {tile}")
    if tile % f or 0 < tile < 2 * f:
        raise ValueError(f"--encode-tile {tile} must be a multiple of {f}, of at least {2 * f}")


def choose_tile(args: argparse.Namespace, model: Autoencoder) -> int:
    """--tile in latent pixels, 0 for none; ValueError if tiles of this decoder are not exact."""
    f = model.config.downsample_factor
    if args.tile is None:
        try:
            halo(model)
        except ValueError:
            return 0
        return TILE // f
    if args.tile % f:
        raise ValueError(f"--tile {args.tile} is not a multiple of {f}")
    if args.tile:
        halo(model)
    return args.tile // f


def find_scaling(name: str, state: dict) -> LatentScaling | None:
    return None if name == "none" else LatentScaling.of(state.get("latents"), per_channel=name == "channel")


def finish(done: int, total: int) -> None:
    """Exit code 1 if pictures were left out."""
    if done < total:
        print(f"error: {total - done} of {total} pictures are broken and were left out", file=sys.stderr)
        sys.exit(1)


def encode(args: argparse.Namespace, model: Autoencoder, state: dict, device: torch.device) -> None:
    with cli.user_errors():
        check_encoder(args, model)
        scaling, source, done = find_scaling(args.scaling, state), pictures.open_pictures(args.input), 0
        names = [source.name(i) for i in range(len(source))]
        paths = pictures.targets(names, args.out, ".pt", args.force)
    with failures("files already written are whole"):
        for name, path, pixels in pictures.read(source, paths, model.config.in_channels):
            z = pictures.encode(model, pixels, args.encode_tile, device)
            z = (scaling.scale(z) if scaling else z)[0].cpu()
            pictures.write_latent(path, z, pixels.shape[-2:], args.scaling)
            print0(f"{name}: {'x'.join(map(str, z.shape))} in {path}")
            done += 1
    finish(done, len(paths))


def open_latents(args: argparse.Namespace, model: Autoencoder, state: dict) -> list[tuple[str, Path, int]]:
    """(name, file, row in the file) of each latent; ValueError if one does not fit model or --scaling."""
    root, entries = Path(args.input), []
    found = sorted(root.rglob("*.pt")) if root.is_dir() else [root]
    if not found:
        raise ValueError(f"no .pt files in {root}")
    for path in found:
        latents = pictures.read_latents(path, model)
        if None not in (latents.scaling, args.scaling) and latents.scaling != args.scaling:
            raise ValueError(f"{path} has --scaling {latents.scaling}, not {args.scaling}")
        find_scaling(args.scaling or latents.scaling or "none", state)
        stem = os.path.relpath(path.with_suffix(""), root if root.is_dir() else root.parent)
        count = len(latents.z)
        rows = [""] if count == 1 else [f"-{i:0{len(str(count - 1))}}" for i in range(count)]
        entries += [(f"{stem}{row}.pt", path, i) for i, row in enumerate(rows)]
    return entries


def decode(args: argparse.Namespace, model: Autoencoder, state: dict, device: torch.device) -> None:
    with cli.user_errors():
        tile, entries = choose_tile(args, model), open_latents(args, model, state)
        paths = pictures.targets([name for name, _, _ in entries], args.out, ".png", args.force)
    with failures("files already written are whole"):
        for path, (_, file, row) in zip(paths, entries, strict=True):
            latents = pictures.read_latents(file, model)
            scaling = find_scaling(args.scaling or latents.scaling or "none", state)
            z, (height, width) = latents.z[row : row + 1], latents.size
            pixels = pictures.decode(model, scaling.unscale(z) if scaling else z, tile, device)
            pictures.write(path, report.to_image(pixels[:, :height, :width]))
            print0(f"{file}: {width} x {height} in {path}")


def reconstruct(args: argparse.Namespace, model: Autoencoder, state: dict, device: torch.device) -> None:
    with cli.user_errors():
        check_encoder(args, model)
        tile, source, scores = choose_tile(args, model), pictures.open_pictures(args.input), []
        names = [source.name(i) for i in range(len(source))]
        paths = pictures.targets(names, args.out, ".png", args.force)
    with failures("files already written are whole"):
        for name, path, pixels in pictures.read(source, paths, model.config.in_channels):
            z = pictures.encode(model, pixels, args.encode_tile, device)
            height, width = pixels.shape[-2:]
            recon = pictures.decode(model, z, tile, device)[:, :height, :width]
            scores.append(metrics.psnr(pixels[None], recon[None]).item())
            pictures.write(path, report.grid([torch.stack([pixels, recon])]))
            print0(f"{name}: {width} x {height}, PSNR {scores[-1]:.2f} dB, in {path}")
    if len(scores) > 1:
        print0(f"mean PSNR of {len(scores)} pictures: {sum(scores) / len(scores):.2f} dB")
    finish(len(scores), len(paths))


# ----------------------------------------------------------------------------

COMMANDS = {"stats": stats, "cache": cache_latents, "encode": encode, "decode": decode,
            "reconstruct": reconstruct}


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        device = distributed.init(args.device)
        if distributed.world_size() > 1 and args.command not in ("stats", "cache"):
            raise ValueError(f"{args.command} runs in one process, without torchrun")
        if device.type == "cuda" and getattr(args, "dtype", "fp32") == "fp32":
            torch.backends.cuda.matmul.fp32_precision = "ieee"        # TF32 rounds, though less than bf16
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        model, state = checkpoint.load_model(args.ckpt, args.raw)
        model.requires_grad_(False).to(device)
    COMMANDS[args.command](args, model, state, device)
    distributed.cleanup()


if __name__ == "__main__":
    main()
