"""Time, memory and operations of a function: the instruments of bench.py."""

import gc
import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 3        # least number of measurements of a function
LEAST = 0.005     # seconds; shorter functions are called several times in a measurement
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")     # how names of calls begin
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")

# ----------------------------------------------------------------------------
# time


class Timing(NamedTuple):
    """Median seconds per call, and how many times as fast ours is."""

    ours: float
    peer: float
    ratio: float


def alternate(ours: Callable, peer: Callable, seconds: float, device: torch.device) -> Timing:
    """Time two functions in turn for about `seconds` after a warm-up, and at least ROUNDS times each."""
    for function in (ours, peer):                         # compiles, chooses kernels, fills caches
        function()
    first = clock(ours, 1, device), clock(peer, 1, device)
    counts = [math.ceil(LEAST / taken) for taken in first]
    rounds, end = [first] if counts == [1, 1] else [], time.perf_counter() + seconds
    while len(rounds) < ROUNDS or time.perf_counter() < end:
        rounds.append((clock(ours, counts[0], device), clock(peer, counts[1], device)))
    a, b = map(statistics.median, zip(*rounds, strict=True))
    return Timing(a, b, b / a)


def clock(function: Callable, count: int, device: torch.device) -> float:
    """Seconds per call, over `count` calls in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronise(device)
    return (time.perf_counter() - start) / count


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------
# operations and memory


class Tally(TorchDispatchMode):
    """Counts ATen operations by name, and the bytes of the tensors that were made since it was entered.

    Backward passes and optimizers count too. A view is an operation without bytes of its own. Buffers that an
    operation uses inside are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.live, self.peak = Counter(), 0, 0
        self.seen: dict[int, int] = {}                    # bytes by id of the storage, until it is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors((args, kwargs)):
            self.see(tensor, known=True)                  # else it was there before
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":                      # not the marks that optimizers set for profilers
            self.ops[str(func)] += 1
        for tensor in tensors(out):
            self.see(tensor)
        return out

    def see(self, tensor: Tensor, known: bool = False) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen[id(storage)] = 0 if known else storage.nbytes()
            self.live += self.seen[id(storage)]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage)).atexit = False

    def forget(self, key: int) -> None:
        self.live -= self.seen.pop(key)


def tensors(nested: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(nested, Tensor):
        return [nested]
    parts = nested.values() if isinstance(nested, dict) else nested
    return [t for part in parts for t in tensors(part)] if isinstance(nested, dict | list | tuple) else []


def peak_memory(function: Callable, device: torch.device) -> tuple[Any, int]:
    """Result of a function, and the peak of its bytes above those in use before.

    On a GPU the bytes are the allocator's. On a CPU they are those of tensors, without compilation.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        return result, torch.cuda.max_memory_allocated(device) - before
    with Tally() as tally, torch.compiler.set_stance("force_eager"):
        return function(), tally.peak


class Counts(NamedTuple):
    """Of one call: kernels launched (on a CPU: operations), waits of the host for the device, FLOPs."""

    launches: int
    waits: int
    flops: int


def count(function: Callable, device: torch.device) -> Counts:
    """Calls a function once on a CPU, twice on a GPU. Operations and FLOPs are those without compilation."""
    # the tally is entered last: it sees an operation before the flop counter takes it apart
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops, Tally() as tally:
        function()
    launches, waits = tally.ops.total(), tally.ops["aten._local_scalar_dense.default"]
    if device.type == "cuda":
        idle, busy = profiled(lambda: None), profiled(function)     # the profiler itself waits once
        launches, waits = (b - a for a, b in zip(idle, busy, strict=True))
    return Counts(launches, waits, flops.get_total_flops())


def profiled(function: Callable) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
    return count_events(event.name for event in profiler.events())


def count_events(names: Iterable[str]) -> tuple[int, int]:
    """(kernel launches, waits of the host) among calls of CUDA's runtime and driver."""
    counts = Counter(names)
    launches = sum(n for name, n in counts.items() if name.startswith(LAUNCHES))
    return launches, sum(counts[name] for name in WAITS)
