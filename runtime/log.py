"""What a run learns from its own numbers: reading them off the device, the log, and when to stop."""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from runtime import distributed
from runtime.distributed import print0
from runtime.watch import Watch


class Numbers:
    """The numbers of a training step on their way to the host; `read` waits for them.

    done: the steps that are then done. values: one number for each name, on the device. known: numbers that
    the host has already.
    """

    def __init__(self, done: int, names: list[str], values: Tensor, **known: float) -> None:
        self.done, self.names, self.known, self.arrival = done, names, known, None
        self.values = values.to("cpu", non_blocking=values.is_cuda)     # into pinned memory
        if values.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def read(self) -> dict[str, float]:
        if self.arrival:
            self.arrival.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True)) | self.known


class Waiting:
    """Passes batches on and adds up the seconds that the host waits for them, not for the device."""

    def __init__(self, batches: Iterable) -> None:
        self.batches, self.seconds = iter(batches), 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - begun
        return batch

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Log:
    """Scalars go to <out>/log.jsonl and tensorboard, pictures to tensorboard; does nothing off rank 0.

    lines: the part of log.jsonl that a resumed run keeps (see `history`). The run writes all later lines
    again, so the file ends as if the run had never been interrupted.
    """

    def __init__(self, folder: Path, lines: list[str], start: int) -> None:
        self.file = self.board = None
        if not distributed.is_main():
            return
        path, temporary = folder / "log.jsonl", folder / "log.tmp"
        temporary.write_text("".join(lines))
        temporary.replace(path)
        self.file = open(path, "a", buffering=1)          # by line, so that a crash loses none
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def line(self, step: int, values: dict) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def scalars(self, step: int, values: dict[str, float], **times: float) -> None:
        """times: for tensorboard only, since they would make the log.jsonl of each run another one."""
        self.line(step, values)
        if self.board:
            for name, value in (values | times).items():
                self.board.add_scalar(name, value, step)

    def pictures(self, step: int, x: Tensor, recon: Tensor, latents: Tensor) -> None:
        """Rows of input | reconstruction | difference (x 2, grey is none); a histogram per latent channel."""
        if self.board:
            triples = torch.stack([x, recon, 2 * (recon - x)], dim=1).flatten(0, 1).clamp(-1, 1)
            grid = torchvision.utils.make_grid(triples / 2 + 0.5, nrow=3)
            self.board.add_image("input, reconstruction, difference", grid, step)
            for channel, values in enumerate(latents.transpose(0, 1)):
                if values.isfinite().all():               # a diverged run has no histogram to draw
                    self.board.add_histogram(f"latent/{channel}", values, step)

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.board.close()


class Progress:
    """Reads the numbers of steps, logs them, and decides from them whether to stop.

    The device may still be at work on the last step, so its numbers are read after the next one, or at once
    if they are wanted `now`. data_wait is the mean time per step that this process waited for its batches.
    """

    def __init__(self, log: Log, watch: Watch, bar: tqdm, batches: Waiting) -> None:
        self.log, self.watch, self.bar, self.batches = log, watch, bar, batches
        self.steps = 0                                    # read since the last logged one
        self.unread: deque[tuple[Numbers, bool]] = deque()
        self.skipped = 0                                  # steps in a row that were not finite
        self.stopping = False                             # a signal on one process stops all

    def add(self, numbers: Numbers, logged: bool, now: bool) -> None:
        self.unread.append((numbers, logged))
        while self.unread and (now or self.stopping or len(self.unread) > 1):
            self.read(*self.unread.popleft())

    def read(self, numbers: Numbers, logged: bool) -> None:
        values = numbers.read()
        self.steps += 1
        self.stopping |= values.pop("stop") > 0
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self.skipped = self.skipped + 1 if bad else 0
        if bad:
            self.log.line(numbers.done, {"skipped": bad})
            print0(f"step {numbers.done} skipped, not finite: {', '.join(bad)}")
            return
        if "grad_norm" in values:
            self.watch.gradient(numbers.done, values["grad_norm"])
        if logged:
            values["batch_psnr"] = 10 * math.log10(4 / max(values.pop("mse"), 1e-10))
            wait, self.steps = self.batches.take() / self.steps, 0
            self.log.scalars(numbers.done, values, data_wait=wait)
            if "loss" in values:
                self.bar.set_postfix(loss=f"{values['loss']:.4f}", psnr=f"{values['batch_psnr']:.2f}",
                                     data_wait=f"{wait:.3f}s")


def history(out: Path, start: int) -> tuple[list[str], bool, float]:
    """The lines of log.jsonl up to step `start`, whether `start` was validated, and the best PSNR so far.

    A checkpoint is saved before its step is validated, so a crash in validation loses nothing. The log
    records validations: a resumed run that finds no validation of its first step runs it.
    """
    path = out / "log.jsonl"
    old = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in old if line.endswith("}\n")]               # a crash may cut the last one short
    lines = [line for line in whole if json.loads(line)["step"] <= start]
    validations = [json.loads(line) for line in lines if '"val_psnr"' in line]
    validated = bool(validations) and validations[-1]["step"] == start
    return lines, validated, max(map(best_by, validations), default=-math.inf)


def best_by(scores: dict[str, float]) -> float:
    """The PSNR that decides about best.pt: of the averaged weights if there are any."""
    return scores.get("val_psnr_ema", scores["val_psnr"])
