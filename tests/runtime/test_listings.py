"""Run: python -m pytest tests/runtime/test_listings.py. The cache of listings sees every change."""

import errno
import multiprocessing
import os
import shutil
import tarfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from runtime import listings, sources
from runtime.sources import FileSource, open_source

NAMES = ["a.jpg", "n0/a.jpg", "n0/b.jpg", "n1/d.jpg", "n1/deep/c.jpg", "z.PNG"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache that keeps each listing at once, however short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "MIN_IMAGES", 1)
    monkeypatch.setattr(listings, "SETTLED", 0)
    listings._say.cache_clear()
    return tmp_path / "cache/litevae"


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "tree", NAMES)


def write_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    time.sleep(0.02)                                      # several ticks of the file system's clock
    return root


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


def write_zip(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")


def content(source: FileSource) -> tuple:
    return source.spec, source.roots, source.names.tolist(), source.table.tolist()


def names(source: FileSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def is_kept(monkeypatch, spec: str) -> bool:
    """Whether the next listing comes from the cache; it must then be the one that would be made anew."""
    fresh, made, real = content(open_source(spec, cached=False)), [], sources._list
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_list", lambda *args: made.append(1) or real(*args))
        assert content(open_source(spec)) == fresh
    return not made


# ---- what is kept ------------------------------------------------------------------------------------------


def test_second_listing_comes_from_the_cache(tmp_path, monkeypatch, tree):
    """Folders, tars, zips, several at once, and relative paths: all but single images are listed once."""
    write_tar(tmp_path / "a.tar", NAMES)
    write_zip(tmp_path / "b.zip", NAMES)
    monkeypatch.chdir(tmp_path)
    for spec in (f"{tree}", f"{tree}/", "tree", "./tree,tree", "tree,tree", "a.tar", "b.zip",
                 f"b.zip,{tree}/n1,a.tar", "?.*"):
        assert not is_kept(monkeypatch, spec) and is_kept(monkeypatch, spec), spec
    assert not is_kept(monkeypatch, "tree/n0/*.jpg") and not is_kept(monkeypatch, "tree/n0/*.jpg")


def test_relative_paths_belong_to_their_place(tmp_path, monkeypatch):
    """The same relative path in another folder is another source."""
    for place, names_there in (("here", ["a.jpg"]), ("there", ["b.jpg", "c.jpg"])):
        write_tree(tmp_path / place / "tree", names_there)
        monkeypatch.chdir(tmp_path / place)
        assert names(open_source("tree")) == names(open_source("tree")) == names_there


def test_short_listings_are_not_kept(cache, monkeypatch, tree):
    """One image below the threshold nothing is written, and at the threshold it is."""
    monkeypatch.setattr(listings, "MIN_IMAGES", len(NAMES) + 1)
    open_source(str(tree))
    assert not cache.exists()
    monkeypatch.setattr(listings, "MIN_IMAGES", len(NAMES))
    open_source(str(tree))
    assert len(list(cache.iterdir())) == 1


def test_without_the_cache_nothing_is_read_or_written(cache, tree):
    """cached=False neither keeps a listing nor believes a wrong one."""
    open_source(str(tree), cached=False)
    assert not cache.exists()
    open_source(str(tree))
    (file,) = cache.iterdir()
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored}
    np.savez_compressed(file, **arrays | {"names": np.array([b"wrong.jpg"] * len(NAMES))})
    assert names(open_source(str(tree))) == ["wrong.jpg"] * len(NAMES)
    assert names(open_source(str(tree), cached=False)) == NAMES


def test_fresh_changes_are_not_kept(cache, monkeypatch, tree):
    """A folder that changed within the last seconds could change again within one tick of the clock."""
    monkeypatch.setattr(listings, "SETTLED", int(60e9))
    os.utime(tree, (1, 1))                                # mtime may be set back, ctime tells
    open_source(str(tree))
    assert not cache.exists()


def test_fuse_is_not_kept(tmp_path, cache, monkeypatch, tree):
    """On a FUSE mount, whose folders need not tell changes, archives are kept and folders are not."""
    device = os.stat(tree).st_dev
    mounts = (f"22 27 0:999 / /proc rw,relatime - proc proc rw\n"
              f"36 27 {os.major(device)}:{os.minor(device)} / /bucket rw shared:1 - fuse.s3fs s3fs rw\n")
    (tmp_path / "mountinfo").write_text(mounts)
    monkeypatch.setattr(listings, "MOUNTS", tmp_path / "mountinfo")
    assert listings.fuse_devices() == {device}
    open_source(str(tree))
    assert not cache.exists()
    write_tar(tmp_path / "a.tar", NAMES)
    assert not is_kept(monkeypatch, f"{tmp_path}/a.tar") and is_kept(monkeypatch, f"{tmp_path}/a.tar")
    monkeypatch.setattr(listings, "MOUNTS", tmp_path / "missing")
    assert listings.fuse_devices() == set()


# ---- what is seen ------------------------------------------------------------------------------------------


def set_back(root: Path) -> None:
    """A file is added and the folder's mtime set to what it was, as tar -x and rsync -a do."""
    before = os.stat(root / "n0")
    (root / "n0/new.jpg").touch()
    os.utime(root / "n0", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "file added at the top": lambda root: (root / "new.jpg").touch(),
    "file added below": lambda root: (root / "n1/deep/new.jpg").touch(),
    "file added and mtime set back": set_back,
    "file deleted at the top": lambda root: (root / "a.jpg").unlink(),
    "file deleted below": lambda root: (root / "n1/deep/c.jpg").unlink(),
    "file renamed": lambda root: (root / "n0/b.jpg").rename(root / "n0/c.jpg"),
    "file moved": lambda root: (root / "n0/b.jpg").rename(root / "n1/b.jpg"),
    "folder added": lambda root: write_tree(root, ["n1/n2/new.jpg"]),
    "folder deleted": lambda root: shutil.rmtree(root / "n1/deep"),
    "folder renamed": lambda root: (root / "n0").rename(root / "n9"),
    "folder hidden": lambda root: (root / "n0").rename(root / ".n0"),
    "folders swapped": lambda root: [(root / a).rename(root / b)
                                     for a, b in (("n0", "x"), ("n1", "n0"), ("x", "n1"))],
    "folder replaced": lambda root: [(root / "n0").rename(root.parent / "old"),
                                     write_tree(root, ["n0/new.jpg"])],
    "link added": lambda root: (root / "n2").symlink_to(root.parent / "elsewhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen(tmp_path, monkeypatch, tree, change):
    """After any change of the tree the listing is the new one, and that one is kept in its turn."""
    write_tree(tmp_path / "elsewhere", ["e.jpg"])
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))
    CHANGES[change](tree)
    assert sorted(names(open_source(str(tree), cached=False))) != sorted(NAMES)
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))


