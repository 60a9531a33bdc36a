"""Reads images from folders, archives and the synthetic generator.

`open_source` lists the images. A source has a length, names, and `read(i, side)`, which returns an RGB image
or raises BrokenImage. `read_reduced` decodes JPEGs faster, with fewer pixels, for training only.
"""

import copy
import glob
import hashlib
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime import listings
from runtime.listings import Listing, Watched
from synthetic import dead_leaves

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")    # in any case: ImageNet has .JPEG
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")    # by content: one of ImageNet's .JPEG files is a PNG
MAX_PIXELS = 89_478_485    # larger images count as decompression bombs; Pillow only warns at this limit
HELD_OUT = 1               # seed of the synthetic validation images; training uses 0


class BrokenImage(ValueError):
    """A file that cannot be used as an image; the message says why in one line."""


class NoImages(ValueError):
    """So many broken images in a row that there is nothing to train on."""


def load_rgb(file: str | Path | BinaryIO | bytes) -> Image.Image:
    """Decode an image to 8-bit RGB.

    8-bit RGB is unchanged; grey, palette and CMYK are converted; 16-bit grey is divided by 257; alpha is
    composited over white. EXIF orientation is ignored, as in the published ImageNet protocols.
    Raises BrokenImage if the file cannot be decoded; truncated files and decompression bombs count as such.
    """
    return load_reduced(file, 0)[0]


