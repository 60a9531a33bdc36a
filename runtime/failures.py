"""Signals and failures: what stops a run, and with which exit code."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runtime import distributed
from runtime.sources import NoImages

STOPPED = 75           # exit code: EX_TEMPFAIL of sysexits.h, "try again later"


def catch_signals() -> list[int]:
    """Collects stop signals in the list that it returns, for the loop to read between steps."""
    received: list[int] = []

    def take(number: int, _) -> None:
        if received and number == signal.SIGINT:          # the user insists
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, take)
    return received


@contextmanager
def failures(advice: str = "go on from the last checkpoint with --resume") -> Iterator[None]:
    """Ends a run with one line and exit code 1 on a full disk, lost data or a dead loader process.

    The line ends with `advice`. Any other exception is a defect of ours and shows its traceback.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        ours = isinstance(error, (OSError, NoImages)) or "DataLoader worker" in str(error)
        if not ours:
            raise
        text = str(error).strip().splitlines()[-1].removeprefix("runtime.sources.NoImages: ")
        hint = "; lower --num-workers if memory ran out" if "killed by signal" in text else ""
        print(f"[rank {distributed.rank()}] error: {text}{hint}; {advice}", file=sys.stderr, flush=True)
        sys.exit(1)