def test_changed_content_of_an_image_is_no_change(monkeypatch, tree):
    """Names are kept, not pixels: writing into a file leaves the listing as it is."""
    assert not is_kept(monkeypatch, str(tree))
    (tree / "n0/a.jpg").write_bytes(b"pixels")
    assert is_kept(monkeypatch, str(tree))


def test_change_behind_a_link_is_seen(tmp_path, monkeypatch, tree):
    """Folders outside the tree that links lead to, at once or through another link."""
    write_tree(tmp_path / "v1", ["e.jpg"])
    write_tree(tmp_path / "v2", ["f.jpg", "g.jpg"])
    (tmp_path / "current").symlink_to("v1")
    (tree / "link").symlink_to(tmp_path / "current")
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))
    (tmp_path / "v1/new.jpg").touch()
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    assert not is_kept(monkeypatch, str(tree)) and "link/f.jpg" in names(open_source(str(tree)))


def test_link_that_led_nowhere_is_seen(tmp_path, monkeypatch, tree):
    """A folder that appears behind a link without any change of the tree, as when a disk is mounted."""
    (tree / "n7").symlink_to(tmp_path / "disk/n7")
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))
    write_tree(tmp_path / "disk", ["n7/e.jpg"])
    assert not is_kept(monkeypatch, str(tree)) and "n7/e.jpg" in names(open_source(str(tree)))


