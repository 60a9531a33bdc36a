"""Run: python -m pytest tests/test_experiments.py. Oracles: SciPy's paired t test, and numbers by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, tiny_checkpoint
from scipy import stats

import data
import experiments
import train
from checkpoint import load_model
from evaluation import metrics, plots
from experiments import Claim, compare
from model import count_macs, count_parameters
from variants import options
from variants.build import build

ARMS, CLAIMS = experiments.read_list(experiments.LIST, "")
TOML = '''
common = """--scale S --dec-channels 8 --dec-blocks 1 --res 32 --batch-size 2 --steps 1 --warmup 1
    --lpips-weight 0 --disc none --num-workers 0 --val-count 2 --precision fp32 --device cpu"""
[arms]
base = [""]
two = ["--lr 1e-3", "--steps 2"]
[claims.more]
source = "ours"
text = "two phases against one"
first = "two"
second = "base"
paper = "-"
'''
FLAGS = "--list list.toml --data synthetic --val-data synthetic --count 2 --seeds 0,1 --out out"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "list.toml").write_text(TOML)
    return tmp_path


@pytest.fixture
def commands(folder, monkeypatch) -> list[list[str]]:
    """The commands that would train; instead each leaves a checkpoint of random weights."""
    called = []

    def run(command: list[str], **_) -> SimpleNamespace:
        called.append(command[2:])
        tiny_checkpoint(folder / command[command.index("--out") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=run))
    return called


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 11))
def test_interval_is_students(count):
    """Difference and interval of SciPy's paired t test, for every number of seeds that is allowed."""
    first, second = np.random.default_rng(count).normal(size=(2, count))
    result = compare(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-3)
    assert (result.first, result.second) == pytest.approx((first.mean(), second.mean()))


def test_verdicts():
    """The whole interval has to be on one side."""
    assert compare([2, 2.1, 2], [1, 1, 1]).verdict == "agrees"
    assert compare([1, 1, 1], [2, 2.1, 2]).verdict == "opposite"
    assert compare([1, 3, 2], [1, 1, 2]).verdict == "cannot tell"


def test_error_of_the_high_pass():
    """A constant has none; a checkerboard of +-0.2 keeps what its blur, a thousandth of it, leaves."""
    x = torch.rand(1, 3, 16, 16) - 0.5
    assert experiments.high_error(x, x + 0.3).item() < 1e-12
    board = 0.2 * (1 - 2 * (torch.arange(16) + torch.arange(16)[:, None]).remainder(2)).float()
    assert experiments.high_error(x, x + board).item() == pytest.approx(0.1**2, rel=0.02)


# ---- our list ----------------------------------------------------------------------------------------------


def test_our_list():
    """train.py accepts every phase of every arm, each arm is in a claim, and all are of one seed's data."""
    for phases in ARMS.values():
        for flags in phases:
            args = train.parse_args(flags.split())
            options.check(args)
            given = {word.lstrip("-").replace("-", "_") for word in flags.split()}
            assert not options.idle(args).keys() & given
    assert {arm for claim in CLAIMS.values() for arm in (claim.first, claim.second)} == ARMS.keys()


