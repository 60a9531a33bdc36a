"""Run: python -m pytest tests/test_mishaps.py (-m slow: the long ones). Kills, signals, NaN, full disks.

Each run is a forked child of this process, so that it can be killed for real and still starts at once.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Run, equal, finish, fork, torchrun, write_images
from PIL import Image

import checkpoint
import data
import losses
import train
from runtime import sources

# 12 steps with everything that has a state, saved after each second, validated after each third
FLAGS = (f"--data synthetic {SMALL} --res 64 --disc unet-s --cutmix 0.5 --steps 12 --batch-size 1 --lr 1e-3 "
         "--disc-lr 0.01 --rescale 1 1.5 --save-every 2 --eval-every 3 --val-count 1 --keep 2")
PARTS = ("step", "model", "ema", "disc", "opt", "opt_disc")


def start(folder: Path, flags: str, prepare: Callable[[], None] = lambda: None) -> int:
    return fork("train", folder, flags, prepare)


def run(folder: Path, flags: str, prepare: Callable[[], None] = lambda: None) -> int:
    return finish(start(folder, flags, prepare))


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def assert_same(straight: Path, other: Path) -> None:
    """The same weights, optimizers and log, bit for bit, and nothing half-written left behind."""
    ours, theirs = Run(straight / "run"), Run(other / "run")
    for name in PARTS:
        assert equal(ours.state()[name], theirs.state()[name]), name
    assert ours.lines == theirs.lines
    for name in ("model.pt", "best.pt"):
        assert equal(ours.state(name)["ema"], theirs.state(name)["ema"]), name
    assert not list((other / "run").glob("*.tmp"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """FLAGS from the first step to the last, undisturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder, FLAGS) == 0
    return folder


# ---- kill -9 -----------------------------------------------------------------------------------------------


def dies(owner: object, name: str, call_number: int, half: Callable | None = None) -> Callable[[], None]:
    """prepare(): in its n-th call, owner.name(...) does `half` of its work and the process is killed."""
    def prepare() -> None:
        real, calls = getattr(owner, name), iter(range(1, 1000))

        def deadly(*args, **kwargs):
            if next(calls) < call_number:
                return real(*args, **kwargs)
            if half:
                half(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, deadly)

    return prepare


def half_a_checkpoint(state: dict, file) -> None:
    file.write(b"PK\3\4" + bytes(100_000))
    file.flush()


def half_a_line(log, step: int, values: dict) -> None:
    log.file.write(json.dumps({"step": step, **values})[:40])
    log.file.flush()


MOMENTS = {  # a save is ckpt-<step>.pt, its second name ckpt.pt, model.pt; a validation may write best.pt
    "half of a checkpoint is written": dies(torch, "save", 4, half_a_checkpoint),
    "one network has been updated, the other not": dies(torch.optim.Adam, "step", 10),
    "half of a line is logged": dies(train.Log, "line", 7, half_a_line),
    "a checkpoint is written, but not flushed": dies(os, "fsync", 3),
    "a checkpoint is flushed, but not renamed": dies(os, "replace", 5),
    "a checkpoint has one name of two": dies(os, "link", 2),
    "both names, but no model.pt": dies(checkpoint, "save_weights", 3),
    "older checkpoints are being removed": dies(Path, "unlink", 12),
    "the log is being cut": dies(Path, "replace", 1),
    "backward": dies(torch.Tensor, "backward", 5),
    "validation": dies(train.metrics, "evaluate", 3),
    "the last validation": dies(train.metrics, "evaluate", 8),
    "best.pt": dies(checkpoint, "save_weights", 2),
}
FAST = [*MOMENTS][:3]


@pytest.mark.parametrize("moment", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
                                    for name in MOMENTS])
def test_killed_at_a_moment(straight, tmp_path, moment):
    """Killed there, resumed: bitwise the run that was never killed."""
    assert run(tmp_path, FLAGS, MOMENTS[moment]) == -signal.SIGKILL
    for path in (tmp_path / "run").glob("*.pt"):
        checkpoint.load(path)
    assert run(tmp_path, f"{FLAGS} --resume") == 0
    assert_same(straight, tmp_path)