def test_folder_found_twice_is_seen(tmp_path, monkeypatch, tree):
    """A folder that another link names is listed once, and comes back when the link leads elsewhere."""
    (tmp_path / "other").symlink_to(tree / "n1")
    (tree / "m").symlink_to(tmp_path / "other")
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(tree)) and is_kept(monkeypatch, str(tree))
    assert "n1/d.jpg" not in names(open_source(str(tree)))
    write_tree(tmp_path / "elsewhere", ["e.jpg"])
    (tmp_path / "other").unlink()
    (tmp_path / "other").symlink_to("elsewhere")
    assert not is_kept(monkeypatch, str(tree))
    assert {"m/e.jpg", "n1/d.jpg"} <= set(names(open_source(str(tree))))


@pytest.mark.parametrize("kind, write", [("tar", write_tar), ("zip", write_zip)])
def test_replaced_archive_is_seen(tmp_path, monkeypatch, kind, write):
    """An archive of the same size and with its old mtime is listed again."""
    path = tmp_path / f"x.{kind}"
    write(path, NAMES)
    before = path.stat()
    time.sleep(0.02)
    assert not is_kept(monkeypatch, str(path)) and is_kept(monkeypatch, str(path))
    write(path, [name.replace("b", "c") for name in NAMES])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert not is_kept(monkeypatch, str(path))


def test_vanished_source_is_an_error(tmp_path, monkeypatch, tree):
    """A kept listing does not hide that the data are gone, or that no image is left."""
    open_source(str(tree))
    tree.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="not found"):
        open_source(str(tree))
    tree.mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        open_source(str(tree))


# ---- trouble with the cache itself -------------------------------------------------------------------------


def test_damaged_cache_is_replaced(tmp_path, cache, capsys):
    """Cut, empty, of another kind, with any byte flipped: the right listing, one note, a good file again."""
    rng = np.random.default_rng(0)
    expected = sorted(f"{number:016x}.jpg" for number in rng.integers(0, 2**62, 500).tolist())
    tree = str(write_tree(tmp_path / "tree", expected))
    open_source(tree)
    (file,) = cache.iterdir()
    good, noted = file.read_bytes(), 0
    bad = [b"", b"text", b"\x93NUMPY", good[:100], good[:-10]]
    for position in rng.integers(0, len(good), 60).tolist():
        bad.append(good[:position] + bytes([good[position] ^ 255]) + good[position + 1:])
    capsys.readouterr()
    for damaged in bad:
        file.write_bytes(damaged)
        listings._say.cache_clear()
        assert names(open_source(tree)) == expected
        said = capsys.readouterr().out
        assert said.count("\n") == said.count("note: the listing cache in ") <= 1
        noted += said.count("\n")
        assert names(open_source(tree)) == expected and capsys.readouterr().out == ""
    assert noted > 50                                     # of 65; a date in a header does not matter


@pytest.mark.parametrize("trouble", ["a file in its place", "no permission", "no home"])
def test_unusable_cache_is_noted_once(tmp_path, monkeypatch, capsys, tree, trouble):
    """Training and validation data are listed, the run says once why, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    if trouble == "a file in its place":
        (tmp_path / "cache").write_text("mine")
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(np, "load", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse)
    before = sorted(os.listdir(tmp_path))
    for _ in range(2):
        assert names(open_source(str(tree))) == NAMES
        assert names(open_source(str(tree / "n0"))) == ["a.jpg", "b.jpg"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("note: the listing cache in ")
    assert sorted(os.listdir(tmp_path)) == before


def test_full_disk_leaves_no_half_file(cache, monkeypatch, capsys, tree):
    """A write that fails half-way is noted, and the cache is empty."""
    def save(file, **arrays):
        file.write(b"half a listing")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", save)
    assert names(open_source(str(tree))) == NAMES
    assert "No space left" in capsys.readouterr().out and list(cache.iterdir()) == []


def open_and_delete(path: str) -> bool:
    """Opens the source and removes its listing, again and again."""
    right = []
    for _ in range(30):
        right.append(names(open_source(path)) == NAMES)
        listings._file([path]).unlink(missing_ok=True)
    return all(right)


def test_several_processes_at_once(cache, tree):
    """Three processes that write, read and delete one listing always see a whole one."""
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        assert all(pool.map(open_and_delete, [str(tree)] * 3))
    assert not list(cache.glob("*.tmp"))
