"""A data set as latents on disk: writing it (`latents.py cache`), and sampling from it (LatentDataset).

What is stored are the moments of the posterior, not samples, for each image and its mirror image:

    index.json          what was encoded, how, and with which weights; names of the classes
    shard-00000.npy     (n, 2, 2, Z, h, w): image, original or mirrored, mean or log-variance
    shard-00000.json    names and labels of the n images, sha256 of the .npy

fp32 shards are float32; NumPy has no bfloat16, so bf16 shards are the uint16 of the same bits. `np.load(path,
mmap_mode="r")` maps either. A label is the number of the image's first folder among the sorted classes, as in
torchvision's ImageFolder, or -1 without a folder.

Each shard is the work of one process, a file appears whole or not at all, and a .json only after its .npy.
An interrupted cache therefore continues with the shards that are missing or damaged, and ends with the same
bytes as an uninterrupted one, for any number of processes.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from model import Autoencoder, LatentScaling
from runtime import distributed, files, sources
from runtime.distributed import print0

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INDEX = ("weights_sha256", "data", "images", "res", "latent_shape", "dtype", "shard_size", "classes")

# ----------------------------------------------------------------------------
# the folder


def open_folder(folder: Path, index: dict) -> None:
    """Begin a cache, or find the one that was begun; ValueError if the folder holds anything else."""
    path = folder / "index.json"
    if path.exists():
        begun = read_json(path)
        for name in index:
            if begun.get(name) != index[name]:
                raise ValueError(f"{folder} holds a cache with {name}={begun.get(name)}, not {index[name]}: "
                                 "repeat its command, or choose another --out")
        return
    if folder.exists() and any(file.name != "index.json.tmp" for file in folder.iterdir()):
        raise ValueError(f"{folder} has files and no index.json of a cache: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, index)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}") from error


def write_json(path: Path, content: dict) -> None:
    with files.whole(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The .npy and the .json of a shard."""
    return folder / f"shard-{number:05d}.npy", folder / f"shard-{number:05d}.json"


def is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is complete and its moments have the recorded hash; prints a note if they do not."""
    moments, about = shard_paths(folder, number)
    if not about.exists():
        return False
    try:
        with open(moments, "rb") as file:
            good = hashlib.file_digest(file, "sha256").hexdigest() == read_json(about)["sha256"]
    except (OSError, ValueError, KeyError):
        good = False
    if not good:
        tqdm.write(f"note: {moments} is damaged, encoding its images again")
    return good


def weights_hash(model: nn.Module) -> str:
    """sha256 of all weights. Unlike that of the file, it survives `latents.py stats`."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# writing


