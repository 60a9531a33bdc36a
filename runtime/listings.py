"""A cache of listings, so that a start need not list millions of files again.

A listing holds the names of the images behind a --data value. It is kept with the state of all that it was
made from, and used only while nothing of this has changed:

    folders    the times of each folder of the tree. Adding, deleting or renaming a file changes the times of
               the folder that holds it. mtime can be set back (rsync -a, tar -x), ctime cannot.
    archives   size, mtime and ctime
    links      those without an image's extension still do not lead to a folder (which may be mounted later)

A listing is not kept if something changed in the last seconds, since a second change within one tick of the
file system's clock would go unnoticed. Nor is it kept if a folder lies on a FUSE mount, since buckets do not
update the times of folders. The files are in $XDG_CACHE_HOME/litevae or ~/.cache/litevae and may be deleted.
"""

import functools
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.distributed import print0

MIN_IMAGES = 10_000                      # fewer are listed in a moment
SETTLED = 10_000_000_000                 # nanoseconds without a change; file systems tick every 2 s at worst
MOUNTS = Path("/proc/self/mountinfo")    # on Linux
RULES = 1                                # raise it when the rules change by which sources are listed


class Listing(NamedTuple):
    """roots: (folder, archive in it or ""); names: (N,) bytes; table: (N, 3) root number, offset, size.

    The offset of a file in a folder is -1.
    """

    roots: list[tuple[str, str]]
    names: np.ndarray
    table: np.ndarray


class Watched:
    """What a listing is made from: the state of each folder and archive before it is read, and odd links."""

    def __init__(self) -> None:
        self.begun = time.time_ns()
        self.states: dict[str, os.stat_result] = {}
        self.links: list[str] = []

    def add(self, path: str) -> None:
        self.states[os.path.abspath(path)] = os.stat(path)

    def add_link(self, path: str) -> None:
        self.links.append(os.path.abspath(path))

    def is_settled(self) -> bool:
        last = max(max(state.st_mtime_ns, state.st_ctime_ns) for state in self.states.values())
        return last < self.begun - SETTLED

    def is_on_fuse(self) -> bool:
        devices = fuse_devices()
        return any(state.st_dev in devices and stat.S_ISDIR(state.st_mode) for state in self.states.values())


def load(paths: Sequence[str]) -> Listing | None:
    """The listing of these folders and archives, or None if none is kept or anything has changed since."""
    try:
        with np.load(_file(paths)) as stored:
            keys = "roots", "names", "table", "watched", "states", "links"
            roots, names, table, watched, states, links = (stored[key] for key in keys)
    except FileNotFoundError:
        return None
    except Exception as error:    # numpy's readers raise almost any type on damaged bytes
        _note(error)
        return None
    try:
        now = [_numbers(os.stat(os.fsdecode(path))) for path in watched]
    except OSError:
        return None
    if now != states.tolist() or any(os.path.isdir(os.fsdecode(link)) for link in links):
        return None
    return Listing([(os.fsdecode(folder), os.fsdecode(archive)) for folder, archive in roots], names, table)


def save(paths: Sequence[str], listing: Listing, watched: Watched) -> None:
    """Keep a listing if it is long enough and its state can be trusted; a failure is only noted."""
    if len(listing.names) < MIN_IMAGES or not watched.is_settled() or watched.is_on_fuse():
        return
    arrays = {
        "roots": _bytes(part for root in listing.roots for part in root).reshape(-1, 2),
        "names": listing.names,
        "table": listing.table,
        "watched": _bytes(watched.states),
        "states": np.array([_numbers(state) for state in watched.states.values()]),
        "links": _bytes(watched.links),
    }
    try:
        _write(_file(paths), arrays)
    except OSError as error:
        _note(error)


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Atomic, also if several processes write the same listing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=file.stem, suffix=".tmp", dir=file.parent)
    try:
        with open(handle, "wb") as opened:
            np.savez_compressed(opened, **arrays)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "litevae")


def _file(paths: Sequence[str]) -> Path:
    """The cache file of these paths; OSError without a home directory."""
    if not _folder().is_absolute():
        raise OSError("no home directory")
    # spelled as they are, because the spelling decides how roots are numbered
    place = "" if all(map(os.path.isabs, paths)) else os.getcwd()
    key = hashlib.blake2b(json.dumps([RULES, place, *paths]).encode(), digest_size=16)
    return _folder() / f"{key.hexdigest()}.npz"


def _bytes(texts) -> np.ndarray:
    return np.array([os.fsencode(text) for text in texts], dtype=np.bytes_)


def _numbers(state: os.stat_result) -> list[int]:
    return [state.st_mtime_ns, state.st_ctime_ns, state.st_size]


def fuse_devices() -> set[int]:
    """The device numbers of all FUSE mounts; empty where the system does not tell."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    mounts = [line.partition(" - ")[::2] for line in lines]
    numbers = [mount.split()[2].split(":") for mount, about in mounts if about.startswith("fuse")]
    return {os.makedev(int(major), int(minor)) for major, minor in numbers}


def _note(error: Exception) -> None:
    reason = getattr(error, "strerror", None) or str(error)
    _say(f"note: the listing cache in {_folder()} cannot be used ({' '.join(reason.split())[:120]})")


@functools.cache
def _say(text: str) -> None:
    """Prints a text once, because reading and writing, training and validation data may fail alike."""
    print0(text)
