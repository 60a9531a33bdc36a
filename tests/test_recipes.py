"""Run: python -m pytest tests/test_recipes.py. What stands in recipes/, against what train.py makes of it.

One recipe per family is trained by `make test`, all of them by `make test-all`, with networks made thin.
"""

import dataclasses
import json
import math
import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_DISCS, Run, call
from torchvision.models.vgg import cfgs, make_layers

import model
import optional_losses
import train
from discriminators import DISCRIMINATORS, check_size
from model import Autoencoder, count_macs, count_parameters

RECIPES = sorted(path.stem for path in (ROOT / "recipes").iterdir())
FAMILIES = ("litevae-b-128", "sd-kl-f8", "transfusion-f8d8", "open-litevae-b3", "vq-f8", "paper-table8-adaptive")
ALL = [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in RECIPES]
SOURCE = r"arXiv \d{4}\.\d{5}|open-LiteVAE|stabilityai/|lavinal712/AutoencoderKL|The demo"

# what a recipe's flags are followed by here; the networks are made thin besides
TINY = ("--data synthetic --val-data synthetic --val-count 1 --res 64 --dec-channels 8 --dec-blocks 1 "
        "--batch-size 1 --accumulate 1 --num-workers 0 --warmup 0 --disc-start 0 --log-every 1 --keep 0 "
        "--eval-every 5000 --save-every 5000 --device cpu --precision fp32")
TERMS = ("l1", "l2", "lpips", "kl", "wavelet", "gaussian", "vq", "vgg19", "identity", "ldl")
# flags that TINY replaces, or whose effect is to be what they are
RUN = {"out", "init", "data", "val_data", "val_count", "num_workers", "res", "batch_size", "accumulate", "steps",
       "warmup", "schedule", "lr", "disc_lr", "disc_start", "device", "log_every", "eval_every", "save_every"}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Recipes and commands name recipes/... as from the root of the repository."""
    monkeypatch.chdir(ROOT)


def comment(name: str) -> str:
    """The lines at the top of a recipe."""
    return re.match(r"(#.*\n)+", (ROOT / f"recipes/{name}.args").read_text())[0]


def prose(name: str) -> str:
    """The same on one line."""
    return re.sub(r"\s*\n# *", " ", comment(name))


def commands(name: str) -> list[list[str]]:
    """The flags of every train.py command in the comment."""
    return [words.split() for words in re.findall(r"train\.py (\S+(?: \S+)*)", comment(name))]


@cache
def parse(name: str):
    return train.parse_args([f"@recipes/{name}.args"])


def own_flags(name: str) -> list[list[str]]:
    """The recipe's own words in groups, each a flag with its values or the @file that it builds on."""
    groups: list[list[str]] = []
    for word in shlex.split((ROOT / f"recipes/{name}.args").read_text(), comments=True):
        if word.startswith(("--", "@")):
            groups.append([])
        groups[-1].append(word)
    return groups


def first_phase(name: str) -> list[str] | None:
    """The documented command, here or at the head of another recipe, that writes the file in --init."""
    known = (words for other in (name, *RECIPES) for words in commands(other))
    return next((words for words in known if f"{train.parse_args(words).out}/ckpt.pt" == parse(name).init), None)


# ---- every recipe as it stands -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    """It parses without a note, its flags go together, its comment has source, numbers, weights, command."""
    args, head = parse(name), comment(name)
    train.check_flags(args, train.build_config(args))
    if args.disc != "none":
        with torch.device("meta"):
            check_size(DISCRIMINATORS[args.disc](args.in_channels, args.res), args.res, args.res)
    assert re.search(SOURCE, head.splitlines()[0])
    assert re.search(r"^#   theirs: .*(\.\d\d|none)", head, re.M) and "Weights: " in prose(name)
    assert head.splitlines()[-1].endswith(f"train.py @recipes/{name}.args") or name == "demo"
    assert [f"@recipes/{name}.args"] in commands(name)
    for command in commands(name):
        train.parse_args(command)


@pytest.mark.parametrize("name", RECIPES)
def test_global_batch(name):
    """The global batch in the comment is processes x --batch-size x --accumulate of its own command."""
    stated, processes = map(int, re.search(r"Global batch (\d+) with (\d+) process", prose(name)).groups())
    launch = re.search(rf"# +(.*) ?train\.py @recipes/{name}\.args$", comment(name), re.M)[1].strip()
    expected = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    assert launch == expected
    assert stated == processes * parse(name).batch_size * parse(name).accumulate


def test_outputs_differ():
    """No recipe writes where another does, and most are called after themselves."""
    outs = {name: parse(name).out for name in RECIPES}
    assert len(set(outs.values())) == len(RECIPES)
    assert all(out == f"out/{name}" for name, out in outs.items())


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "litevae-b-128"])
def test_every_flag_is_parsed_into_something_else(name, tmp_path):
    """Without any one of its flags, or without the file it builds on, a recipe is another run."""
    for words, less in without_each(name, tmp_path).items():
        assert vars(less) != vars(parse(name)), words


def without_each(name: str, folder: Path) -> dict[str, object]:
    """The arguments that are left without each of a recipe's own flags.

    litevae-b-128 may be built on and is not taken away: it has the defaults.
    """
    found, groups = {}, own_flags(name)
    for i, group in enumerate(groups):
        if group == ["@recipes/litevae-b-128.args"]:
            continue
        rest = [word for other in groups[:i] + groups[i + 1:] for word in other]
        file = folder / "less.args"
        file.write_text("\n".join(map(shlex.quote, rest)))
        found[" ".join(group)] = train.parse_args([f"@{file}"])
    return found


def test_litevae_b_128_is_the_plain_command():
    """--scale B --res 128 and the recipe agree flag by flag: its flags are the defaults, written out."""
    assert vars(parse("litevae-b-128")) == vars(train.parse_args(["--scale", "B", "--res", "128"]))


def test_litevae_b_128_is_the_papers():
    """200k steps of Adam at 1e-4, n_z 12, f 8, U-Net discriminator with hinge loss and a constant weight."""
    args = parse("litevae-b-128")
    assert (args.steps, args.lr, args.disc_lr) == (200_000, 1e-4, 1e-4)
    assert (args.latent_channels, args.levels) == (12, 3)
    assert (args.disc, args.disc_loss, args.adaptive_weight, args.disc_start) == ("unet-s", "hinge", False, 0)
    assert 8 * args.batch_size * args.accumulate == 32


@pytest.mark.parametrize("name", [name for name in RECIPES if "--init" in sum(own_flags(name), [])])
def test_second_phase_finds_its_first(name):
    """It starts from the file and the architecture that a documented command writes, elsewhere."""
    first = train.parse_args(first_phase(name))
    assert train.build_config(first) == train.build_config(parse(name)) and first.out != parse(name).out


def test_kl_weights():
    """LDM's 1e-6 on sums over latent and pixels is 1e-6 n_z h w / (3 H W) on means."""
    for name, nz, f in (("litevae-b-128", 12, 8), ("sd-kl-f8", 4, 8), ("sd-kl-f4", 3, 4), ("transfusion-f8d8", 8, 8),
                        ("paper-table1-imagenet128-nz4-litevae", 4, 8)):
        assert parse(name).latent_channels == nz and parse(name).levels == round(math.log2(f))
        assert parse(name).kl_weight == pytest.approx(1e-6 * nz / (3 * f * f), rel=2e-3)
