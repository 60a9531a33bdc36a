"""Training and validation data: resizing and cropping, the order of samples, data sets and loaders.

runtime/sources.py lists the images behind a --data value (`open_source`) and decodes them (`load_rgb`).
`TrainSet` and `ValSet` turn them into uint8 tensors, the loaders form batches, and `to_float` maps a batch
to [-1, 1].

There is no random state. Sample k of a run (k = step * global batch + row) is a pure function of (seed, k):
its position in the epoch's permutation, scale, crop, flip and the noise of its latent. Resuming therefore
needs only the step, and 1, 2 or 4 processes with the same global batch see the same samples. The same rule
selects the replacement of a broken file.
"""

import atexit
import glob
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from runtime import distributed
from runtime.sources import (
    HELD_OUT,
    MAX_PIXELS,
    BrokenImage,
    FileSource,
    NoImages,
    Source,
    SyntheticSource,
)

MAX_TRIES = 100            # training ends after this many broken files in a row
ORDER, CROP, NOISE = 1, 2, 3     # tags that keep the random streams of one seed apart
# ours: training decodes a JPEG at 1/2, 1/4 or 1/8 if its short side keeps this many times the side before the
# crop. Against full decoding, crops then have a mean PSNR of 46 dB and more (docs/running.md)
OVERSAMPLING = 2.0


# ---- one image ---------------------------------------------------------------------------------------------


def _resize(image: Image.Image, side: int, kind: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize the short side to `side` by PIL."""
    return image.resize(_resized(image.size, side), kind)


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) with a short side of `side`, and int(side * long / short) like torchvision's Resize."""
    width, height = size
    resized = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return _check_strip(size, resized)


def _check_strip(size: tuple[int, int], resized: tuple[int, int]) -> tuple[int, int]:
    if resized[0] * resized[1] > MAX_PIXELS:
        strip, resized = (f"{width} x {height}" for width, height in (size, resized))
        raise BrokenImage(f"{strip} is too thin: resizing would make it {resized}")
    return resized


def val_transform(image: Image.Image, res: int, resize: str = "bicubic") -> Image.Image:
    """Resize the short side to `res` and crop the central res x res; `resize` is one of RESIZES."""
    return RESIZES[resize](image, res)


def _bicubic(image: Image.Image, res: int) -> Image.Image:
    """PIL bicubic; equals torchvision's Resize and CenterCrop."""
    return _center(_resize(image, res), res)


def _bilinear(image: Image.Image, res: int) -> Image.Image:
    """PIL bilinear, torchvision's default; softer than bicubic and 1.3 dB easier to reconstruct."""
    return _center(_resize(image, res, Image.Resampling.BILINEAR), res)


def _center(image: Image.Image, res: int) -> Image.Image:
    left, top = round((image.width - res) / 2), round((image.height - res) / 2)
    return image.crop((left, top, left + res, top + res))


def _adm(image: Image.Image, res: int) -> Image.Image:
    """guided-diffusion's resize: halve with a box filter until the short side is below 2 res, then bicubic.

    Its rounding differs from the other resizes.
    """
    while min(image.size) >= 2 * res:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    size = _check_strip(image.size, _short_side(image, res))
    return _floor_center(image.resize(size, Image.Resampling.BICUBIC), res)


def _opencv(image: Image.Image, res: int) -> Image.Image:
    """Two-tap bilinear without antialiasing, like OpenCV's INTER_LINEAR up to its fixed-point rounding."""
    width, height = _check_strip(image.size, _short_side(image, res))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=False)
    resized = Image.fromarray(pixels[0].round().byte().permute(1, 2, 0).numpy())
    return _floor_center(resized, res)


def _short_side(image: Image.Image, res: int) -> tuple[int, int]:
    """(width, height) with a short side of `res` and the long side rounded to the nearest integer."""
    scale = res / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _floor_center(image: Image.Image, res: int) -> Image.Image:
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


RESIZES = {"bicubic": _bicubic, "bilinear": _bilinear, "adm": _adm, "opencv": _opencv}


