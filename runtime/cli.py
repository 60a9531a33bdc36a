"""Command-line code shared by the scripts: flag spelling, flag files and one-line errors."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runtime import distributed


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults other than None to the help text; shows integers as N and other numbers as X."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type is amount:
            return "X"
        whole = action.type in (positive, natural)
        return "N" if whole else super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the rules of this project.

    --batch-size and --batch_size are the same flag, and abbreviations are rejected. @file reads flags from a
    file, with several words per line, shell quoting, comments after #, and @other to include another file. A
    wrong flag gives one line and exit code 2.
    """

    def __init__(self, description: str, **options) -> None:
        super().__init__(
            **options,                                    # of a sub-command
            description=description,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
            formatter_class=HelpFormatter,
        )

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        try:
            return super().parse_known_args([hyphens(arg) for arg in args], namespace)
        except ValueError as error:                       # an unclosed quote, or not a text file
            self.error(f"cannot read the flag file: {error}")
        except RecursionError:
            self.error("cannot read the flag file: it includes itself, directly or through other files")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return [hyphens(word) for word in shlex.split(line, comments=True)]

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def natural(text: str) -> int:
    """Parses an integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return int(text)


def resolutions(text: str) -> list[int]:
    """Parses integers of at least 1 with commas between them; sorts them and drops repetitions."""
    return sorted({positive(word) for word in text.split(",")})


def amount(text: str) -> float:
    """Parses a finite number of at least 0: weights, rates, limits."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return float(text)


def hyphens(arg: str) -> str:
    """--batch_size=4 -> --batch-size=4; values are unchanged."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line and exit code 2 on errors that users can cause (ValueError, OSError).

    It wraps only the set-up: any later exception is a bug and shows its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = f"[rank {rank}] " if rank != "0" else ""
        print(f"{prefix}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        distributed.cleanup()
        sys.exit(2)