def describe(model: Autoencoder, images: data.ValSet, shard_size: int, dtype: str) -> dict:
    """What every shard of a cache depends on, for index.json; `open_folder` compares it."""
    f = model.config.downsample_factor
    classes = {images.folder(i) for i in range(len(images))}
    return {
        "weights_sha256": weights_hash(model), "data": sources.summary(images.source),
        "images": len(images), "res": images.res,
        "latent_shape": [model.config.latent_channels, images.res // f, images.res // f],
        "dtype": dtype, "shard_size": shard_size, "classes": sorted(classes - {""}),
    }  # fmt: skip


def write(model: Autoencoder, images: data.ValSet, folder: Path, index: dict, batch_size: int,
          num_workers: int, device: torch.device) -> int:
    """Encode what is missing of the cache in `folder` and write its shards; returns the number of images.

    Raises OSError if the disk is full. Finished shards are intact then, and a second call continues.
    """
    todo = unfinished(folder, -(-len(images) // index["shard_size"]))
    for number, rows, moments in encode_shards(model, images, index, todo, batch_size, num_workers, device):
        write_shard(folder, number, moments, images, rows, index)
    distributed.gather(None)                              # every process has finished
    return len(LatentDataset(folder))


def unfinished(folder: Path, shards: int) -> list[int]:
    """This process's share of the shards that are missing; the processes verify the others together."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = [number for number in range(rank, shards, world) if not is_finished(folder, number)]
    todo = sorted(sum(distributed.gather(mine), []))
    if len(todo) < shards:
        print0(f"{shards - len(todo)} of {shards} shards are finished")
    return todo[rank::world]


def encode_shards(model: Autoencoder, images: data.ValSet, index: dict, numbers: list[int], batch_size: int,
                  num_workers: int, device: torch.device) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yield (shard, its readable images, their moments) for each shard."""
    size, dtype = index["shard_size"], DTYPES[index["dtype"]]
    members = {number: range(number * size, min((number + 1) * size, len(images))) for number in numbers}
    batches = [list(part[i : i + batch_size]) for part in members.values()
               for i in range(0, len(part), batch_size)]          # no batch belongs to two shards
    if not batches:
        return
    loader = iter(data.report_broken(data.listed_loader(images, batches, num_workers, device), set()))
    total = sum(map(len, members.values()))
    with tqdm(total=total, unit="img", disable=not distributed.is_main(), dynamic_ncols=True) as bar:
        for number, part in members.items():
            rows, moments = [], [torch.empty(0, 2, 2, *index["latent_shape"], dtype=dtype)]
            for start in range(0, len(part), batch_size):
                readable, pictures = next(loader)
                if len(readable):
                    rows += readable.tolist()
                    moments.append(encode_both(model, pictures.to(device)).to("cpu", dtype))
                bar.update(len(part[start : start + batch_size]))
            yield number, rows, torch.cat(moments)


@torch.no_grad()
def encode_both(model: Autoencoder, images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> moments (B, 2, 2, Z, h, w) of the images and of their mirror images."""
    x = data.to_float(images)
    return torch.stack([torch.stack(model.encode(view), dim=1) for view in (x, x.flip(-1))], dim=1)


def write_shard(folder: Path, number: int, moments: Tensor, images: data.ValSet, rows: list[int],
                index: dict) -> None:
    """Write the moments, then their names, labels and hash."""
    array = moments.view(torch.uint16).numpy() if moments.dtype == torch.bfloat16 else moments.numpy()
    buffer = io.BytesIO()
    np.save(buffer, array)
    npy, about = shard_paths(folder, number)
    about.unlink(missing_ok=True)                         # of a damaged shard
    with files.whole(npy) as file:
        file.write(buffer.getbuffer())
    label = {name: i for i, name in enumerate(index["classes"])}
    write_json(about, {"sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
                       "names": [images.name(i) for i in rows],
                       "labels": [label.get(images.folder(i), -1) for i in rows]})


# ----------------------------------------------------------------------------
# reading


@cache
def open_shard(path: Path) -> np.ndarray:
    """A shard, mapped once in each process; ValueError if it was cut short.

    NumPy's own map keeps its file open, and ImageNet's 1,252 shards are more than the usual limit of 1,024.
    """
    try:
        header = np.load(path, mmap_mode="r")
        whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): repeat the command of the cache") from error
    return whole.numpy()[header.offset :].view(header.dtype).reshape(header.shape)


class LatentDataset(Dataset):
    """Latents sampled from a cache: item (z, label), z fp32 (Z, h, w), label int or -1.

    Whether the image is mirrored and the noise of the posterior are pure functions of (seed, epoch, index).
    Call `set_epoch` before each epoch; persistent workers of a DataLoader see it, too. scaling maps z to the
    latents of a diffusion model (`LatentScaling.of(state["latents"])`). Raises ValueError if the folder is
    not a finished cache, or a shard was cut short.
    """

    def __init__(self, folder: str | Path, seed: int = 0, scaling: LatentScaling | None = None):
        self.folder, self.seed, self.scaling = Path(folder), seed, scaling
        self.index = read_json(self.folder / "index.json")
        if missing := [name for name in INDEX if name not in self.index]:
            raise ValueError(f"{folder}/index.json is not that of latents.py cache: no {', '.join(missing)}")
        self.classes = self.index["classes"]
        shards = range(-(-self.index["images"] // self.index["shard_size"]))
        missing = sum(not path.exists() for number in shards for path in shard_paths(self.folder, number))
        if missing:
            raise ValueError(f"{folder} is not finished, {missing} files are missing: repeat its command")
        for number in shards:
            open_shard(shard_paths(self.folder, number)[0])       # a damaged one is better known now
        labels = [read_json(shard_paths(self.folder, number)[1])["labels"] for number in shards]
        self.ends = np.cumsum([len(part) for part in labels])     # broken images make some shards shorter
        self.labels = np.concatenate(labels).astype(np.int64)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def moments(self, i: int, mirrored: bool) -> Tensor:
        """Mean and log-variance of image i, fp32 (2, Z, h, w)."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        row = i - int(self.ends[shard])                           # negative: from the end of the shard
        array = torch.from_numpy(open_shard(shard_paths(self.folder, shard)[0])[row, int(mirrored)].copy())
        return array.view(DTYPES[self.index["dtype"]]).float()

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        rng = np.random.default_rng([self.seed, int(self.epoch), i])
        mean, logvar = self.moments(i, mirrored=bool(rng.integers(2)))
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        z = mean + torch.exp(0.5 * logvar) * noise
        return (self.scaling.scale(z) if self.scaling else z), int(self.labels[i])
