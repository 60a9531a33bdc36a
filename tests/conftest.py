"""train.py and eval.py in this process, at toy size: what the tests of the scripts share."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
from discriminators import PatchGAN, UNetDiscriminator
from model import Autoencoder
from synthetic import dead_leaves
from variants.build import build
from variants.config import AutoencoderConfig
from variants.gigagan import GigaGANDiscriminator
from variants.stylegan import StyleGANDiscriminator

ROOT = Path(__file__).parents[1]
# one of the smallest runs there are: 1.1M parameters, half a second
SMALL = ("--scale S --dec-channels 8 --dec-blocks 1 --res 32 --disc none --lpips-weight 0 --steps 2 "
         "--warmup 0 --clip 0 --batch-size 2 --num-workers 0 --val-count 2 --log-every 1 --device cpu "
         "--precision fp32 --out run")

TOY = dict(extractor_channels=4, extractor_mult=(1,), aggregator_channels=4, aggregator_mult=(1,),
           latent_channels=3, decoder_channels=4, decoder_blocks=1)  # fmt: skip

# each kind of discriminator, small enough for float64 and for many passes, for images of 64 x 64
SMALL_DISCS = {
    "patch": lambda in_channels=3: PatchGAN(in_channels, width=4),
    "unet": lambda in_channels=3: UNetDiscriminator(in_channels, width=2),
    "stylegan": lambda in_channels=3: StyleGANDiscriminator(in_channels, res=64, base=128),
    "gigagan": lambda in_channels=3: GigaGANDiscriminator(in_channels, width=4),
}


def call(script: str, folder: Path, flags: str) -> None:
    """main() of train.py or eval.py in `folder`, on one thread: a busy machine then costs little.

    train.py leaves its signal handlers behind. Those from before are put back, since a child that is forked
    later would survive SIGTERM otherwise.
    """
    threads = torch.get_num_threads()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
            importlib.import_module(script).main()
    finally:
        torch.set_num_threads(threads)
        for n, handler in handlers.items():
            signal.signal(n, handler)


def fork(script: str, folder: Path, flags: str, prepare: Callable[[], None]) -> int:
    """`call` in a forked child, after prepare(), its output appended to output.txt; the child's pid."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with open(folder / "output.txt", "a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            prepare()
            call(script, folder, flags)
            code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Run:
    """What a training left in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def state(self, name: str = "ckpt.pt") -> dict:
        return torch.load(self.folder / name, weights_only=True, mmap=True)

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict]:
        """The lines of training steps, without those of validation."""
        return [line for line in self.lines if "batch_psnr" in line]


def train_in(folder: Path, flags: str) -> Run:
    """A small training on synthetic images; flags override SMALL."""
    flags = f"--data synthetic {SMALL} {flags}"
    call("train", folder, flags)
    return Run(folder / flags.split("--out ")[-1].split()[0])


@pytest.fixture
def train_run(tmp_path):
    """train_run(flags) trains in an empty folder of its own and returns the Run."""
    return lambda flags="": train_in(tmp_path, flags)


@pytest.fixture(scope="session")
def parent(tmp_path_factory) -> Run:
    """A finished run of two steps with a discriminator, for whoever needs a checkpoint; left as it is."""
    return train_in(tmp_path_factory.mktemp("parent"), "--res 64 --disc unet-s --lr 1e-3 --conv1x1")


# one of the smallest models there are, with f = 4
TINY = dict(levels=2, extractor_channels=8, extractor_mult=(1,), aggregator_channels=8, aggregator_mult=(1,),
            latent_channels=4, decoder_channels=8, decoder_blocks=1)


def tiny_checkpoint(folder: Path, latents: dict | None = None, **options) -> Path:
    """A checkpoint of a TINY model with these options: random in all parameters, and so is its average."""
    torch.manual_seed(0)
    config = AutoencoderConfig(**TINY | options)
    model, ema = build(config), build(config)
    for parameter in (*model.parameters(), *ema.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = dict(step=3, config=asdict(config), args={}, git="abc", versions={"torch": "2"})
    state |= dict(model=model.state_dict(), ema=ema.state_dict())
    checkpoint.save(folder, state | ({"latents": latents} if latents else {}), keep=0)
    return folder / "ckpt.pt"


def toy(folder: Path, **options) -> Autoencoder:
    """A checkpoint folder/ckpt.pt of a tiny model with random weights, for images of 32 px; the model."""
    torch.manual_seed(0)
    config = AutoencoderConfig(**TOY | options)
    model = build(config).eval().requires_grad_(False)
    for conv in model.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    checkpoint.save(folder, dict(step=0, config=asdict(config), args={"res": 32}, model=model.state_dict(),
                                 ema=None), keep=0)
    return model


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(script, flags): the one line on stderr, after exit code 2 and with nothing written."""
    monkeypatch.delenv("IMAGENET", raising=False)

    def run(script: str, flags: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            call(script, tmp_path, flags)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1 and line.endswith("\n"), line
        assert line.startswith(("error: ", f"{script}.py")) and "error: " in line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def torchrun(folder: Path, flags: str, **env: str) -> subprocess.CompletedProcess:
    """torchrun with two processes on the CPU, in `folder`; flags begin with the script."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               *f"{ROOT}/{flags}".split()]
    return subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)


def crash(monkeypatch, step: int):
    """The next run dies at the beginning of this step."""
    real = importlib.import_module("train").lr_factor

    def lr_factor(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return real(now, *rest)

    monkeypatch.setattr("train.lr_factor", lr_factor)


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def write_images(folder: Path, names: list[str], side: int = 64) -> Path:
    """Dead-leaves pictures 0, 1, 2, ... under these names, a little wider than high."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        strip = dead_leaves(8, i, side)[:, : side // 8 + i]
        picture = np.concatenate([dead_leaves(7, i, side), strip], axis=1)
        Image.fromarray(picture).save(path)
    return folder
