"""Run: make gpu, on a machine with a GPU. What a CPU cannot show; no other test needs a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Run, call, equal, write_images
from formulas import write_formula_file
from test_recipes import RECIPES

import bench
import data
import train
from runtime import distributed, measure
from runtime.sources import SyntheticSource

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEFAULT = "--data synthetic --scale B --lpips-weight 0 --val-count 8 --num-workers 2 --device cuda"
# any system at a small width, for tests of whether it runs at all
TINY = ("--data synthetic --val-data synthetic --val-count 2 --res 64 --dec-channels 16 --dec-blocks 1 "
        "--batch-size 4 --micro-batch 0 --num-workers 0 --warmup 0 --disc-start 0 --log-every 1 --keep 0 "
        "--eval-every 99 --save-every 99 --steps 3 --device cuda --no-compile --lpips-weight 0 "
        "--vgg19-weight 0 --identity-weight 0 --out run")


def train_on_gpu(folder: Path, flags: str) -> Run:
    call("train", folder, flags)
    return Run(folder / flags.split("--out ")[-1].split()[0])


# ---- numbers -----------------------------------------------------------------------------------------------


STEP = "--batch-size 4 --steps 1 --log-every 1 --val-count 1 --out run"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Run:
    """One step of the default recipe at batch 4 in fp32 on the CPU, from step 0's weights."""
    flags = DEFAULT.replace("cuda", "cpu")
    return train_on_gpu(tmp_path_factory.mktemp("cpu"), f"{flags} {STEP} --precision fp32")


@pytest.mark.parametrize("flags, tolerance", [
    ("--precision fp32 --no-compile", 2e-3),
    ("--precision bf16 --no-compile", 2e-2),
    ("--precision bf16 --compile", 2e-2),
], ids=["fp32", "bf16", "compiled"])  # fmt: skip
def test_default_recipe_agrees_with_the_cpu(tmp_path, on_cpu, flags, tolerance):
    """The losses of the first step: TF32 has 10 bits of mantissa, bf16 has 7."""
    line, expected = train_on_gpu(tmp_path, f"{DEFAULT} {STEP} {flags}").steps[0], on_cpu.steps[0]
    assert line.keys() == expected.keys()
    for name in ("loss", "l1", "wavelet", "gaussian", "kl", "disc", "batch_psnr"):
        assert line[name] == pytest.approx(expected[name], rel=tolerance), name
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)


def test_default_recipe_learns(tmp_path):
    """60 steps at batch 16, compiled: better at the end than after 20."""
    flags = f"{DEFAULT} --batch-size 16 --warmup 20 --steps 60 --eval-every 20 --out run"
    run = train_on_gpu(tmp_path, flags)
    scores = [line["val_psnr"] for line in run.lines if "val_psnr" in line]
    assert scores[-1] > scores[0] and run.state()["step"] == 60


# ---- resume ------------------------------------------------------------------------------------------------


def test_killed_run_resumes(tmp_path):
    """kill -9 after the save of step 10, then a resume: the losses of 20 steps in a row, within 2%."""
    flags = f"{DEFAULT} --res 64 --batch-size 8 --steps 20 --save-every 10 --log-every 1 --no-compile"
    straight = train_on_gpu(tmp_path, f"{flags} --out straight")
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "killed/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = train_on_gpu(tmp_path, f"{flags} --resume --out killed")
    assert [line["step"] for line in resumed.steps] == list(range(1, 21))
    for line, expected in zip(resumed.steps, straight.steps, strict=True):
        assert line["l1"] == pytest.approx(expected["l1"], rel=0.02)


# ---- waiting for the device --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--disc unet-s", "--disc unet-s --compile", "--disc patch --adaptive-weight --lecam 0.1",
    "--disc none --optimizer muon", "--codebook-size 64 --disc none --cutmix 0",
], ids=["default", "compiled", "adaptive", "muon", "codebook"])  # fmt: skip
def test_no_step_waits(tmp_path, monkeypatch, flags):
    """A step that is not logged waits for the device nowhere; the first two may, to choose kernels."""
    step = train.Trainer.step

    def watched(trainer, number, batches, stop):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            return step(trainer, number, batches, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train.Trainer, "step", watched)
    run = train_on_gpu(tmp_path, f"{TINY} {flags} --scale S --steps 6 --log-every 99")
    assert run.state()["step"] == 6


