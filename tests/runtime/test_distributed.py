"""Run: python -m pytest tests/test_distributed.py. Two gloo processes, started once; sums by hand."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from runtime import distributed


def caught(fn) -> str:
    """What the call raised, as 'Type: text'."""
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refuse(error: Exception):
    raise error


def threads() -> list[str]:
    """Names of this process's threads that work for the group."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]


def worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes: make every call once and leave the results in folder/<rank>.pt."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device, log = distributed.init("cpu"), folder / "log"
    summed, kept = torch.tensor([1.0, 10.0]) * (rank + 1), torch.tensor(float(rank), requires_grad=True)
    result = dict(
        device=str(device), size=distributed.world_size(),
        rank=distributed.rank(), main=distributed.is_main(),
        returned=distributed.sum_(summed), summed=summed, mean=distributed.mean(kept), kept=kept.detach(),
        object=distributed.broadcast_object({"from": rank}),
        first=distributed.from_main(lambda: (rank, log.exists(), log.touch())),
        value_error=caught(lambda: distributed.from_main(lambda: refuse(UnicodeError("bad flag 7")))),
        os_error=caught(lambda: distributed.from_main(lambda: refuse(FileNotFoundError("no file x")))),
        other_error=caught(lambda: distributed.from_main(lambda: refuse(KeyError("k")))),
    )
    torch.optim.Adam([kept])                              # the first one imports parts of torch.distributed
    working = threads()
    distributed.cleanup()
    result |= dict(size_after=distributed.world_size(), threads=(working, threads()))
    torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_know_who_they_are(both):
    """torchrun's variables give rank and world size; one process is the main one; cleanup ends it."""
    assert [r["rank"] for r in both] == [0, 1]
    assert [r["main"] for r in both] == [True, False]
    assert all(r["size"] == 2 and r["device"] == "cpu" and r["size_after"] == 1 for r in both)


def test_no_thread_of_the_group_is_left(both):
    """The group has threads, and cleanup ends them."""
    assert all(working and not left for working, left in (r["threads"] for r in both))


def test_reductions(both):
    """sum_ works in place and returns its argument; mean leaves its argument alone."""
    for rank, result in enumerate(both):
        assert result["summed"].tolist() == result["returned"].tolist() == [3.0, 30.0]
        assert result["mean"].item() == 0.5 and result["kept"].item() == rank


def test_rank_0_is_heard(both):
    """Every rank gets rank 0's object; from_main calls the function there alone, once."""
    assert [r["object"] for r in both] == [{"from": 0}] * 2
    assert [r["first"] for r in both] == [(0, False, None)] * 2


def test_an_error_of_rank_0_reaches_every_rank(both):
    """Nobody hangs: the others raise the same text as a ValueError, OSError or RuntimeError."""
    assert [r["value_error"] for r in both] == ["UnicodeError: bad flag 7", "ValueError: bad flag 7"]
    assert [r["os_error"] for r in both] == ["FileNotFoundError: no file x", "OSError: no file x"]
    assert [r["other_error"] for r in both] == ["KeyError: 'k'", "RuntimeError: 'k'"]


def test_one_process_needs_no_set_up(capsys):
    """Without torchrun the collectives hand back what they got and rank 0 prints."""
    x = torch.tensor([1.0, 2.0])
    assert distributed.sum_(x) is x and distributed.mean(x).tolist() == [1.0, 2.0]
    assert distributed.broadcast_object(x) is x and distributed.from_main(lambda: 7) == 7
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert caught(lambda: distributed.from_main(lambda: refuse(ValueError("no")))) == "ValueError: no"
    distributed.cleanup()
    distributed.print0("step", 3)
    assert capsys.readouterr().out == "step 3\n"


def test_only_rank_0_prints(capfd, monkeypatch):
    """print0 is silent elsewhere."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    distributed.print0("step", 3)
    assert capfd.readouterr().out == ""


def test_devices(monkeypatch):
    """auto is cuda where there is one; a device that is missing or unknown is named in a ValueError."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.init("auto") == distributed.init("cpu") == torch.device("cpu")
    for name in ("cuda", "mps", "tpu", "cuda:0"):
        with pytest.raises(ValueError, match=f"no device '{name}' .* .0 GPUs.; choose auto, cpu$"):
            distributed.init(name)


def test_more_processes_than_gpus(monkeypatch):
    """Local process 2 on a machine with two GPUs gets a ValueError and not another one's GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"no device 'cuda' for local process 2 \(2 GPUs\)"):
        distributed.init("auto")