@pytest.mark.slow
def test_killed_at_20_random_moments(straight, tmp_path):
    """One run, killed 20 times from its start to its end, at moments drawn with a fixed seed."""
    rng, kills, begun = random.Random(0), 0, time.monotonic()
    assert run(tmp_path / "once", FLAGS) == 0
    duration = time.monotonic() - begun
    while kills < 20:
        pid = start(tmp_path, f"{FLAGS} --resume")
        time.sleep(rng.uniform(0, duration / 3))
        os.kill(pid, signal.SIGKILL)
        kills += finish(pid) == -signal.SIGKILL
        if (tmp_path / "run/ckpt.pt").exists():
            if checkpoint.load(tmp_path / "run/ckpt.pt")["step"] == 12:
                assert run(tmp_path, f"{FLAGS} --resume") == 0    # it may have died before the last score
                assert_same(straight, tmp_path)
                shutil.rmtree(tmp_path / "run")                # another round
    assert run(tmp_path, f"{FLAGS} --resume") == 0
    assert_same(straight, tmp_path)


# ---- damaged and missing checkpoints, full disks -----------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_newest_checkpoint(straight, tmp_path, damage):
    """Cut short, or one bit of a weight flipped: said once, and the one before is gone on from, exactly."""
    shutil.copytree(straight, tmp_path / "copy")
    damage(tmp_path / "copy/run/ckpt.pt")
    damage(tmp_path / "copy/run/ckpt-00000012.pt")        # a hard link, which the copy took apart
    (tmp_path / "copy/run/ckpt-00000012.pt").unlink()
    os.link(tmp_path / "copy/run/ckpt.pt", tmp_path / "copy/run/ckpt-00000012.pt")
    assert run(tmp_path / "copy", f"{FLAGS} --resume") == 0
    said = output(tmp_path / "copy")
    assert said.count("ckpt.pt is damaged") == 1 and "ckpt-00000012.pt is damaged" not in said
    assert "resume: run/ckpt-00000010.pt, step 10" in said
    assert_same(straight, tmp_path / "copy")


