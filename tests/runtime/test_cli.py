"""Run: python -m pytest tests/test_cli.py. The command line that train.py and eval.py share."""

import argparse
import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

import train
from runtime import cli
from variants.config import AutoencoderConfig

SCRIPTS = ("train", "eval", "analyze", "export", "latents", "bench", "examples.diffusion")
TESTS = ROOT / "tests"
# other files that add flags of a script or read them
FLAGS_ELSEWHERE = {"train": ["checkpoint.py", "variants/options.py"], "eval": ["evaluation/models.py"],
                   "analyze": ["evaluation/models.py"]}
# without these nothing happens, which needs no words; all else shows a default
OFF_UNLESS_GIVEN = {"train": {"--resume", "--init"}, "eval": {
    "CKPT", "--diffusers", "--open-litevae", "--model", "--data", "--json", "--per-image", "--grid",
    "--extremes", "--plot"}, "export": {"CKPT", "--out"}, "analyze": {
    "CKPT", "--diffusers", "--open-litevae", "--model", "--data", "--out"},
    "bench": {"--json"}, "latents": {"COMMAND", "CKPT", "INPUT", "--data", "--out"},
    "examples.diffusion": {"CKPT", "CACHE", "--out"}}  # fmt: skip


def parsers(script: str, monkeypatch) -> dict[str, argparse.ArgumentParser]:
    """The parser of a script, under "", and those of its sub-commands."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.ArgumentParser, "parse_args", lambda self, argv: found.append(self) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            importlib.import_module(script).parse_args([])
    below = [action.choices for action in found[0]._actions if isinstance(action.choices, dict)]
    return {"": found[0]} | (below[0] if below else {})


def own_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]


def actions(script: str, monkeypatch) -> list[argparse.Action]:
    """The flags of a script, --help aside, and those of its sub-commands."""
    return [action for parser in parsers(script, monkeypatch).values() for action in own_flags(parser)]


# ---- every flag --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_fault_13_14_every_flag_is_read(script, monkeypatch):
    """Each parsed flag is read as args.NAME outside parse_args, or names a field of the configuration."""
    files = [f"{script.replace('.', '/')}.py", *FLAGS_ELSEWHERE.get(script, [])]
    trees = [ast.parse((ROOT / file).read_text()) for file in files]
    functions = [node for tree in trees for node in tree.body
                 if getattr(node, "name", "parse_args") not in ("parse_args", "add_flags")]
    read = {
        node.attr
        for function in functions for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        and "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))
    }
    parsed = {action.dest for action in actions(script, monkeypatch)}
    fields = {field.name for field in dataclasses.fields(AutoencoderConfig)} if script == "train" else set()
    assert read <= parsed <= read | fields


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_run(script, monkeypatch):
    """Each flag stands in a test of its script: options that nobody runs are where the bugs live."""
    own = {"examples.diffusion": "test_diffusion_example.py"}.get(script, f"test_{script}.py")
    files = ("conftest.py", own, "test_checkpoint.py", "test_options.py", "downstream/test_cache.py",
             "test_plan.py")
    text = "".join((TESTS / file).read_text() for file in files)
    flags = [action.option_strings for action in actions(script, monkeypatch) if action.option_strings]
    assert [names for names in flags if not any(re.search(rf"{name}\b", text) for name in names)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys, monkeypatch):
    """--help ends with code 0, and every flag has a text with its default, a value or words."""
    monkeypatch.setenv("COLUMNS", "300")                              # one line per flag
    for command, parser in parsers(script, monkeypatch).items():
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).parse_args([*command.split(), "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0
        check_help(script, own_flags(parser), shown)


def check_help(script: str, shown_flags: list[argparse.Action], shown: str) -> None:
    for action in shown_flags:
        name = action.option_strings[0] if action.option_strings else action.metavar
        default = f" (default: {action.default})" if action.default is not None else ""
        assert action.help and action.help + default in shown
        assert default or "(default: " in action.help or name in OFF_UNLESS_GIVEN[script], name


# ---- spelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["--batch_size", "7", "--no_compile", "--val_data", "a_b--c_d"],
    ["--batch_size=7", "--no-compile", "--val_data=a_b--c_d"],
    ["--batch-size=7", "--no-compile", "--val-data", "a_b--c_d"],
])  # fmt: skip
def test_underscores_are_hyphens(words):
    """--batch_size, --batch_size= and --batch-size are one flag; values keep their underscores."""
    args = train.parse_args(words)
    assert (args.batch_size, args.compile, args.val_data) == (7, False, "a_b--c_d")


def test_flag_file(tmp_path):
    """@file: comments, several words a line, quotes, underscores, empty lines; what comes after overrides."""
    file = tmp_path / "some.args"
    file.write_text("# a comment, with an it's\n--batch_size 7 --lr=3e-4   # end of line\n\n"
                    "--data 'my pictures/a#1' --no_compile\n--rescale 1 2\n")
    args = train.parse_args(["--seed", "5", f"@{file}", "--lr", "1e-3"])
    assert (args.seed, args.batch_size, args.lr, args.compile) == (5, 7, 1e-3, False)
    assert args.data == "my pictures/a#1" and args.rescale == [1, 2]


def test_flag_file_that_builds_on_another(tmp_path, monkeypatch, refused):
    """@file within a file, relative to where the command runs; later flags win; a circle is refused."""
    monkeypatch.chdir(tmp_path)
    Path("base.args").write_text("--batch-size 7 --lr 3e-4\n")
    Path("row.args").write_text("# base, and another rate\n@base.args\n--lr 1e-3\n")
    args = train.parse_args(["@row.args"])
    assert (args.batch_size, args.lr) == (7, 1e-3)
    Path("base.args").write_text("@row.args\n")
    assert "it includes itself, directly or through other files" in refused("train", "@row.args")


@pytest.mark.parametrize("script, flags, expected", [
    ("train", "--batch 4", "unrecognized arguments: --batch 4"),
    ("train", "--no-comp", "unrecognized arguments: --no-comp"),
    ("eval", "c.pt --data x --lim 4", "unrecognized arguments: --lim 4"),
    ("train", "--nonsense", "unrecognized arguments: --nonsense"),
    ("train", "--scale XL", "argument --scale: invalid choice: 'XL' (choose from 'S', 'B', 'M', 'L')"),
    ("train", "--levels 5", "argument --levels: invalid choice: 5"),
    ("train", "--disc_loss wgan", "argument --disc-loss: invalid choice: 'wgan'"),
    ("train", "--steps many", "argument --steps: invalid positive value: 'many'"),
    ("train", "--steps 0", "argument --steps: must be at least 1, got 0"),
    ("train", "--warmup -1", "argument --warmup: must not be negative, got -1"),
    ("train", "--lr fast", "argument --lr: invalid amount value: 'fast'"),
    ("train", "--clip -1", "argument --clip: must be 0 or more, got -1"),
    ("train", "--kl-weight nan", "argument --kl-weight: must be 0 or more, got nan"),
    ("train", "--rescale 1", "argument --rescale: expected 2 arguments"),
    ("train", "@missing.args", "No such file or directory: 'missing.args'"),
    ("eval", "a.pt --model b:c --data x", "give one of a checkpoint"),
    ("eval", "c.pt", "give either --imagenet-val"),
    ("eval", "c.pt --data x --imagenet-val", "give either --imagenet-val"),
    ("eval", "c.pt --data x --limit 0", "argument --limit: must be at least 1, got 0"),
])  # fmt: skip
def test_wrong_flags(refused, script, flags, expected):
    """Abbreviations, unknown flags, values and flag files: one line, exit code 2, nothing written."""
    assert expected in refused(script, flags)


@pytest.mark.parametrize("content", [b"--out 'my run\n", b"\x80\x02\xff"])
def test_unreadable_flag_file(refused, tmp_path, content):
    """An open quote, or a file that is no text, is one line that says so."""
    (tmp_path / "bad.args").write_bytes(content)
    assert "cannot read the flag file" in refused("train", "@bad.args")


def test_user_errors_are_one_line(capsys):
    """user_errors folds a ValueError or OSError of several lines into one; our own mistakes pass through."""
    for error in (ValueError("two\n  lines"), FileNotFoundError("two lines")):
        with pytest.raises(SystemExit) as stop, cli.user_errors():
            raise error
        assert stop.value.code == 2 and capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(KeyError), cli.user_errors():
        raise KeyError("ours")