def load_reduced(file: str | Path | BinaryIO | bytes, least: int) -> tuple[Image.Image, tuple[int, int]]:
    """load_rgb, but a JPEG is decoded at 1/2, 1/4 or 1/8 if its short side keeps `least` pixels; 0: never.

    libjpeg leaves out the high frequencies of each block, which takes less time than computing all pixels.
    Returns the image, whose sides are rounded up, and the full (width, height).
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            size = image.size
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
            if least:
                image.draft(None, (least, least))    # does nothing in other formats
            return _to_rgb(image), size
    except UnidentifiedImageError as error:    # Pillow's message is only a memory address
        raise BrokenImage(f"not one of {', '.join(FORMATS)}") from error
    except Exception as error:    # Pillow's decoders raise almost any type on damaged bytes
        raise BrokenImage(" ".join(str(error).split()) or repr(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range; store 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"pixels {grey.min()}..{grey.max()} are not 16-bit; store 8 or 16 bits")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))    # Pillow itself would clip at 255
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")    # convert would copy RGB


class FileSource:
    """Images in folders and archives as one flat list with random access.

    The listing is stored in two arrays, because forked workers copy a list of strings on first access; the
    1.28M files of ImageNet take 70 MB once. No file is kept open: workers may fork or spawn, and tars may be
    many.
    """

    def __init__(self, spec: str, listing: Listing):
        self.spec = spec
        self.roots, self.names, self.table = listing

    def __len__(self) -> int:
        return len(self.table)

    def select(self, indices: Sequence[int]) -> "FileSource":
        """Returns a source with these images only."""
        view = copy.copy(self)
        view.names, view.table = self.names[indices], self.table[indices]
        return view

    def name(self, i: int) -> str:
        """Name of image i, independent of where the data lies: its path in its folder, or archive/path."""
        return os.path.join(self.roots[self.table[i, 0]][1], os.fsdecode(self.names[i]))

    def path(self, i: int) -> str:
        """Location of image i, for messages."""
        return os.path.join(self.roots[self.table[i, 0]][0], self.name(i))

    def folder(self, i: int) -> str:
        """First folder on the way to image i below its root or in its archive, "" if there is none."""
        folders = [part for part in os.fsdecode(self.names[i]).split("/")[:-1] if part not in ("", ".")]
        return folders[0] if folders else ""

    def read(self, i: int, side: int) -> Image.Image:
        """Image i as RGB in its own size (only synthetic images use `side`); raises BrokenImage."""
        return self.read_reduced(i, side, 0)[0]

    def read_reduced(self, i: int, side: int, least: int) -> tuple[Image.Image, tuple[int, int]]:
        """Image i and its full (width, height), as by `load_reduced`; raises BrokenImage."""
        root, offset, size = self.table[i].tolist()
        try:
            if offset < 0:
                data = _read_file(self.path(i))
            else:
                data = _read_member(os.path.join(*self.roots[root]), offset, size)
        except (OSError, zlib.error) as error:
            raise BrokenImage(getattr(error, "strerror", None) or str(error)) from error
        return load_reduced(data, least)


class SyntheticSource:
    """Dead-leaves images (synthetic.py): image i is a pure function of (seed, i) and the requested side."""

    spec = "synthetic"

    def __init__(self, seed: int = 0, count: int = 1_000_000):
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        """Name of image i, also used in messages."""
        return f"synthetic/{self.seed}/{i}"

    path = name

    def folder(self, i: int) -> str:
        return ""

    def read(self, i: int, side: int) -> Image.Image:
        """Image i, side x side."""
        return Image.fromarray(dead_leaves(self.seed, i, side))

    def read_reduced(self, i: int, side: int, least: int) -> tuple[Image.Image, tuple[int, int]]:
        """Image i, side x side, and this size."""
        return self.read(i, side), (side, side)


Source = FileSource | SyntheticSource


def open_source(spec: str, held_out: bool = False, cached: bool = True) -> Source:
    """Opens a --data value: folders at any depth, image files, .tar and .zip, separated by commas.

    Globs and ranges such as train-{0000..0252}.tar are expanded. The word synthetic stands for dead-leaves
    images; held_out selects those that are never used for training. cached: whether a long listing may come
    from runtime/listings.py and be kept there. Raises ValueError with one line if a path is missing or
    damaged, or if there are no images.
    """
    if spec == "synthetic":
        return SyntheticSource(HELD_OUT if held_out else 0)
    try:
        paths = _expand(spec)
        # a glob of images has been listed by its expansion
        cached = cached and not any(path.lower().endswith(EXTENSIONS) for path in paths)
        listing = listings.load(paths) if cached else None
        if listing is None:
            watched = Watched()
            listing = _list(paths, watched)
            if cached:
                listings.save(paths, listing, watched)
    except OSError as error:
        raise ValueError(f"data source {spec!r}: {error.strerror}: {error.filename!r}") from error
    except (ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"data source {spec!r}: {error}") from error
    if not len(listing.names):
        raise ValueError(f"data source {spec!r} contains no images ({' '.join(EXTENSIONS)}); give the "
                         "archives in a folder as folder/*.tar; synthetic needs no files")
    return FileSource(spec, listing)


def _list(paths: Sequence[str], watched: Watched) -> Listing:
    """Lists the images of each path, sorted by name within it."""
    roots: dict[tuple[str, str], int] = {}
    entries: list[tuple[int, str, int, int]] = []
    for path in paths:
        root, members = _index(path, watched)
        number = roots.setdefault(root, len(roots))
        entries += [(number, *member) for member in sorted(members)]
    names = np.array([os.fsencode(name) for _, name, _, _ in entries], dtype=np.bytes_)
    table = np.array([(root, offset, size) for root, _, offset, size in entries], dtype=np.int64)
    return Listing(list(roots), names, table)


def _expand(spec: str) -> list[str]:
    """Splits at commas, expands ranges, then globs; a path that exists literally is used as it is."""
    paths = []
    for part in [spec] if os.path.exists(spec) else spec.split(","):
        for pattern in _expand_ranges(os.path.expanduser(part.strip())):
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not found:
                raise ValueError(f"{pattern!r} not found; give folders, images, .tar, .zip or only synthetic")
            paths += found
    return paths


def _expand_ranges(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if os.path.exists(pattern) or not match:
        return [pattern]
    head, tail = pattern[:match.start()], pattern[match.end():]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [path for n in numbers for path in _expand_ranges(f"{head}{n:0{len(match[1])}}{tail}")]


def _index(path: str, watched: Watched) -> tuple[tuple[str, str], list[tuple[str, int, int]]]:
    """Returns the root (folder, archive) and its images (name, offset, size)."""
    if os.path.isdir(path):
        return (path, ""), _index_folder(path, watched)
    if path.lower().endswith((".tar", ".zip")):
        watched.add(path)
    if path.lower().endswith(".tar"):
        return os.path.split(path), _index_tar(path)
    if path.lower().endswith(".zip"):
        return os.path.split(path), _index_zip(path)
    if path.lower().endswith(EXTENSIONS):
        return (os.path.dirname(path), ""), [(os.path.basename(path), -1, 0)]
    raise ValueError(f"{path!r} is not a folder, .tar, .zip or image ({' '.join(EXTENSIONS)})")


def _is_image(name: str) -> bool:
    """Checks the extension; excludes hidden files and hidden folders (macOS's ._x.jpg, .Trash)."""
    return name.lower().endswith(EXTENSIONS) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return re.search(r"(^|/)\.[^/.]", name) is not None


def _index_folder(root: str, watched: Watched) -> list[tuple[str, int, int]]:
    members, seen, waiting = [], set(), [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        watched.add(path)
        real = os.path.realpath(path)
        if real in seen:    # a link to a parent folder would loop
            continue
        seen.add(real)
        folders = []
        with os.scandir(path) as found:
            for entry in found:
                name = os.path.join(folder, entry.name)
                if _is_folder(entry):
                    folders.append(name)
                elif _is_image(name):
                    members.append((name, -1, 0))
                elif entry.is_symlink():
                    watched.add_link(entry.path)
        waiting += sorted((name for name in folders if not _is_hidden(name)), reverse=True)
    return members


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:    # a link that leads nowhere
        return False


def _index_tar(path: str) -> list[tuple[str, int, int]]:
    members = []
    try:
        tar = tarfile.open(path, "r:")
    except tarfile.ReadError as error:    # tarfile's message depends on the bytes it met
        raise ValueError(f"{path!r} is not a plain .tar ({error}); unpack or recreate it") from error
    with tar:
        for member in tar:
            if member.isfile() and _is_image(member.name):
                members.append((member.name, member.offset_data, member.size))
            tar.members.clear()    # tarfile would keep 1 kB per member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):    # tarfile treats a damaged header as the end
            raise ValueError(f"{path!r} is damaged at byte {tar.offset}; download or recreate it")
    return members


def _index_zip(path: str) -> list[tuple[str, int, int]]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if _is_image(member.filename)]
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path!r}: {member.filename!r} is encrypted or not deflated; recreate the zip")
    return [(member.filename, member.header_offset, member.compress_size) for member in members]


def _read_file(path: str) -> bytes:
    if not os.path.exists(path) or os.path.isfile(path):
        return Path(path).read_bytes()
    raise BrokenImage("not a regular file")    # reading a named pipe would block forever


def _read_member(archive: str, offset: int, size: int) -> bytes:
    """Reads the bytes of a tar or zip member without ZipFile, which takes 1 kB per member in each worker."""
    with open(archive, "rb") as file:
        file.seek(offset)
        if archive.lower().endswith(".tar"):
            return file.read(size)
        header = file.read(30)    # zip's local header: compression, lengths of name and extra field
        method, name, extra = (int.from_bytes(header[at:at + 2], "little") for at in (8, 26, 28))
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(size)
        return zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data


def summary(source: Source) -> dict[str, str | int]:
    """Describes the data for a checkpoint: the --data value, the number of images, a hash of their names."""
    about = {"spec": source.spec, "images": len(source)}
    if isinstance(source, FileSource):
        names = hashlib.blake2b(digest_size=16)
        for i in range(len(source)):
            names.update(os.fsencode(source.name(i)) + b"\0")
        about["names"] = names.hexdigest()
    return about
