"""Multi-process code: set-up, rank 0, reductions.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE. Without torchrun there is no process group: every call still
works, and the reductions return their input. Only rank 0 writes files; code that writes checks `is_main`.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before init, since its default arguments would hold the group
from torch import Tensor
from tqdm import tqdm

TIMEOUT = timedelta(hours=1)  # ours: rank 0 may index a large archive or fetch weights while the others wait


def init(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started several processes; return this process's device.

    device: cpu, cuda (GPU number LOCAL_RANK), mps (one process only), auto (cuda if available, else cpu).
    Backend: nccl on cuda, else gloo. Raises ValueError if the device is not available.
    """
    several, local = int(os.environ.get("WORLD_SIZE", 1)) > 1, int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    usable = {"cpu": True, "cuda": local < gpus, "mps": torch.backends.mps.is_available() and not several}
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if not usable.get(device, False):
        names = ", ".join(["auto"] + [name for name in usable if usable[name]])
        raise ValueError(f"no device {device!r} for local process {local} ({gpus} GPUs); choose {names}")
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    if several:
        backend, device_id = ("nccl", chosen) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    return chosen


def cleanup() -> None:
    """Leave the process group. Its threads end with it, unless something holds it, such as DDP.

    A thread that outlives the interpreter aborts the process (SIGABRT) if it still has tensors to release.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print0(*args: Any) -> None:
    """print() on rank 0 only, above a tqdm bar instead of through it."""
    if is_main():
        tqdm.write(" ".join(map(str, args)))
        sys.stdout.flush()  # keeps a piped log from lagging behind the bar


# ------------------------------------------------------------------------------------------------------------
# collectives: every process must make the same calls in the same order


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Mean over processes as a new tensor without gradient; use sums if shards differ in size."""
    return sum_(tensor.detach().clone()) / world_size()


def gather(obj: Any) -> list[Any]:
    """Returns the objects of all processes, in order of rank; they must be picklable."""
    boxes = [obj] * world_size()
    if world_size() > 1:
        dist.all_gather_object(boxes, obj)
    return boxes


def broadcast_object(obj: Any) -> Any:
    """Returns rank 0's object on every process; it must be picklable."""
    box = [obj]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(fn: Callable[[], Any]) -> Any:
    """Runs fn() on rank 0 only and returns its result on every process: for decisions, listings, downloads.

    If fn raises, the other processes raise the same message, as a ValueError or OSError if it was one, else
    as a RuntimeError, so no process waits for one that has failed.
    """
    outcome, error = None, None
    if is_main():
        try:
            outcome = fn()
        except Exception as caught:
            error = caught
    kind = next((k for k in (ValueError, OSError) if isinstance(error, k)), RuntimeError)
    outcome, told = broadcast_object((outcome, kind(str(error)) if error else None))
    if told:
        try:
            raise error or told
        finally:
            del error, told    # else the traceback keeps this frame and its callers' objects alive
    return outcome