# ---- the plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--gradient-checkpointing"], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plan(tmp_path, monkeypatch, capsys, precision, flags):
    """Predicted memory of the default, not compiled, is within a quarter of what torch allocates."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = f"--batch-size 16 --device cuda --no-compile --precision {precision} {flags}"
    call("train", tmp_path, f"--plan {flags}")
    error = re.search(r"\(allocated by torch\), error ([+-][\d.]+)%", capsys.readouterr().out)[1]
    assert abs(float(error)) < 25


# ---- every system ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_three_steps(tmp_path, monkeypatch, name):
    """At a small size, in bf16; the weights of its losses that need files are 0 here."""
    monkeypatch.chdir(ROOT)
    flags = [f"@recipes/{name}.args", *TINY.split(), "--out", str(tmp_path / "run")]
    if train.parse_args(flags).init:
        pytest.skip("continues from a checkpoint of another recipe")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    lines = Run(tmp_path / "run").steps
    assert [line["step"] for line in lines] == [1, 2, 3]


# ---- evaluation, processes ---------------------------------------------------------------------------------


def test_eval_with_all_metrics(tmp_path, monkeypatch):
    """LPIPS and rFID with formula-made weights: GPU and CPU agree."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("vgg", "alex", "inception"):
        write_formula_file(name, tmp_path / "torch")
    write_images(tmp_path / "pictures", [f"{i}.png" for i in range(12)], side=64)
    train_on_gpu(tmp_path, f"{TINY} --scale S --disc none --steps 1")
    for device in ("cpu", "cuda"):
        call("eval", tmp_path, f"run/ckpt.pt --data pictures --res 64 --device {device} --json {device}.json "
                               "--metrics psnr,ssim,lpips,rfid")
    cpu, gpu = (json.loads((tmp_path / f"{device}.json").read_text()) for device in ("cpu", "cuda"))
    assert gpu["psnr"] == pytest.approx(cpu["psnr"], abs=0.05)
    assert gpu["ssim"] == pytest.approx(cpu["ssim"], abs=0.002)


def test_nccl_with_one_process():
    """A group of one process over nccl: the collectives that training uses."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    try:
        x = torch.arange(4.0, device="cuda")
        dist.all_reduce(x)
        assert equal(distributed.mean(x).cpu(), torch.arange(4.0))
        assert distributed.broadcast_object({"a": 1}) == {"a": 1} and distributed.gather(2) == [2]
    finally:
        distributed.cleanup()


def test_loader_pins_its_batches():
    """Images and noise arrive in pinned memory, so that copies to the device need no wait."""
    samples = data.TrainSet(SyntheticSource(), 32, 0, latent_shape=(12, 4, 4))
    loader = data.train_loader(samples, data.GlobalBatchSampler(2, 1, 0, 1, 0, 1), 0, "cuda")
    (images, noise), _ = next(iter(loader))
    assert images.is_pinned() and noise.is_pinned()


# ---- instruments -------------------------------------------------------------------------------------------


def test_counts_and_memory():
    """Three additions, a sum (one or two kernels) and the wait for it; two tensors alive at once."""
    device, x = torch.device("cuda"), torch.zeros(1 << 22, device="cuda")

    def work() -> float:
        for _ in range(3):
            x.add_(1)
        return x.sum().item()

    launches, waits, _ = measure.count(work, device)
    assert launches in (4, 5) and waits == 1
    assert measure.peak_memory(lambda: (x + 1) * 2, device)[1] == pytest.approx(2 * x.nbytes, rel=0.2)


def test_benchmark(tmp_path, monkeypatch):
    """Every section at toy size, with all peers."""
    toy = bench.Sizes((2, 32), ((1, 64),), ((1, 64),), ((2, 64),), (2, 64), files=2, matmul=64)
    monkeypatch.setitem(bench.SIZES, "cuda", toy)
    call("bench", tmp_path, "--seconds 0.01 --json bench.json")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["section"] for row in rows} == set(bench.SECTIONS)
    assert all(row["ours"] > 0 for row in rows if row["unit"] != "waits")
    assert all(row["ours"] == 0 for row in rows if row["unit"] == "waits")