def test_no_checkpoint_that_loads(straight, tmp_path):
    """One line, exit code 2, and the files stay for whoever wants to look at them."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.pt").write_bytes(b"PK")
    assert run(tmp_path, f"{FLAGS} --resume") == 2
    assert "error: run/ckpt.pt is damaged" in output(tmp_path) and "another --out" in output(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ckpt.pt"]


def test_full_disk(straight, tmp_path):
    """No file may grow past 1 MB: the run ends with one line, then goes on once there is room."""
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    assert run(tmp_path, f"{FLAGS} --steps 6") == 0
    before = {path.name for path in (tmp_path / "run").glob("*.pt")}
    assert run(tmp_path, f"{FLAGS} --resume", small_disk) == 1
    lines = output(tmp_path).splitlines()
    assert [line for line in lines if "error" in line] == [
        "[rank 0] error: cannot write run/ckpt-00000008.pt: [Errno 27] File too large; "
        "go on from the last checkpoint with --resume"]
    assert "Traceback" not in output(tmp_path)
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == before
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["step"] == 6
    assert run(tmp_path, f"{FLAGS} --resume") == 0
    for name in PARTS:
        assert equal(Run(straight / "run").state()[name], Run(tmp_path / "run").state()[name]), name


def test_full_disk_without_hard_links(straight, tmp_path):
    """Links are refused, and later the disk is full when the copy is written: one line, older files stay."""
    def no_links(full_at: int) -> Callable[[], None]:
        calls = iter(range(1, 99))

        def link(*names):
            if next(calls) == full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        return lambda: setattr(os, "link", link)

    assert run(tmp_path, FLAGS, no_links(full_at=2)) == 1
    assert [line for line in output(tmp_path).splitlines() if "error" in line] == [
        "[rank 0] error: cannot write run/ckpt.pt: [Errno 27] File too large; "
        "go on from the last checkpoint with --resume"]
    assert "Traceback" not in output(tmp_path)
    steps = {path.name: checkpoint.load(path)["step"] for path in (tmp_path / "run").glob("ckpt*")}
    assert steps == {"ckpt.pt": 2, "ckpt-00000002.pt": 2, "ckpt-00000004.pt": 4}
    assert run(tmp_path, f"{FLAGS} --resume", no_links(full_at=0)) == 0
    assert_same(straight, tmp_path)


# ---- signals -----------------------------------------------------------------------------------------------


def wait_for_lines(folder: Path, count: int) -> None:
    """Until log.jsonl has that many lines."""
    deadline = time.monotonic() + 60
    path = folder / "run/log.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_signal(straight, tmp_path, number):
    """The step at hand is finished and saved, the exit code is 75, and the resumed run is exact."""
    pid = start(tmp_path, f"{FLAGS} --num-workers 1")
    wait_for_lines(tmp_path, 2)
    os.kill(pid, number)
    assert finish(pid) == train.STOPPED == 75
    state, lines = Run(tmp_path / "run").state(), Run(tmp_path / "run").steps
    assert 2 <= state["step"] == lines[-1]["step"] < 12
    assert f"stopped by a signal after step {state['step']}, saved" in output(tmp_path)
    assert run(tmp_path, f"{FLAGS} --resume") == 0
    for name in PARTS:
        assert equal(Run(straight / "run").state()[name], Run(tmp_path / "run").state()[name]), name
    assert Run(straight / "run").lines == Run(tmp_path / "run").lines


def test_second_sigint_ends_at_once(tmp_path):
    """While a step hangs, the first SIGINT is noted and the second one ends the process."""
    def hang() -> None:
        train.lr_factor = lambda step, *rest: time.sleep(60) if step == 1 else 1.0

    pid = start(tmp_path, FLAGS, hang)
    wait_for_lines(tmp_path, 1)
    time.sleep(0.5)
    begun = time.monotonic()
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
    assert finish(pid) == -signal.SIGINT and time.monotonic() - begun < 5


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


TWO = ("--standalone", "--nproc_per_node=2")


def launch(folder: Path, flags: str, *options: str) -> subprocess.Popen:
    """torchrun with these options, not waited for; flags begin with the script."""
    script, *rest = flags.split()
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / script), *rest]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


@pytest.mark.parametrize("number, options", [
    (signal.SIGTERM, ()),
    pytest.param(signal.SIGUSR1, ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",), marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, (), marks=pytest.mark.slow),
], ids=["SIGTERM", "SIGUSR1", "SIGINT"])  # fmt: skip
def test_stop_signal_under_torchrun(tmp_path, number, options):
    """torchrun hands it to both processes, one good checkpoint is saved, and the resumed run is exact."""
    flags = f"{FLAGS} --steps 8 --batch-size 2 --save-every 99 --eval-every 99"
    whole = torchrun(tmp_path, f"train.py {flags} --out whole")
    assert whole.returncode == 0, whole.stderr
    process = launch(tmp_path, f"train.py {flags}", *TWO, *options)
    wait_for_lines(tmp_path, 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said                  # of torchrun, whatever its processes return
    assert said.count("stopped by a signal after step") == 1, said
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    step = Run(tmp_path / "run").state()["step"]
    assert 2 <= step < 8 and names == {"ckpt.pt", f"ckpt-{step:08d}.pt", "model.pt", "log.jsonl"}
    resumed = torchrun(tmp_path, f"train.py {flags} --resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in PARTS:
        assert equal(Run(tmp_path / "whole").state()[name], Run(tmp_path / "run").state()[name]), name


THREADS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
train.main()
threads = Path("/proc/self/task").glob("*/comm")
assert not [name for name in (path.read_text() for path in threads) if "gloo" in name]
"""