def train_transform(image: Image.Image, res: int, side: int, flip: bool, rng: np.random.Generator
                    ) -> Image.Image:
    """Resize the short side to `side` >= res (PIL bicubic), then crop res x res at random.

    With `flip`, mirror half of the images.
    """
    image = _resize(image, side)
    left, top = _corner(image.size, res, rng)
    image = image.crop((left, top, left + res, top + res))
    return ImageOps.mirror(image) if flip and rng.random() < 0.5 else image


def reduced_transform(pixels: Tensor, full_size: tuple[int, int], res: int, side: int, flip: bool,
                      rng: np.random.Generator) -> Tensor:
    """train_transform of a picture of `full_size` (width, height) that was decoded with fewer pixels.

    uint8 (C, h, w) -> uint8 (C, res, res). torch's bicubic is twice as fast as PIL's and differs from it by a
    level or two of 255 in few values, which is little beside what the missing pixels change.
    """
    resized = _resized(full_size, side)
    left, top = _corner(resized, res, rng)
    # 375 rows at 1/2 are 187.5, stored as 188; the excess keeps interpolate, which rounds down, at `resized`
    scales = [(new + 1e-6) / (full / round(full / own))
              for new, full, own in zip(resized, full_size, reversed(pixels.shape[1:]), strict=True)]
    pixels = F.interpolate(pixels[None], scale_factor=scales[::-1], mode="bicubic", antialias=True)[0]
    crop = pixels[:, top:top + res, left:left + res]
    return (crop.flip(-1) if flip and rng.random() < 0.5 else crop).contiguous()


def _corner(size: tuple[int, int], res: int, rng: np.random.Generator) -> tuple[int, int]:
    """A random (left, top) of a res x res crop."""
    width, height = size
    return int(rng.integers(width - res + 1)), int(rng.integers(height - res + 1))


def to_tensor(image: Image.Image, channels: int = 3) -> Tensor:
    """PIL RGB -> uint8 (channels, H, W) with 3 channels or 1 (BT.601 luma); ValueError for other numbers."""
    return _pixels(image, channels).contiguous()


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """to_tensor, but the channels of a pixel stay side by side in memory."""
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 (grey) or 3 (RGB) channels, not {channels}")
    pixels = np.array(image if channels == 3 else image.convert("L"))    # a copy: PIL's memory is read-only
    return torch.from_numpy(pixels.reshape(image.height, image.width, channels)).permute(2, 0, 1)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> the model's float32 input in [-1, 1]; raises ValueError for any other dtype."""
    if images.dtype != torch.uint8:    # scaling twice would wash out the images
        raise ValueError(f"expected uint8 images in 0..255, got {images.dtype}")
    return images.float() / 127.5 - 1


# ---- what to train and validate on -------------------------------------------------------------------------


