"""Time, memory and operations of a function: the instruments of bench.py and plan.py."""

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
from torch.utils.flop_counter import flop_registry

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
    """Counts ATen operations by name, their FLOPs, and the bytes that are alive on a device after each.

    Backward passes and optimizers count too. A storage counts from the operation that makes it until it is
    freed. Storages that were there before count 0: those of `known` tensors, or, without it, of all tensors
    that an operation takes and none has made. A view is an operation without bytes of its own. The buffers
    that an operation uses inside are not seen. FLOPs are those of convolutions and matrix products, by the
    formulas of torch's FLOP counter.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.device, self.takes_known = device, known is None
        self.ops, self.flops, self.live = Counter(), 0, 0
        self.bytes = [0]                                  # alive at the start and after each operation
        self.sizes: dict[int, int] = {}                   # by storage, until it is freed
        for tensor in known or ():
            self.see(tensor, known=True)

    @property
    def peak(self) -> int:
        return max(self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.takes_known:
            for tensor in tensors((args, kwargs)):
                self.see(tensor, known=True)
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            self.see(tensor)
        self.bytes.append(self.live)
        if func.namespace == "aten":                      # not the marks that optimizers set for profilers
            self.ops[str(func)] += 1
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def see(self, tensor: Tensor, known: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == self.device.type and key not in self.sizes:
            self.sizes[key] = 0 if known else storage.nbytes()
            self.live += self.sizes[key]
            weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


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
    with Tally(device) as tally, torch.compiler.set_stance("force_eager"):
        return function(), tally.peak


class Counts(NamedTuple):
    """Of one call: kernels launched (on a CPU: operations), waits of the host for the device, FLOPs."""

    launches: int
    waits: int
    flops: int


def count(function: Callable, device: torch.device) -> Counts:
    """Calls a function once on a CPU, twice on a GPU. Operations and FLOPs are those without compilation."""
    with torch.compiler.set_stance("force_eager"), Tally(device) as tally:
        function()
    launches, waits = tally.ops.total(), tally.ops["aten._local_scalar_dense.default"]
    if device.type == "cuda":
        idle, busy = profiled(lambda: None), profiled(function)     # the profiler itself waits once
        launches, waits = (b - a for a, b in zip(idle, busy, strict=True))
    return Counts(launches, waits, tally.flops)


def profiled(function: Callable) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
    return count_events(event.name for event in profiler.events())


def count_events(names: Iterable[str]) -> tuple[int, int]:
    """(kernel launches, waits of the host) among calls of CUDA's runtime and driver."""
    counts = Counter(names)
    launches = sum(n for name, n in counts.items() if name.startswith(LAUNCHES))
    return launches, sum(counts[name] for name in WAITS)
