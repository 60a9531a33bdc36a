"""Run: python -m pytest tests/test_recipes.py. What stands in recipes/, against what train.py makes of it."""

import re

import pytest
from conftest import ROOT

import train
from discriminators import DISCRIMINATORS, check_size

RECIPES = sorted(path.name for path in (ROOT / "recipes").iterdir())
PHASES = {"litevae-b-256-tuned.args": "litevae-b-128.args", "open-litevae-b3.args": "open-litevae-a2.args"}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """The commands name recipes/... as from the root of the repository."""
    monkeypatch.chdir(ROOT)


def comment(name: str) -> str:
    """The lines at the top of a recipe."""
    return re.match(r"(#.*\n)+", (ROOT / "recipes" / name).read_text())[0]


def commands(name: str) -> list[list[str]]:
    """The flags of every train.py command in the comment; two spaces end a command."""
    return [words.split() for words in re.findall(r"train\.py (\S+(?: \S+)*)", comment(name))]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    """It parses, its flags go together, and its comment names a source and the command that runs it."""
    args = train.parse_args([f"@recipes/{name}"])
    train.check_flags(args, train.build_config(args))
    if args.disc != "none":
        check_size(DISCRIMINATORS[args.disc](args.in_channels, args.res), args.res, args.res)
    assert re.search(r"arXiv 2405\.14477|open-LiteVAE|The demo", comment(name).splitlines()[0])
    assert [f"@recipes/{name}"] in commands(name)
    for command in commands(name):
        train.parse_args(command)


def test_litevae_b_128_is_the_plain_command():
    """--scale B --res 128 and the recipe agree flag by flag."""
    plain = train.parse_args(["--scale", "B", "--res", "128"])
    assert vars(train.parse_args(["@recipes/litevae-b-128.args"])) == vars(plain)


def test_litevae_b_128_is_the_papers():
    """200k steps of Adam at 1e-4, n_z 12, f 8, U-Net discriminator with hinge loss and a constant weight."""
    args = train.parse_args(["@recipes/litevae-b-128.args"])
    assert (args.steps, args.lr, args.disc_lr) == (200_000, 1e-4, 1e-4)
    assert (args.latent_channels, args.levels) == (12, 3)
    assert (args.disc, args.disc_loss, args.adaptive_weight, args.disc_start) == ("unet-s", "hinge", False, 0)
    assert 8 * args.batch_size * args.accumulate == 32


@pytest.mark.parametrize("child, parent", PHASES.items())
def test_second_phase_finds_its_first(child, parent):
    """The second phase starts from the file and the architecture that the documented first one writes."""
    args = train.parse_args([f"@recipes/{child}"])
    firsts = [train.parse_args(words) for words in (*commands(child), *commands(parent))
              if words[0] == f"@recipes/{parent}"]
    first = next(first for first in firsts if f"{first.out}/ckpt.pt" == args.init)
    assert first.steps == 100_000 and first.res == 128 and (args.steps, args.res) == (50_000, 256)
    assert train.build_config(first) == train.build_config(args)
    assert args.out != first.out