def split_val(source: Source, n: int = 256) -> tuple[Source, Source]:
    """Hold n images out of training -> (train, val).

    Validation gets the n images whose names have the smallest hashes, whatever their order. A source of fewer
    than 4n images gives a quarter of them, at least one; raises ValueError if it has only one image.
    """
    if isinstance(source, SyntheticSource):
        return source, SyntheticSource(HELD_OUT, n)
    if len(source) == 1:
        raise ValueError(f"data source {source.spec!r} has only one image, none to hold out; give --val-data")
    names = [os.fsencode(source.name(i)) for i in range(len(source))]
    hashes = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    order = sorted(range(len(source)), key=hashes.__getitem__)
    n = max(1, min(n, len(source) // 4))
    return source.select(sorted(order[n:])), source.select(sorted(order[:n]))


def default_train_spec() -> str:
    """$IMAGENET/train, else datasets/imagenet/train; raises ValueError if neither is there."""
    return _imagenet("train", "--data synthetic (needs no files) or --data with any folder of images")


# where to find the validation images in a folder: the layouts of torchvision, of the original archives and of
# LDM, webdataset shards, and the archive as downloaded
VAL_PLACES = ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_validation/data",
              "imagenet-val-*.tar", "ILSVRC2012_img_val.tar")


def imagenet_val_spec(root: str | None = None) -> str:
    """The --data value for ImageNet's validation set in `root`, in any layout of VAL_PLACES, else `root`.

    Without a root, searches $IMAGENET, datasets/imagenet and LDM's cache; raises ValueError if all lack it.
    """
    if root:
        return _below(root) or root
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (*_imagenet_roots(), os.path.join(cache, "autoencoders/data")):
        if found := _below(folder):
            return found
    return _imagenet("val", "--imagenet-val DIR")


def _below(root: str) -> str | None:
    for place in VAL_PLACES:
        pattern = os.path.join(root, place)
        if glob.glob(os.path.join(glob.escape(root), place)):
            return pattern
    return None


def by_file_name(source: "FileSource") -> "FileSource":
    """The source sorted by bare file name, which gives the same order for all of ImageNet's layouts."""
    return source.select(sorted(range(len(source)), key=lambda i: os.path.basename(source.name(i))))


def _imagenet_roots() -> list[str]:
    return [root for root in (os.environ.get("IMAGENET"), "datasets/imagenet") if root]


def _imagenet(split: str, third_way: str) -> str:
    folders = [os.path.join(root, split) for root in _imagenet_roots()]
    for folder in folders:
        if os.path.isdir(folder):
            return folder
    raise ValueError(f"no folder {' or '.join(folders)}; set IMAGENET to the folder that holds {split}/, "
                     f"link it to datasets/imagenet, or give {third_way}")


def default_val_spec(train_spec: str) -> str | None:
    """The folder val or validation next to a folder named train; None if there is none."""
    train = Path(train_spec)
    beside = [train.with_name(name) for name in ("val", "validation")] if train.name == "train" else []
    return next((str(folder) for folder in beside if folder.is_dir()), None)


# ---- data sets of numbered samples -------------------------------------------------------------------------


class TrainSet(Dataset):
    """Training samples, numbered 0, 1, 2, ... over the whole run, each a pure function of (seed, number).

    rescale: (lo, hi); the short side is uniform in [lo * res, hi * res] before the res x res crop.
    oversampling: a JPEG may be decoded with fewer pixels if its short side keeps this many times that before
    the crop; 0: never (see OVERSAMPLING).
    latent_shape: (Z, h, w) of the posterior's noise, which is drawn here because the loader's processes have
    time for it. Item: (uint8 (channels, res, res), float32 N(0, 1) of latent_shape, messages about the
    broken files that it replaces). Raises ValueError if rescale or oversampling is below 1, and NoImages if
    MAX_TRIES files in a row are broken.
    """

    def __init__(self, source: Source, res: int, seed: int, rescale: tuple[float, float] = (1, 1),
                 flip: bool = True, channels: int = 3, latent_shape: tuple[int, ...] = (0,),
                 oversampling: float = OVERSAMPLING):
        if not 1 <= rescale[0] <= rescale[1]:
            raise ValueError(f"rescale is {rescale[0]} {rescale[1]}, but must be 1 <= low <= high")
        self.source, self.res, self.seed, self.flip, self.channels = source, res, seed, flip, channels
        if 0 < oversampling < 1:
            raise ValueError(f"oversampling is {oversampling}, but must be 0 or at least 1")
        self.latent_shape, self.oversampling = latent_shape, oversampling
        self.sides = round(res * rescale[0]), round(res * rescale[1])
        self._order = -1, np.empty(0, dtype=np.int64)    # the last requested epoch and its permutation

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of the source in this epoch."""
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, ORDER])
            self._order = epoch, rng.permutation(len(self.source))
        return self._order[1]

    def _sample(self, index: int, k: int) -> Tensor:
        rng = np.random.default_rng([self.seed, k, CROP])
        side = int(rng.integers(self.sides[0], self.sides[1] + 1))
        least = math.ceil(self.oversampling * side)
        image, full_size = self.source.read_reduced(index, side, least)
        crop = self.res, side, self.flip, rng
        if image.size == full_size:
            return to_tensor(train_transform(image, *crop), self.channels)
        return reduced_transform(_pixels(image, self.channels), full_size, *crop)

    def noise(self, k: int) -> Tensor:
        rng = np.random.default_rng([self.seed, k, NOISE])
        return torch.from_numpy(rng.standard_normal(self.latent_shape, dtype=np.float32))

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        epoch, position = divmod(k, len(self.source))
        order, broken = self.order(epoch), []
        for attempt in range(min(MAX_TRIES, len(order))):
            index = int(order[(position + attempt) % len(order)])
            try:
                return self._sample(index, k), self.noise(k), tuple(broken)
            except BrokenImage as error:
                broken.append(f"{self.source.path(index)}: {error}")
        raise NoImages(f"data source {self.source.spec!r}: {len(broken)} broken images in a row, the last "
                         f"is {broken[-1]}; repair them or use other data")


class ValSet(Dataset):
    """Validation images, the same in every run; `limit` selects that many, evenly spread over the source.

    Item: (uint8 (channels, res, res), ()). A broken file is not replaced, since the replacement would count
    twice. Its item is (None, (message,)), which `collate` drops, and the metrics cover one image fewer.
    """

    def __init__(self, source: Source, res: int, limit: int | None = None, channels: int = 3,
                 resize: str = "bicubic"):
        self.source, self.res, self.channels, self.resize = source, res, channels, resize
        self.count = min(len(source), limit or len(source))

    def __len__(self) -> int:
        return self.count

    def index(self, i: int) -> int:
        """Number of image i in the source."""
        return i * len(self.source) // self.count

    def name(self, i: int) -> str:
        """Name of image i in its source."""
        return self.source.name(self.index(i))

    def folder(self, i: int) -> str:
        """First folder of image i in its source, see FileSource."""
        return self.source.folder(self.index(i))

    def __getitem__(self, i: int) -> tuple[Tensor | None, tuple[str, ...]]:
        index = self.index(i)
        try:
            image = val_transform(self.source.read(index, self.res), self.res, self.resize)
        except BrokenImage as error:
            return None, (f"{self.source.path(index)}: {error}",)
        return to_tensor(image, self.channels), ()


# ---- batches -----------------------------------------------------------------------------------------------


class GlobalBatchSampler(Sampler):
    """Sample numbers of one process, one list per micro-batch, for steps start_step .. steps - 1.

    Step s has samples s * G .. (s + 1) * G - 1 with G = micro_batch * accumulate * world, for any division of
    G among processes and micro-batches.
    """

    def __init__(self, micro_batch: int, accumulate: int, rank: int, world: int, start_step: int, steps: int):
        self.micro_batch, self.accumulate, self.rank, self.world = micro_batch, accumulate, rank, world
        self.start_step, self.steps = start_step, steps

    def rows(self, micro: int) -> slice:
        """Rows of the global batch in this process's micro-batch `micro`."""
        first = (micro * self.world + self.rank) * self.micro_batch
        return slice(first, first + self.micro_batch)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        global_batch = self.micro_batch * self.accumulate * self.world
        for step in range(self.start_step, self.steps):
            samples = range(step * global_batch, (step + 1) * global_batch)
            for micro in range(self.accumulate):
                yield list(samples[self.rows(micro)])


def collate_train(items: Sequence[tuple[Tensor, Tensor, tuple[str, ...]]]
                  ) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Items of a TrainSet -> ((uint8 (B, C, res, res), noise (B, Z, h, w)), messages about broken files)."""
    images, noise, broken = zip(*items, strict=True)
    return (torch.stack(images), torch.stack(noise)), [message for messages in broken for message in messages]


def collate(items: Sequence[tuple[Tensor | None, tuple[str, ...]]]) -> tuple[Tensor, list[str]]:
    """Items of a ValSet -> (uint8 (B, C, res, res), messages about broken files), B 0 if all are broken."""
    images = [image for image, _ in items if image is not None]
    batch = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
    return batch, [message for _, broken in items for message in broken]


def report_broken(batches: Iterable[tuple[Any, list[str]]], seen: set[str]) -> Iterator[Any]:
    """Yield the images of each batch; report each broken file once, on stderr, and add it to `seen`."""
    for batch, broken in batches:
        for message in broken:
            if message not in seen:
                seen.add(message)
                tqdm.write(f"broken image, number {len(seen)}: {message}", file=sys.stderr)
        yield batch


def default_workers() -> int:
    """Loader processes of a training or scoring process: 4, or fewer if it may use fewer cores."""
    return min(4, distributed.cores())


def _start_worker(worker: int) -> None:
    """Ignore Ctrl-C and the signals that end a job; the main process handles them and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _loader(dataset: Dataset, num_workers: int, device: torch.device | str, collate_fn=collate,
            **batching) -> DataLoader:
    """Each worker uses one torch thread, which is torch's default."""
    atexit.register(_kill_workers)    # or Python would wait at exit for workers, which ignore SIGTERM
    return DataLoader(dataset, num_workers=num_workers, collate_fn=collate_fn, worker_init_fn=_start_worker,
                      pin_memory=torch.device(device).type == "cuda", persistent_workers=num_workers > 0,
                      prefetch_factor=4 if num_workers else None, **batching)


def train_loader(train_set: TrainSet, batches: GlobalBatchSampler, num_workers: int,
                 device: torch.device | str) -> DataLoader:
    """Batches as returned by `collate_train`, one per list of `batches`.

    Reads sample 0 immediately, so data without any readable image raises ValueError here, not in a worker.
    """
    train_set[0]
    return _loader(train_set, num_workers, device, collate_train, batch_sampler=batches)


def val_loader(val_set: ValSet, batch_size: int, num_workers: int, device: torch.device | str, rank: int,
               world: int) -> DataLoader:
    """Batches of every world-th image from `rank` on, without padding, so the ranks see each image once.

    Reads the first images immediately, until one is readable; raises ValueError if eight in a row are broken.
    """
    check_readable(val_set)
    shard = range(rank, len(val_set), world)
    return _loader(val_set, num_workers, device, batch_size=batch_size, sampler=shard)


def check_readable(val_set: ValSet) -> None:
    """ValueError if the first eight images are all broken."""
    first = (val_set[i] for i in range(min(8, len(val_set))))
    if all(image is None for image, _ in first):
        raise ValueError(f"data source {val_set.source.spec!r}: the first validation images are all broken "
                         f"({val_set[0][1][0]}); repair them or use others")


class _Numbered(Dataset):
    """A ValSet whose items start with their number."""

    def __init__(self, val_set: ValSet):
        self.val_set = val_set

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, tuple[str, ...]]:
        return i, *self.val_set[i]


def _collate_numbered(items: Sequence[tuple[int, Tensor | None, tuple[str, ...]]]
                      ) -> tuple[tuple[Tensor, Tensor], list[str]]:
    images, messages = collate([item[1:] for item in items])
    return (torch.tensor([i for i, image, _ in items if image is not None]), images), messages


def listed_loader(val_set: ValSet, batches: Sequence[list[int]], num_workers: int,
                  device: torch.device | str) -> DataLoader:
    """Like `numbered_loader`, for batches given as lists of numbers; `check_readable` is the caller's."""
    return _loader(_Numbered(val_set), num_workers, device, _collate_numbered, batch_sampler=batches)


def numbered_loader(val_set: ValSet, batch_size: int, num_workers: int, device: torch.device | str, rank: int,
                    world: int) -> DataLoader:
    """Like `val_loader`, but `report_broken` yields (numbers in the set, images) for each batch."""
    check_readable(val_set)
    shard = range(rank, len(val_set), world)
    return _loader(_Numbered(val_set), num_workers, device, _collate_numbered, batch_size=batch_size,
                   sampler=shard)