def encoder(arm: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build(options.build_config(train.parse_args(ARMS[arm][0].split()))).encoder


def test_small_sd_vae_costs_what_litevae_does():
    """As many parameters within 2%, as many operations within 3%."""
    parameters = [count_parameters(encoder(name)) for name in ("base", "sd-parameters")]
    macs = [count_macs(encoder(name), 1, 3, 64, 64) for name in ("base", "sd-macs")]
    assert parameters[1] / parameters[0] == pytest.approx(1, abs=0.02)
    assert macs[1] / macs[0] == pytest.approx(1, abs=0.03)


# ---- from outside ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_runs(folder):
    """Two jobs at a time give the scores of one after the other; the second phase begins with the first."""
    call("experiments", folder, f"{FLAGS} --jobs 2")
    call("experiments", folder, f"{FLAGS} --out alone")
    scores = [json.loads((folder / name / "results.json").read_text())["scores"] for name in ("out", "alone")]
    for name in ("two", "base"):                                  # threads differ, and rounding with them
        for together, alone in zip(scores[0][name], scores[1][name], strict=True):
            assert together == pytest.approx(alone, abs=1e-3)
    assert scores[0]["two"][0] != scores[0]["two"][1] != scores[0]["base"][1]
    second = torch.load(folder / "out/two-1/1/ckpt.pt", weights_only=True)
    assert (second["step"], second["args"]["seed"]) == (2, 1)
    assert second["args"]["init"] == "out/two-1/0/ckpt.pt"


def test_what_is_run(folder, commands, capsys):
    """Phases in turn with one seed; table, JSON and picture; a second call trains and scores nothing."""
    call("experiments", folder, FLAGS)
    arms, _ = experiments.read_list(str(folder / "list.toml"), "")
    first, second = (flags.split() for flags in arms["two"])
    seed = ["--seed", "0", "--data", "synthetic", "--resume", "--out"]
    assert commands[:2] == [[*first, *seed, "out/two-0/0"],
                            [*second, *seed, "out/two-0/1", "--init", "out/two-0/0/ckpt.pt"]]
    assert [command[-1] for command in commands[2:]] == [
        "out/base-0/0", "out/two-1/0", "out/two-1/0/ckpt.pt", "out/base-1/0"]

    report = json.loads((folder / "out/results.json").read_text())
    claim, scores = report["claims"]["more"], report["scores"]
    assert scores.keys() == {"two", "base"} and all(len(rows) == 2 for rows in scores.values())
    expected = compare([row["psnr"] for row in scores["two"]], [row["psnr"] for row in scores["base"]])
    assert {name: claim[name] for name in expected._fields} == expected._asdict()
    table = (folder / "out/table.md").read_text()
    assert table == capsys.readouterr().out[-len(table):] and "two phases against one" in table
    ssim = compare([row["ssim"] for row in scores["two"]], [row["ssim"] for row in scores["base"]])
    assert f"| {ssim.difference:+.3f} ({ssim.low:+.3f} to {ssim.high:+.3f}) | - |" in table
    assert (folder / "out/claims.png").stat().st_size > 1000

    call("experiments", folder, FLAGS)
    assert len(commands) == 6 and json.loads((folder / "out/results.json").read_text()) == report


def test_scores(tmp_path):
    """Means over images: PSNR and SSIM as in eval.py, from the average of the weights."""
    images = torch.randint(0, 256, (17, 3, 32, 32), dtype=torch.uint8)
    path = tiny_checkpoint(tmp_path)
    found, (model, _) = experiments.score(path, images), load_model(path)
    with torch.no_grad():
        recon = metrics.to_uint8(model.decode(model.encode(data.to_float(images)).mean))
    assert found["psnr"] == pytest.approx(metrics.psnr(images, recon).mean().item(), abs=1e-3)
    assert found["ssim"] == pytest.approx(metrics.ssim(images, recon).mean().item(), abs=1e-4)
    assert found["psnr_high"] > found["psnr"]


def test_a_run_that_fails(folder, monkeypatch, capsys):
    """One line that names the output of train.py, exit code 1, and no results."""
    failed = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=2))
    monkeypatch.setattr(experiments, "subprocess", failed)
    with pytest.raises(SystemExit) as stop:
        call("experiments", folder, FLAGS)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "train.py ended with exit code 2, see out/two-0/0/output.txt" in line
    assert not (folder / "out/results.json").exists()


def test_other_flags_than_before(folder, refused):
    """Scores of other flags are not taken for those of these."""
    run = experiments.Run(folder / "out/base-0", ["--lr 1"], 0, experiments.parse_args(FLAGS.split()))
    (folder / "out/base-0").mkdir(parents=True)
    (folder / "out/base-0/scores.json").write_text(json.dumps({"about": run.about, "scores": {}}))
    assert "out/base-0 has other flags or data" in refused("experiments", FLAGS)


@pytest.mark.parametrize("flags, line", [
    ("--only less", "no claim 'less' in list.toml: more"),
    ("--seeds 1", "an interval needs 2 to 10 different seeds, got 1"),
    ("--seeds 1,1", "different seeds, got 1,1"),
    ("--seeds a", "invalid seeds value: 'a'"),
    ("--list nowhere.toml", "nowhere.toml"),
    ("--data nowhere", "'nowhere' not found"),
    ("--val-data nowhere", "'nowhere' not found"),
    ("--jobs 0", "must be at least 1, got 0"),
])
def test_wrong_input(folder, refused, flags, line):
    assert line in refused("experiments", f"{FLAGS} {flags}")


@pytest.mark.parametrize("old, new, line", [
    ('second = "base"', 'second = "bass"', "list.toml: claim more names unknown arms: bass"),
    ('paper = "-"', 'paper = "-"\nmetric = "lpips"', "claim more has an unknown metric 'lpips'"),
    ("[arms]", "[arms", "list.toml: "),
    ('source = "ours"\n', "", "list.toml: claim more: "),
    ("common =", "comon =", "list.toml has no 'common'"),
])
def test_wrong_list(folder, refused, old, new, line):
    (folder / "list.toml").write_text(TOML.replace(old, new))
    assert line in refused("experiments", FLAGS)


def test_picture_without_ssim():
    """One point for each claim in dB, at its difference."""
    claims = [Claim("s", f"claim {name}", "a", "b", name, "-") for name in ("psnr", "ssim", "psnr_high")]
    results = [compare([2, 2.1], [1, 1]), compare([1, 1], [1, 2]), compare([1, 1.5], [2, 2])]
    figure = experiments.draw(claims, results)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["claim psnr", "claim psnr_high"] and plots.available()
    assert [line.get_xdata()[0] for line in figure.axes[0].lines[:1]] == [pytest.approx(1.05)]
