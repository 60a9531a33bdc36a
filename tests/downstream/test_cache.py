"""Run: pytest tests/downstream/test_cache.py. Killed, resumed, shared out: the same bytes; and samples."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, finish, fork, torchrun, toy, write_images
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import checkpoint
import data
from downstream import cache
from downstream.cache import LatentDataset
from model import LatentScaling
from runtime.sources import open_source

NAMES = ["cat/0.png", "cat/1.png", "ant/x/0.png", "ant/1.jpg", "top.png", "bee/0.png", "bee/1.png"]
FLAGS = "cache toy/ckpt.pt --data photos --shard-size 3 --batch-size 2 --num-workers 0 --device cpu --out out"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A checkpoint, photos and the cache that was never interrupted, in out/."""
    folder = tmp_path_factory.mktemp("ready")
    toy(folder / "toy")
    write_images(folder / "photos", NAMES, side=32)
    call("latents", folder, FLAGS)
    return folder


@pytest.fixture
def folder(ready, tmp_path) -> Path:
    """The same checkpoint and photos, without a cache."""
    for name in ("toy", "photos"):
        (tmp_path / name).symlink_to(ready / name)
    return tmp_path


def forked(folder: Path, flags: str, prepare: Callable[[], None]) -> tuple[int, str]:
    """Run latents.py in a child after prepare(): exit code or minus the signal that killed it, and output."""
    (folder / "output.txt").unlink(missing_ok=True)
    code = finish(fork("latents", folder, flags, prepare))
    return code, (folder / "output.txt").read_text()


def dies(owner: object, name: str, call_number: int) -> Callable[[], None]:
    """prepare(): the process is killed instead of the n-th call of owner.name."""
    def prepare() -> None:
        real, calls = getattr(owner, name), iter(range(1, 1000))
        setattr(owner, name, lambda *args, **kwargs: real(*args, **kwargs) if next(calls) < call_number
                else os.kill(os.getpid(), signal.SIGKILL))

    return prepare


# ---- the same bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [
    dies(os, "fsync", 1),             # index.json has its temporary name
    dies(cache, "encode_both", 3),    # half of the second shard is encoded
    dies(os, "replace", 2),           # the first shard is on disk, but has its temporary name
    dies(os, "replace", 3),           # it has its name, but no .json
], ids=["index", "encode", "rename", "between"])
def test_killed_and_resumed(ready, folder, moment):
    """Killed there: no file is partial. Resumed: the bytes of the cache that was never interrupted."""
    assert forked(folder, FLAGS, moment)[0] == -signal.SIGKILL
    whole = content(ready / "out")
    for name, found in content(folder / "out").items():
        assert name.endswith(".tmp") or found == whole[name]
    call("latents", folder, FLAGS)
    assert content(folder / "out") == whole


def test_two_processes(ready, folder):
    """torchrun shares the shards out, and the files are those of one process."""
    done = torchrun(folder, f"latents.py {FLAGS}")
    assert done.returncode == 0, done.stderr
    assert "7 images and their mirror images in out" in done.stdout
    assert content(folder / "out") == content(ready / "out")


def test_finished_shards_are_left(ready, folder, capsys):
    """A second call encodes nothing; a shard with a flipped bit is found, and it alone is encoded again."""
    call("latents", folder, FLAGS)
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    call("latents", folder, FLAGS)
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    assert "3 of 3 shards are finished" in capsys.readouterr().out
    bad = folder / "out/shard-00001.npy"
    damaged = bytearray(bad.read_bytes())
    damaged[-1] ^= 1
    bad.write_bytes(damaged)
    call("latents", folder, FLAGS)
    out = capsys.readouterr().out
    assert "out/shard-00001.npy is damaged, encoding" in out and "2 of 3 shards are finished" in out
    assert content(folder / "out") == content(ready / "out")
    changed = {path.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"shard-00001.npy", "shard-00001.json"}


def test_full_disk(ready, folder):
    """No room for the second shard: one line, exit code 1, the first one is intact; then it goes on."""
    assert forked(folder, FLAGS, dies(cache, "encode_both", 3))[0] == -signal.SIGKILL
    first = content(folder / "out")
    assert {"shard-00000.npy", "shard-00000.json"} <= set(first)
    code, said = forked(folder, FLAGS, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    errors = [line for line in said.splitlines() if "error" in line]
    assert code == 1 and "Traceback" not in said
    assert errors == ["[rank 0] error: cannot write out/shard-00001.npy: [Errno 27] File too large; "
                      "repeat the command to go on"]
    assert content(folder / "out") == first
    call("latents", folder, FLAGS)
    assert content(folder / "out") == content(ready / "out")


def test_statistics_do_not_change_the_weights(ready, tmp_path):
    """`stats` rewrites the checkpoint; a cache that was begun before still goes on."""
    toy(tmp_path / "toy")
    (tmp_path / "photos").symlink_to(ready / "photos")
    call("latents", tmp_path, FLAGS)
    call("latents", tmp_path, "stats toy/ckpt.pt --data photos --num-workers 0 --device cpu")
    call("latents", tmp_path, FLAGS)
    assert content(tmp_path / "out") == content(ready / "out")


# ---- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ("--shard-size 4", "out holds a cache with shard_size=3, not 4: repeat its command, or choose another"),
    ("--dtype fp32", "out holds a cache with dtype=bf16, not fp32"),
    ("--res 64", "out holds a cache with res=32, not 64"),
    ("--count 5", "out holds a cache with images=7, not 5"),
    ("--out photos", "photos has files and no index.json of a cache"),
    ("--res 36", "image size 36x36 is not divisible by 8"),
    ("--data nowhere", "'nowhere' not found"),
    ("--raw --dtype fp16", "invalid choice: 'fp16'"),
    ("--device tpu", "no device 'tpu'"),
])  # fmt: skip
def test_other_commands_are_refused(ready, folder, refused, flags, words):
    """A folder continues with the command that began it, and only with that; nothing is written."""
    (folder / "out").symlink_to(ready / "out")
    before = content(ready / "out")
    assert words in refused("latents", f"{FLAGS} {flags}")
    assert content(ready / "out") == before


