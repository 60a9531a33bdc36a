"""The paper's claims at a small scale: train pairs of arms with several seeds, score them, draw one table.

    python experiments.py --data PHOTOS --val-data HELD_OUT --out out/experiments --jobs 2
    python experiments.py --data PHOTOS --val-data HELD_OUT --out out/experiments --only smc,gaussian

recipes/experiments.toml lists arms, which are flags of train.py, and claims, each of which says that a first
arm is better than a second. Both arms see the same images in the same order, so their difference is paired by
seed; its 95% interval is Student's t over seeds. A claim *agrees* if the whole interval is above 0, is
*opposite* if it is below 0, and else we *cannot tell*.

An interrupted run goes on, a finished one is not repeated, and an arm of several claims is trained once. With
--jobs N, N runs share the cores. docs/experiments.md has our results.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import data
from checkpoint import load_model
from evaluation import metrics, plots
from losses import gaussian_blur
from runtime import cli, distributed, files, sources
from runtime.failures import failures

ROOT = Path(__file__).parent
LIST = str(ROOT / "recipes/experiments.toml")
SIDE = 128                     # pixels of the images that are scored
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)   # Student's t, 1 to 9 degrees
METRICS = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 4), "psnr_high": ("PSNR of x - blur(x), dB", 2)}
COLOURS = {"agrees": plots.GREEN, "opposite": plots.ORANGE, "cannot tell": plots.BLUE}


class Claim(NamedTuple):
    """`first` is better than `second` in `metric`, says `source`; paper: by how much."""

    source: str
    text: str
    first: str
    second: str
    metric: str
    paper: str


class Result(NamedTuple):
    """Means over seeds, the paired difference, the ends of its 95% interval, and what follows."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    verdict: str


# ----------------------------------------------------------------------------
# the list


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--list", metavar="FILE", help="arms and claims (default: recipes/experiments.toml)")
    add("--only", metavar="NAME,NAME", help="claims to test (default: all)")
    add("--data", required=True, metavar="SRC", help="training images, as in train.py")
    add("--val-data", required=True, metavar="SRC", help="images that are scored")
    add("--count", type=cli.positive, default=128, help="how many of them")
    add("--seeds", type=seeds, default=[0, 1, 2], metavar="N,N", help="2 to 10 of them")
    add("--jobs", type=cli.positive, default=1, help="runs at a time")
    add("--out", required=True, metavar="DIR", help="runs, results.json, table.md and claims.png")
    return parser.parse_args(argv)


