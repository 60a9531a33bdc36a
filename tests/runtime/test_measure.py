"""Run: python -m pytest tests/runtime/test_measure.py. Oracles: sleep, and counts made by hand."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from runtime import measure

CPU = torch.device("cpu")


# ---- time --------------------------------------------------------------------------------------------------


def test_ratio_of_known_durations():
    """Sleeping 90 ms takes three times as long as 30 ms: ours is three times as fast."""
    timing = measure.alternate(partial(time.sleep, 0.03), partial(time.sleep, 0.09), seconds=0.5, device=CPU)
    assert timing.ours == pytest.approx(0.03, rel=0.3) and timing.peer == pytest.approx(0.09, rel=0.3)
    assert timing.ratio == timing.peer / timing.ours == pytest.approx(3, rel=0.3)


@pytest.fixture
def work(monkeypatch):
    """work(name, *durations): a function whose calls take these seconds on a clock of our own, the last for
    ever; work.calls has the names of all calls."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(name: str, *durations: float):
        def function() -> None:
            now[0] += durations[min(make.calls.count(name), len(durations) - 1)]
            make.calls.append(name)

        return function

    make.calls = []
    return make


def test_functions_alternate_and_medians_ignore_outliers(work):
    """Calls in turn; a slow first call and one outlier leave no trace."""
    ours, peer = work("ours", 9, 1, 1, 70, 1), work("peer", 50, 4, 4, 4, 4, 90)
    assert measure.alternate(ours, peer, seconds=80, device=CPU) == (1, 4, 4)
    assert work.calls == ["ours", "peer"] * (len(work.calls) // 2)


def test_at_least_three_measurements(work):
    """Whatever the time allowed, a warm-up and three measurements."""
    measure.alternate(work("ours", 1), work("peer", 2), 0, CPU)
    assert work.calls == ["ours", "peer"] * (1 + measure.ROUNDS)


def test_short_functions_are_called_several_times(work, monkeypatch):
    """A measurement takes LEAST seconds or more, and gives those of one call."""
    monkeypatch.setattr(measure, "LEAST", 0.5)
    assert measure.alternate(work("ours", 0.125), work("peer", 8), 0, CPU) == (0.125, 8, 64)
    counts = [work.calls.count(name) for name in ("ours", "peer")]
    assert counts == [2 + 4 * measure.ROUNDS, 2 + measure.ROUNDS]


# ---- operations --------------------------------------------------------------------------------------------


def by_hand() -> float:
    """Eight operations: ones, mul, add, add_, slice, add, sum, and one that reads a number."""
    a = torch.ones(1000)                                  # 4000 bytes
    b = a * 2                                             # 8000 at once
    del a
    c = b + 1
    c.add_(1)                                             # in place: no bytes
    view = c[10:]                                         # a view: no bytes
    d = view + 1                                          # 990 * 4 more: 11,960
    return d.sum().item()                                 # 4 more


def test_counted_by_hand():
    """Operations, one wait of the host, and the bytes of tensors that are alive at once."""
    assert measure.count(by_hand, CPU) == (8, 1, 0)
    assert measure.peak_memory(by_hand, CPU) == (990 * 5, 11_964)


def test_backward_and_optimizer_count():
    """A linear layer: 2 x 3 x 5 x 7 FLOPs forward and as many for the gradient of its weights."""
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(3, 5)
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)

    def step() -> None:
        (x @ weight).sum().backward()
        optimizer.step()

    # of the two passes and of the optimizer; detach: the gradient is kept
    with measure.Tally(CPU) as tally:
        step()
    names = [name.split(".")[1] for name in tally.ops.elements()]
    assert sorted(names) == sorted(["mm", "sum", "ones_like", "expand", "t", "mm", "detach", "add_"])
    assert measure.count(step, CPU).flops == 2 * (2 * 3 * 5 * 7)
    assert tally.live == weight.nbytes                    # only the gradient is left


def test_what_was_there_before_counts_nothing():
    """Weights that are read or changed in place belong to the time before; a built network counts in full."""
    weights = torch.zeros(1000)
    assert measure.peak_memory(lambda: weights.add_(1), CPU)[1] == 0
    net, peak = measure.peak_memory(lambda: nn.Linear(10, 20), CPU)
    assert peak == 4 * (10 * 20 + 20) and net.out_features == 20


def test_bytes_after_each_operation():
    """fp32 vectors of 1000 numbers: new ones count, views and changes in place do not, freed ones no more."""
    known = torch.ones(1000)
    with measure.Tally(CPU, [known]) as tally:
        a = known + 1                                                 # 4000
        known.mul_(2)
        b = a.view(10, 100).mul_(3)                                   # nothing, twice
        c = torch.stack([a, a])                                       # 12000
        del a
        c = c.sum()                                                   # 4 more, then without c
        del b
        c.add_(1)
    assert tally.bytes == [0, 4000, 4000, 4000, 4000, 12000, 12004, 4] and tally.peak == 12004


def test_events_of_cuda():
    """Launches through the runtime and the driver, graphs included; asynchronous copies are no waits."""
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch", "aten::add",
             "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy",
             "cudaEventRecord"]  # fmt: skip
    assert measure.count_events(names) == (4, 3)