def test_codebook_and_broken_images(folder, refused):
    """A codebook has no moments; a source without a readable image is refused before a folder is made."""
    toy(folder / "vq", codebook_size=4)
    assert "cache needs a Gaussian posterior" in refused("latents", FLAGS.replace("toy/", "vq/"))
    (folder / "bad").mkdir()
    (folder / "bad/0.png").write_bytes(b"")
    assert "all broken" in refused("latents", FLAGS.replace("photos", "bad"))


# ---- what is in it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, error", [("fp32", 1e-6), ("bf16", 2**-8)])
def test_moments(ready, folder, dtype, error):
    """Mean and log-variance of each image and of its mirror image, as model.encode gives them, mapped."""
    call("latents", folder, f"{FLAGS} --dtype {dtype} --num-workers 1 --count 6")
    model, _ = checkpoint.load_model(folder / "toy/ckpt.pt")
    images = data.ValSet(open_source(str(folder / "photos")), 32, 6)
    cached = LatentDataset(folder / "out")
    shard = cache.open_shard(folder / "out/shard-00001.npy")
    assert len(cached) == 6 and np.array_equal(shard, np.load(folder / "out/shard-00001.npy"))
    for i in range(6):
        x = data.to_float(images[i][0])[None]
        for mirrored in (False, True):
            expected = torch.cat(model.encode(x.flip(-1) if mirrored else x))
            torch.testing.assert_close(cached.moments(i, mirrored), expected, rtol=error, atol=1e-5)


def test_names_and_labels(ready):
    """Labels are torchvision's ImageFolder's; an image in no folder has -1; names are in order."""
    about = [json.loads((ready / f"out/shard-0000{i}.json").read_text()) for i in range(3)]
    labels = dict(zip(sum((part["names"] for part in about), []), sum((part["labels"] for part in about), []),
                      strict=True))
    theirs = ImageFolder(ready / "photos")
    cached = LatentDataset(ready / "out")
    assert cached.classes == theirs.classes == ["ant", "bee", "cat"]
    expected = {str(Path(path).relative_to(ready / "photos")): label for path, label in theirs.samples}
    assert labels == expected | {"top.png": -1} and [*labels] == sorted(NAMES)
    assert [cached[i][1] for i in range(7)] == [labels[name] for name in sorted(NAMES)]


def test_broken_image_is_left_out(ready, tmp_path, capsys):
    """It is named once, and its row, name and label are missing; a shard of broken images alone is empty."""
    (tmp_path / "toy").symlink_to(ready / "toy")
    photos = write_images(tmp_path / "photos", NAMES, side=32)
    for name in sorted(NAMES)[2:6]:
        (photos / name).write_bytes(b"broken")
    call("latents", tmp_path, FLAGS)
    said = capsys.readouterr()
    assert said.err.count("broken image, number") == 4 and "3 images and their mirror images" in said.out
    cached, clean = LatentDataset(tmp_path / "out"), LatentDataset(ready / "out")
    shards = [len(np.load(tmp_path / f"out/shard-0000{i}.npy")) for i in range(3)]
    assert len(cached) == 3 and shards == [2, 0, 1]
    for ours, theirs in ((0, 0), (1, 1), (2, 6)):
        assert cached[ours][1] == clean[theirs][1]
        for mirrored in (False, True):
            torch.testing.assert_close(cached.moments(ours, mirrored), clean.moments(theirs, mirrored),
                                       rtol=2**-7, atol=1e-5)


# ---- sampling ----------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_epoch_and_index(ready):
    """Equal for equal (seed, epoch, index), whoever asks and when; different if one of them differs."""
    first, second = (LatentDataset(ready / "out", seed=5) for _ in range(2))
    for cached in (first, second):
        cached.set_epoch(3)
    a = {i: first[i][0] for i in (0, 6, 3)}
    assert all(torch.equal(second[i][0], a[i]) for i in (3, 0, 6))
    second.set_epoch(4)
    other = LatentDataset(ready / "out", seed=6)
    other.set_epoch(3)
    assert not any(torch.equal(cached[i][0], a[i]) for cached in (second, other) for i in a)
    assert a[0].dtype == torch.float32 and a[0].shape == (3, 4, 4)