def seeds(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not 2 <= len(set(numbers)) == len(numbers) <= len(T95) + 1:
        raise argparse.ArgumentTypeError(f"an interval needs 2 to {len(T95) + 1} different seeds, got {text}")
    return numbers


def read_list(path: str, only: str | None) -> tuple[dict[str, list[str]], dict[str, Claim]]:
    """Flags of each arm by phase, with those that all share, and the claims; ValueError on a wrong list."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in ("common", "arms", "claims"):
        if name not in content:
            raise ValueError(f"{path} has no {name!r}")
    arms = {name: [f"{content['common']} {flags}" for flags in phases]
            for name, phases in content["arms"].items()}  # fmt: skip
    claims = {name: make_claim(path, name, claim) for name, claim in content["claims"].items()}
    for name, claim in claims.items():
        if unknown := {claim.first, claim.second} - arms.keys():
            raise ValueError(f"{path}: claim {name} names unknown arms: {', '.join(unknown)}")
        if claim.metric not in METRICS:
            raise ValueError(f"{path}: claim {name} has an unknown metric {claim.metric!r}")
    names = only.split(",") if only else [*claims]
    for name in names:
        if name not in claims:
            raise ValueError(f"no claim {name!r} in {path}: {', '.join(claims)}")
    return arms, {name: claims[name] for name in names}


def make_claim(path: str, name: str, fields: dict[str, str]) -> Claim:
    try:
        return Claim(**{"metric": "psnr", **fields})
    except TypeError as error:
        raise ValueError(f"{path}: claim {name}: {str(error).removeprefix('Claim.__new__() ')}") from None


# ----------------------------------------------------------------------------
# runs


@dataclass
class Run:
    """An arm with a seed. Its folder has a folder for each phase, and scores.json once it is finished."""

    folder: Path
    phases: list[str]
    seed: int
    args: argparse.Namespace

    @property
    def about(self) -> dict:
        args = self.args
        return {"phases": self.phases, "seed": self.seed, "data": args.data, "val_data": args.val_data,
                "count": args.count}

    def finished(self) -> dict[str, float] | None:
        """Its scores; ValueError if they are those of other flags or data."""
        file = self.folder / "scores.json"
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        if found["about"] != self.about:
            raise ValueError(f"{self.folder} has other flags or data: delete it, or choose another --out")
        return found["scores"]

    def scores(self, images: Tensor) -> dict[str, float]:
        """Trains and scores what is missing."""
        if (scores := self.finished()) is None:
            scores = score(self.train(), images)
            with files.whole(self.folder / "scores.json") as file:
                file.write(json.dumps({"about": self.about, "scores": scores}).encode())
        return scores

    def train(self) -> Path:
        """Trains all phases, each from the last; returns the checkpoint. OSError if train.py fails."""
        threads = max(1, distributed.cores() // self.args.jobs)
        last, env = None, os.environ | {"OMP_NUM_THREADS": str(threads)}
        for i, flags in enumerate(self.phases):
            out = self.folder / str(i)
            out.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--seed", str(self.seed),
                       "--data", self.args.data, "--resume", "--out", str(out)]
            with open(out / "output.txt", "a") as log:
                start = ["--init", str(last)] if last else []
                code = subprocess.run(command + start, env=env, stdout=log, stderr=log).returncode
            if code:
                raise OSError(f"train.py ended with exit code {code}, see {out}/output.txt")
            last = out / "ckpt.pt"
        return last


@torch.no_grad()
def score(path: Path, images: Tensor) -> dict[str, float]:
    """Means over uint8 images (N, 3, H, W) of the reconstructions from posterior means, EMA weights."""
    model, _ = load_model(path)
    values = {name: [] for name in METRICS}
    for a in images.split(16):
        x = data.to_float(a)
        b = metrics.to_uint8(model.decode(model.encode(x).mean))
        values["psnr"] += metrics.psnr(a, b).tolist()
        values["ssim"] += metrics.ssim(a, b).tolist()
        values["psnr_high"] += metrics.decibels(high_error(x, data.to_float(b))).tolist()
    return {name: fmean(numbers) for name, numbers in values.items()}


def high_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error without low frequencies, on the 0..1 scale: (B, C, H, W) in [-1, 1] -> (B,)."""
    error = (x - y) / 2
    return (error - gaussian_blur(error)).square().flatten(1).mean(dim=1)


def runs(arms: dict[str, list[str]], claims: Iterable[Claim], args: argparse.Namespace
         ) -> dict[tuple[str, int], Run]:
    """What the claims need, by arm and seed; ValueError if a folder has a run with other flags."""
    names = dict.fromkeys(arm for claim in claims for arm in (claim.first, claim.second))
    found = {(name, seed): Run(Path(args.out) / f"{name}-{seed}", arms[name], seed, args)
             for seed in args.seeds for name in names}
    for run in found.values():
        run.finished()
    return found


def score_all(found: dict[tuple[str, int], Run], jobs: int, images: Tensor) -> dict[str, list[dict]]:
    """Scores of each arm, one for each seed; the first failure ends it once the other jobs are done."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {key: pool.submit(run.scores, images) for key, run in found.items()}
        try:
            for future in tqdm(as_completed(futures.values()), total=len(futures), dynamic_ncols=True):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    scores: dict[str, list[dict]] = {}
    for (name, _), future in futures.items():
        scores.setdefault(name, []).append(future.result())
    return scores


# ----------------------------------------------------------------------------
# results


def compare(first: Sequence[float], second: Sequence[float]) -> Result:
    """Two arms, one number for each seed, paired."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = fmean(differences)
    half = T95[len(differences) - 2] * stdev(differences) / len(differences) ** 0.5
    verdict = "agrees" if mean > half else "opposite" if mean < -half else "cannot tell"
    return Result(fmean(first), fmean(second), mean, mean - half, mean + half, verdict)


def compare_all(claims: Iterable[Claim], scores: dict[str, list[dict]], metric: str = "") -> list[Result]:
    """A result for each claim, in `metric` or its own."""
    return [compare(*([values[metric or claim.metric] for values in scores[arm]]
                      for arm in (claim.first, claim.second))) for claim in claims]


def table(claims: Iterable[Claim], results: list[Result], ssim: list[Result]) -> str:
    """Markdown, one row for each claim; the verdict is that of `results`."""
    lines = ["| claim | source | metric | first | second | difference | in SSIM | the source's | verdict |",
             "|---|---|---|---|---|---|---|---|---|"]
    for claim, result, other in zip(claims, results, ssim, strict=True):
        title, digits = METRICS[claim.metric]
        first, second = (f"{value:.{digits}f}" for value in result[:2])
        cells = (claim.text, claim.source, title, first, second, interval(result, digits),
                 interval(other, 3), claim.paper, result.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(result: Result, digits: int) -> str:
    difference, low, high = (f"{value:+.{digits}f}" for value in result[2:5])
    return f"{difference} ({low} to {high})"


def draw(claims: Iterable[Claim], results: list[Result]) -> plots.Figure:
    """Differences with intervals; those in SSIM are left out, as they have another unit."""
    shown = [(c, r) for c, r in zip(claims, results, strict=True) if c.metric != "ssim"]
    title = "First arm minus second, 95% intervals over seeds"
    figure, ((axis,),) = plots.new(1, 1, 8, 0.4 * len(shown) + 1, title)
    for i, (_, result) in enumerate(shown):
        ends = [[result.difference - result.low], [result.high - result.difference]]
        axis.errorbar([result.difference], [i], xerr=ends, fmt="o", capsize=3, color=COLOURS[result.verdict])
    axis.axvline(0, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(shown)), [claim.text for claim, _ in shown], fontsize="small")
    axis.invert_yaxis()
    axis.set(xlabel="dB")
    return figure


def write(out: Path, claims: dict[str, Claim], results: list[Result], text: str, scores: dict) -> None:
    report = {name: claim._asdict() | result._asdict()
              for (name, claim), result in zip(claims.items(), results, strict=True)}
    with files.whole(out / "results.json") as file:
        file.write(f"{json.dumps({'claims': report, 'scores': scores}, indent=2)}\n".encode())
    with files.whole(out / "table.md") as file:
        file.write(f"{text}\n".encode())
    if plots.available():
        with files.whole(out / "claims.png") as file:
            draw(claims.values(), results).savefig(file, format="png")
    else:
        print("warning: no picture, since matplotlib is missing: pip install -r requirements-plots.txt")


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        arms, claims = read_list(args.list or LIST, args.only)
        found = runs(arms, claims.values(), args)
        sources.open_source(args.data)
        held_out = data.ValSet(sources.open_source(args.val_data, held_out=True), SIDE, args.count)
        images = torch.stack([held_out[i][0] for i in range(len(held_out))])
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with failures("repeat the command to go on"):
        scores = score_all(found, args.jobs, images)
        results = compare_all(claims.values(), scores)
        text = table(claims.values(), results, compare_all(claims.values(), scores, "ssim"))
        write(Path(args.out), claims, results, text, scores)
    print(text)


if __name__ == "__main__":
    main()