@pytest.mark.parametrize("flags", ["", "--plan"])
def test_no_thread_outlives_a_run(tmp_path, flags):
    """After a run or a plan, no thread of the process group is left to abort the process at its exit."""
    (tmp_path / "threads.py").write_text(THREADS.format(root=str(ROOT)))
    process = launch(tmp_path, f"{tmp_path}/threads.py {FLAGS} --steps 2 --batch-size 2 {flags}", *TWO)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


# ---- numbers that are not finite ---------------------------------------------------------------------------

INJECT = """
import os, sys
sys.path.insert(0, {root!r})
import torch, losses, train
from runtime import distributed
calls, real = iter(range(100)), losses.l1_loss
def l1_loss(x, recon):
    ill = next(calls) in {steps!r} and distributed.rank() == 1
    return real(x, recon) * (float("nan") if ill else 1)
losses.l1_loss = l1_loss
nets, wrap = [], train.wrap
def spied(module):
    nets.append(module)
    return wrap(module)
train.wrap = spied
train.main()
torch.save(nets[0].state_dict(), "weights-" + os.environ["RANK"] + ".pth")
"""


def test_nan_on_one_rank_is_skipped_on_both(tmp_path):
    """The third step of rank 1 is NaN: nothing moves on either rank, all is finite, and the run goes on."""
    (tmp_path / "inject.py").write_text(INJECT.format(root=str(ROOT), steps=[2]))
    flags = f"{FLAGS} --steps 5 --batch-size 2 --save-every 1 --keep 9 --eval-every 99"
    process = launch(tmp_path, f"{tmp_path}/inject.py {flags}", *TWO)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("step 3 skipped, not finite: l1, loss, grad_norm") == 1
    ill = Run(tmp_path / "run")
    assert [line["step"] for line in ill.lines if "skipped" in line] == [3]
    assert not (ill.folder / "ckpt-00000003.pt").exists()
    before, after = (ill.state(f"ckpt-{step:08d}.pt") for step in (2, 4))
    counts = [slot["step"].item() for name in ("opt", "opt_disc") for slot in after[name]["state"].values()]
    assert set(counts) == {3.0}                           # steps 1, 2 and 4
    assert all(w.isfinite().all() for name in ("model", "ema", "disc") for w in after[name].values())
    assert not equal(before["model"], after["model"])
    weights = [torch.load(tmp_path / f"weights-{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert equal(*weights) and equal(weights[0], ill.state()["model"])


@pytest.mark.parametrize("flags", [
    "",
    "--optimizer muon --log-every 5",
    "--disc patch --cutmix 0 --lecam 0.1 --codebook-size 16 --codebook-update ema --log-every 5",
], ids=["adam", "muon", "lecam and codebook"])  # fmt: skip
def test_skipped_step_leaves_everything(tmp_path, flags):
    """Of a run whose last step is NaN the checkpoint is that of the step before, but for the step itself."""
    def ill() -> None:
        real = losses.l1_loss
        losses.l1_loss = lambda x, recon: real(x, recon) * (float("nan") if state["step"] == 2 else 1)
        factor = train.lr_factor
        train.lr_factor = lambda step, *rest: (state.update(step=step), factor(step, *rest))[1]

    state = {"step": 0}
    flags = f"{FLAGS} --steps 3 --save-every 1 --keep 9 --eval-every 99 {flags}"
    assert run(tmp_path, flags, ill) == 0
    before, after = (Run(tmp_path / "run").state(f"ckpt-{step:08d}.pt") for step in (2, 3))
    for name in ("model", "ema", "lecam", "opt", "opt_muon", "opt_disc"):
        assert equal(before[name], after[name]), name


def test_nan_for_good_ends_the_run(tmp_path):
    """Ten steps in a row: exit code 1, one line with a way out and the last good checkpoint, which loads."""
    def ill() -> None:
        real, calls = losses.l1_loss, iter(range(99))
        losses.l1_loss = lambda x, recon: real(x, recon) * (float("nan") if next(calls) > 3 else 1)

    assert run(tmp_path, f"{FLAGS} --steps 99 --save-every 1 --eval-every 99", ill) == 1
    said = output(tmp_path)
    assert [said.count(f"step {step} skipped, not finite: l1") for step in (4, 5, 14, 15)] == [0, 1, 1, 0]
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "error: 10 steps in a row were not finite; lower --lr" in line and line.endswith("run/ckpt.pt")
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["step"] == 4


# ---- data --------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> list[str]:
    """Twelve kinds of files that look like images and are none that can be used; their names."""
    good = write_images(folder, ["good.jpg", "good.png", "good.webp", "good.bmp"])
    jpeg, png, webp = ((good / f"good.{kind}").read_bytes() for kind in ("jpg", "png", "webp"))
    bomb = png[:16] + (100_000).to_bytes(4, "big") * 2 + png[24:]      # a header of 100,000 x 100,000
    contents = {
        "cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": png[: len(png) // 2],
        "cut.webp": webp[: len(webp) // 2], "gif.png": b"GIF89a" + bytes(100),
        "zero.jpg": b"", "text.jpg": b"not an image\n",
        "bomb.png": bomb, "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 100_000)).save(folder / "strip.png")
    Image.new("F", (64, 64)).save(folder / "float.tif")
    (folder / "deleted.jpg").symlink_to(folder / "nothing.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return [*contents, "strip.png", "float.tif", "deleted.jpg", "pipe.jpg"]


def test_a_third_of_the_files_is_broken(tmp_path):
    """12 kinds among 40 files: each is named once and replaced, the run ends, and resumes exactly."""
    names = broken_files(tmp_path / "files")
    write_images(tmp_path / "files", [f"more/{i}.jpg" for i in range(24)])
    assert len(names) == 12 and len(sources.open_source(str(tmp_path / "files"))) == 40
    flags = (f"--data {tmp_path}/files --val-data synthetic {SMALL} --val-count 1 --steps 14 --batch-size 4 "
             f"--save-every 3 --num-workers 1")
    assert run(tmp_path / "whole", flags) == 0
    said = output(tmp_path / "whole")
    assert all(said.count(f"files/{name}: ") == 1 for name in names)
    assert "broken images, named above and replaced: 12" in said
    assert run(tmp_path / "killed", flags, dies(torch.optim.Adam, "step", 8)) == -signal.SIGKILL
    assert run(tmp_path / "killed", f"{flags} --resume") == 0
    ours, theirs = Run(tmp_path / "whole/run"), Run(tmp_path / "killed/run")
    assert equal(ours.state()["model"], theirs.state()["model"]) and ours.lines == theirs.lines


def test_file_deleted_and_forbidden_in_mid_run(tmp_path):
    """Files that vanish or may not be read any more are named, and the run goes on without them."""
    write_images(tmp_path / "files", [f"{i}.png" for i in range(6)])

    def prepare() -> None:
        real = sources._read_file

        def read_file(path: str) -> bytes:
            if path.endswith("1.png"):
                raise PermissionError(13, "Permission denied")
            return real(path)

        sources._read_file = read_file
        factor = train.lr_factor
        train.lr_factor = lambda step, *rest: (step == 1 and os.remove(tmp_path / "files/2.png"),
                                               factor(step, *rest))[1]

    flags = f"--data files --val-data synthetic {SMALL} --steps 8 --save-every 99 --val-count 1"
    assert run(tmp_path, flags, prepare) == 0
    said = output(tmp_path)
    assert "files/1.png: Permission denied" in said and "files/2.png: No such file" in said
    assert "replaced: 2" in said


@pytest.mark.parametrize("death, words", [
    (lambda k: os.kill(os.getpid(), signal.SIGKILL), "is killed by signal: Killed"),
    (lambda k: sys.exit(3), "exited unexpectedly"),
    (lambda k: setattr(sources, "load_reduced", refuse), "broken images in a row"),
], ids=["killed", "exits", "all broken"])  # fmt: skip
def test_worker_that_dies(tmp_path, death, words):
    """One line with what happened and --resume, exit code 1, no traceback, and the checkpoint loads."""
    write_images(tmp_path / "files", [f"{i}.png" for i in range(4)])

    def prepare() -> None:
        real = data.TrainSet.__getitem__

        def getitem(self, k: int):
            if k >= 30:
                death(k)
            return real(self, k)

        data.TrainSet.__getitem__ = getitem

    flags = (f"--data files --val-data synthetic {SMALL} --steps 99 --save-every 1 --val-count 1 "
             "--num-workers 1")
    assert run(tmp_path, flags, prepare) == 1
    errors = [line for line in output(tmp_path).splitlines() if "error" in line]
    assert len(errors) == 1 and words in errors[0] and "--resume" in errors[0]
    assert "Traceback" not in output(tmp_path)
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["step"] > 0


def refuse(content: bytes, least: int):
    raise sources.BrokenImage("made unreadable")


# ---- phases and nodes --------------------------------------------------------------------------------------


def test_parent_is_recorded(tmp_path):
    """A child phase knows its parent's step, flags, data and code, and through it the grandparent."""
    small = f"--data synthetic {SMALL} --steps 1"
    assert run(tmp_path, f"{small} --out a") == 0
    assert run(tmp_path, f"{small} --init a/ckpt.pt --out b --lr 2e-4") == 0
    assert run(tmp_path, f"{small} --init b/best.pt --out c --steps 2") == 0
    assert run(tmp_path, f"{small} --out c --steps 3 --resume") == 0
    child = Run(tmp_path / "c").state()
    parent = child["parent"]
    assert parent["path"] == "b/best.pt" and parent["step"] == 1 and parent["args"]["lr"] == 2e-4
    assert parent["parent"]["path"] == "a/ckpt.pt" and parent["parent"]["parent"] is None
    assert parent["data"] == child["data"] == {"spec": "synthetic", "images": 1_000_000}
    assert child["git"] == parent["git"] == checkpoint.git_hash()
    assert "resume: --steps was 2 and is now 3" in output(tmp_path)


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two torchrun agents that meet on loopback train as one process does on the joined batch."""
    flags = f"--data synthetic {SMALL} --steps 2 --batch-size 4 --lr 0"
    port, agents = free_port(), []
    for node in (0, 1):
        options = ["--nnodes=2", f"--node-rank={node}", "--nproc_per_node=1", "--rdzv-backend=c10d",
                   f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=litevae"]
        agents.append(launch(tmp_path, f"train.py {flags}", *options))
    for agent in agents:
        said, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, said
    assert run(tmp_path, f"{flags} --out one") == 0
    for line, expected in zip(Run(tmp_path / "run").lines, Run(tmp_path / "one").lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_slurm_script(tmp_path):
    """With stand-ins for Slurm's commands: USR1 saves and requeues, and the next job goes on to the end."""
    commands = {
        "srun": '[ "$1" = --cpus-per-task=3 ] && shift && exec "$@"',
        "scontrol": 'echo "$@" >> scontrol.txt; [ "$1" = requeue ] || echo 127.0.0.1',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT),
        "MASTER_PORT": str(free_port()), "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip
    flags = f"{FLAGS} --steps 20 --batch-size 2 --save-every 99 --eval-every 99"
    command = ["bash", str(ROOT / "slurm.sh"), *flags.split()]
    job = subprocess.Popen(command, cwd=tmp_path, env=env)
    wait_for_lines(tmp_path, 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1
    assert (tmp_path / "scontrol.txt").read_text().splitlines()[-1] == "requeue 7"
    assert 2 <= Run(tmp_path / "run").state()["step"] < 20
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1
    assert Run(tmp_path / "run").state()["step"] == 20