def test_workers_see_the_epoch(ready):
    """A DataLoader with persistent workers gives what the data set itself gives, epoch by epoch."""
    cached, alone = LatentDataset(ready / "out"), LatentDataset(ready / "out")
    loader = DataLoader(cached, batch_size=7, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        cached.set_epoch(epoch)
        alone.set_epoch(epoch)
        (z, labels), = loader
        assert torch.equal(z, torch.stack([alone[i][0] for i in range(7)]))
        assert labels.tolist() == alone.labels.tolist()


def test_distribution_of_samples(ready, tmp_path):
    """Posteriors of a constant mean and sigma: samples have both. Without sigma: about half are mirrored."""
    model = toy(tmp_path / "toy")
    head = model.encoder.aggregator.conv_out
    nn.init.zeros_(head.weight)
    head.bias.copy_(torch.tensor([0.5, -1.0, 2.0, *np.log(np.square([0.1, 0.5, 1.0]))]))
    state = checkpoint.load(tmp_path / "toy/ckpt.pt")
    checkpoint.write(tmp_path / "toy/ckpt.pt", state | {"model": model.state_dict()})
    (tmp_path / "photos").symlink_to(ready / "photos")
    call("latents", tmp_path, f"{FLAGS} --dtype fp32")
    z = torch.cat(list(samples(LatentDataset(tmp_path / "out"), 100)), dim=1).flatten(1)     # (3, 11200)
    for channel, mean, sigma in zip(z, (0.5, -1.0, 2.0), (0.1, 0.5, 1.0), strict=True):
        error = sigma / len(channel) ** 0.5
        assert abs(channel.mean() - mean) < 4 * error and abs(channel.std() - sigma) < 4 * error
    toy(tmp_path / "haar", encoder="dwt", latent_channels=12)
    call("latents", tmp_path, f"{FLAGS} --dtype fp32 --out haar-out".replace("toy/", "haar/"))
    cached = LatentDataset(tmp_path / "haar-out")
    mirrored = [torch.allclose(z, cached.moments(i % 7, True)[0], atol=1e-5)
                for i, z in enumerate(samples(cached, 20))]
    original = [torch.allclose(z, cached.moments(i % 7, False)[0], atol=1e-5)
                for i, z in enumerate(samples(cached, 20))]
    assert all(a != b for a, b in zip(mirrored, original, strict=True))
    assert len(mirrored) == 140 and 50 < sum(mirrored) < 90


def samples(cached: LatentDataset, epochs: int):
    for epoch in range(epochs):
        cached.set_epoch(epoch)
        for i in range(len(cached)):
            yield cached[i][0]


def test_scaled_samples(ready):
    """scaling is applied to the sample: (z - shift) * factor."""
    latents = dict(scaling_factor=0.5, shift_factor=0.25, latents_mean=[1, 2, 3], latents_std=[1, 2, 4])
    raw = LatentDataset(ready / "out")[2][0]
    for per_channel, expected in ((False, (raw - 0.25) * 0.5),
                                  (True, torch.stack([raw[0] - 1, (raw[1] - 2) / 2, (raw[2] - 3) / 4]))):
        scaling = LatentScaling.of(latents, per_channel)
        torch.testing.assert_close(LatentDataset(ready / "out", scaling=scaling)[2][0], expected)


def test_shards_leave_no_file_open(ready, tmp_path):
    """A cache may have more shards than a process may have open files."""
    shutil.copytree(ready / "out", tmp_path / "new")                # paths that no other test has mapped
    dataset = LatentDataset(tmp_path / "new")
    assert all(dataset[i][0].isfinite().all() for i in range(len(dataset)))
    assert not any(path.resolve().suffix == ".npy" for path in Path("/proc/self/fd").iterdir())


def test_cut_shard(ready, tmp_path):
    """A shard that lost its end is named before training starts."""
    shutil.copytree(ready / "out", tmp_path / "cut")
    shard = tmp_path / "cut/shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut/shard-00001.npy is damaged .*: repeat the command"):
        LatentDataset(tmp_path / "cut")


def test_no_cache(ready, folder):
    """A folder without index.json, an unfinished cache, and images beyond its end."""
    with pytest.raises(ValueError, match="photos/index.json is damaged or missing"):
        LatentDataset(folder / "photos")
    (folder / "foreign").mkdir()
    (folder / "foreign/index.json").write_text('{"images": 3}')
    with pytest.raises(ValueError, match="not that of latents.py cache: no weights_sha256, data, res"):
        LatentDataset(folder / "foreign")
    forked(folder, FLAGS, dies(os, "replace", 3))
    with pytest.raises(ValueError, match="out is not finished, 5 files are missing: repeat its command"):
        LatentDataset(folder / "out")
    with pytest.raises(IndexError):
        LatentDataset(ready / "out")[7]
