"""Run: python -m pytest tests/test_recipes.py. What stands in recipes/, against what train.py makes of it.

One recipe per family is trained by `make test`, all of them by `make test-all`, with networks made thin.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_DISCS, Run, call
from torchvision.models.vgg import cfgs, make_layers

import train
from discriminators import check_size
from model import count_macs, count_parameters
from variants import options, perceptual, sizes
from variants.build import DISCRIMINATORS, build

FOLDER = ROOT / "recipes"
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.args"))
FAMILIES = ("litevae-b-128", "peers/sd-kl-f8", "peers/transfusion-f8d8", "peers/open-litevae-b3",
            "peers/vq-f8", "paper/table8-adaptive")
ALL = [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in RECIPES]
SOURCE = r"arXiv \d{4}\.\d{5}|open-LiteVAE|stabilityai/|lavinal712/AutoencoderKL|The demo"

# what a recipe's flags are followed by here; the networks are made thin besides
TINY = ("--data synthetic --val-data synthetic --val-count 1 --res 64 --dec-channels 8 --dec-blocks 1 "
        "--batch-size 1 --micro-batch 0 --num-workers 0 --warmup 0 --disc-start 0 --log-every 1 --keep 0 "
        "--eval-every 5000 --save-every 5000 --device cpu --precision fp32")
TERMS = ("l1", "l2", "lpips", "kl", "wavelet", "gaussian", "vq", "vgg19", "identity", "ldl", "se")
# flags that TINY replaces: judged by what they are parsed into
RUN = {"out", "init", "data", "val_data", "val_count", "num_workers", "res", "batch_size", "micro_batch",
       "steps", "disc_start", "device", "log_every", "eval_every", "save_every"}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Recipes and commands name recipes/... as from the root of the repository, on a machine of 8 cores."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


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


def first_phase(name: str) -> list[str]:
    """The documented command, here or at the head of another recipe, that writes the file in --init."""
    known = (words for other in (name, *RECIPES) for words in commands(other))
    return next(words for words in known if f"{train.parse_args(words).out}/ckpt.pt" == parse(name).init)


# ---- every recipe as it stands -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, capsys):
    """It parses without a note, its flags go together, its comment has source, numbers, weights, command."""
    args, head = parse(name), comment(name)
    train.check_flags(args, options.build_config(args))
    assert capsys.readouterr().out == ""
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
    """The comment states --batch-size, and its own command can divide it."""
    args, stated = parse(name), int(re.search(r"Global batch (\d+)", prose(name))[1])
    launch = re.search(rf"# +(.*) ?train\.py @recipes/{name}\.args$", comment(name), re.M)[1].strip()
    processes = 1 if launch == "python" else int(re.fullmatch(r"torchrun --nproc_per_node=(\d+)", launch)[1])
    assert stated == args.batch_size
    train.divide_batch(args.batch_size, processes, args.micro_batch)


def test_outputs_differ():
    """No recipe writes where another does, and most are called after themselves."""
    outs = {name: parse(name).out for name in RECIPES}
    assert len(set(outs.values())) == len(RECIPES)
    assert all(out == "out/" + name.replace("paper/", "paper-").removeprefix("peers/")
               for name, out in outs.items())


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
        file = folder / f"less-{len(found)}.args"
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
    assert args.batch_size == 32


@pytest.mark.parametrize("name", [name for name in RECIPES if "--init" in sum(own_flags(name), [])])
def test_second_phase_finds_its_first(name):
    """It starts from the file and the architecture that a documented command writes, elsewhere."""
    first = train.parse_args(first_phase(name))
    assert options.build_config(first) == options.build_config(parse(name)) and first.out != parse(name).out


def test_kl_weights():
    """LDM's 1e-6 on sums over latent and pixels is 1e-6 n_z h w / (3 H W) on means."""
    for name, nz, f in (("litevae-b-128", 12, 8), ("peers/sd-kl-f8", 4, 8), ("peers/sd-kl-f4", 3, 4),
                        ("peers/transfusion-f8d8", 8, 8), ("paper/table1-imagenet128-nz4-litevae", 4, 8)):
        assert parse(name).latent_channels == nz and parse(name).levels == round(math.log2(f))
        assert parse(name).kl_weight == pytest.approx(1e-6 * nz / (3 * f * f), rel=2e-3)


# ---- exact sizes -------------------------------------------------------------------------------------------

# recipes, encoder, decoder: counts of the published networks where there are some, else put together from
# their parts here, or ours
B4, EXTRACTOR = 6_750_636, 1_686_220
UPSAMPLE, HEAD = 256 * 256 * 9 + 256, 128 * 9 + 1           # a convolution at 256, one output of the last
SMC, SMC_WAVELET = 48_464_287, 48_464_287 + 9 * HEAD - UPSAMPLE
GN3_F4, GN4, GN8, GN12 = 32_960_771, 49_490_179, 49_508_611, 49_527_043
SIZES = [
    ("litevae-s-128", 1_038_012, SMC),
    ("litevae-b-(128.*|256-tuned)", 6_755_260, SMC),
    ("litevae-m-128", 32_754_748, SMC),
    ("litevae-l-128", 41_431_612, SMC),
    ("demo|litevae-tiny", 1_038_012, 947_031),              # the decoder's is ours
    ("peers/sd-(kl-f8.*|ft-.*)", 34_163_592, GN4),
    ("peers/sd-kl-f4", 22_337_411 + 3 * 4609, GN3_F4),            # ours: LDM's code was not counted at f4
    ("peers/transfusion-f8d8", 34_200_464, GN8),
    ("peers/vq-f8.*", 34_163_592 - 4 * 4609, GN4),          # no log-variance: 4 outputs of 512 * 9 + 1 less
    ("peers/vq-f4", 22_337_411, GN3_F4),
    ("peers/open-litevae-.*", 6_623_036, 53_332_642),
    ("paper/table2-s", 1_038_012, GN12),
    ("paper/table2-m", 32_754_748, GN12),
    ("paper/table2-l", 41_431_612, GN12),
    ("paper/table(2-b|1-imagenet256-nz12-litevae|8-.*|9-.*|10-.*|14-.*|15-.*|16-.*)", 6_755_260, GN12),
    ("paper/g-dropout", 6_755_260, GN12),
    ("paper/table(2-vae|1-imagenet256-nz12-vae)", 34_237_336, GN12),
    ("paper/table(1-.*-nz4-litevae|5-.*|17-.*)", B4, GN4),
    ("paper/table(1-.*-nz4-vae|22-.*)", 34_163_592, GN4),
    ("paper/table4-smc", 6_755_260, SMC),
    ("paper/b-dwt-.*", 0, GN12),
    ("paper/b-dwt2", 0, GN4 + 44 * 512 * 9),
    ("paper/d3-nafnet", 3_611_260, GN12),                   # ours, test_ablations.py
    ("paper/d4-shared", B4 - 2 * EXTRACTOR, GN4),
    ("paper/d5-vit", 858_264 + 3 * EXTRACTOR, GN12),        # ours, test_ablations.py
    ("paper/d6-last2", B4 - EXTRACTOR - 12 * 9 * 32, GN4),
    ("paper/g-downsample", 41_425_284, GN4),
    ("paper/g-wavelet-output", 6_755_260, SMC_WAVELET),
]
# at the size of their recipes; GigaGAN's is ours, beside the published 14,388,452 (gigagan.py says why)
DISCS = {"patch": 2_765_633, "unet-s": 2_757_058, "unet-m": 11_020_674, "unet-l": 44_067_586,
         "stylegan": 28_389_121, "gigagan": 14_772_238}


def thousand(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", RECIPES)
def test_exact_sizes(name):
    """Encoder, decoder and discriminator have the sizes of the table above; a recipe is in one row of it."""
    args = parse(name)
    with torch.device("meta"):
        net = build(options.build_config(args))
        disc = None if args.disc == "none" else DISCRIMINATORS[args.disc](args.in_channels, args.res)
    rows = [sizes for pattern, *sizes in SIZES if re.fullmatch(pattern, name)]
    assert rows == [[count_parameters(net.encoder), count_parameters(net.decoder)]]
    assert disc is None or count_parameters(disc) == DISCS[args.disc]


def test_every_discriminator_is_somebodys():
    """Each kind of discriminator is in a recipe, and so is each option of the model and of the losses."""
    assert {parse(name).disc for name in RECIPES} == {"none", *DISCS} == {"none", *DISCRIMINATORS}
    run = RUN | {"resume", "allow_batch_change", "plan", "seed", "precision", "compile",
                 "gradient_checkpointing", "listing_cache", "jpeg_oversampling", "keep", "vgg_file",
                 "vgg19_file", "moco_file"}
    default = vars(train.parse_args([]))
    used = {dest for name in RECIPES for dest, value in vars(parse(name)).items() if value != default[dest]}
    # grey images, the width of SD-VAE's encoder, the time a discriminator trains alone, the interval of R1,
    # the weight of VQ's terms, the share of plain steps in EQ-VAE: no source has another value; the
    # initialisation is compared by recipes/experiments.toml
    unused = {"in_channels", "sd_channels", "disc_warmup", "r1_every", "vq_weight", "eq_identity",
              "initialisation"}
    assert default.keys() - run - used == unused


@pytest.mark.slow
def test_architectures_are_in_the_table():
    """`python -m variants.sizes` has each recipe's encoder and its decoder, parameters and MACs at 256."""
    rows = [line.split() for line in sizes.table().splitlines()[2:]]
    encoders = {thousand(row[1]): thousand(row[3]) for row in rows}
    decoders = {thousand(row[2]): thousand(row[4]) for row in rows}
    counted = set()
    for config in {options.build_config(parse(name)) for name in RECIPES}:
        bound = config.resolution and 256
        with torch.device("meta"):
            net = build(dataclasses.replace(config, resolution=bound, dropout=0.0))
        nz, side = config.latent_channels, 256 // config.downsample_factor
        for part, macs, shape in ((net.encoder, encoders, (3, 256, 256)),
                                  (net.decoder, decoders, (nz, side, side))):
            size = count_parameters(part)
            assert size in macs
            if size and size not in counted:
                assert count_macs(part, 1, *shape) == macs[size]
                counted.add(size)


# ---- every recipe, small -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    """Flags with the files of the three fixed networks, random weights in them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, layers in (("vgg", "D"), ("vgg19", "E")):
        weights = make_layers(cfgs[layers]).state_dict()
        torch.save({f"features.{key}": w for key, w in weights.items()}, folder / f"{name}.pth")
    moco = {f"module.encoder_q.{key}": w for key, w in perceptual.moco_net().state_dict().items()}
    torch.save({"state_dict": moco}, folder / "moco.pth")
    return " ".join(f"--{name}-file {folder}/{name}.pth" for name in ("vgg", "vgg19", "moco"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where all recipes write, each to its own --out; parents of second phases stay."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.fixture
def thin(monkeypatch):
    """train.py with networks of an eighth of the width or less; which ones they are stays."""
    build = options.build_config
    monkeypatch.setattr(options, "build_config", lambda args: dataclasses.replace(
        build(args), extractor_channels=8, aggregator_channels=8, sd_channels=8))
    for name in DISCRIMINATORS:
        small = SMALL_DISCS[name.split("-")[0]]
        build_disc = lambda in_channels, res, small=small: small(in_channels)  # noqa: E731
        monkeypatch.setitem(train.DISCRIMINATORS, name, build_disc)


def small_run(place: Path, words: list[str], extra: str, files: str, lpips: bool = False, to: str = ""
              ) -> Run:
    """train.py with these words and then TINY; LPIPS if asked for, or if its weight is not the default 1.

    `to` is appended to --out, where another run of the same words may have made a parent.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        args = train.parse_args(words)
        out = train.parse_args([*words, *extra.split()]).out + to
    off = "" if lpips or args.lpips_weight not in (0, 1) else "--lpips-weight 0"
    call("train", place, f"{' '.join(words)} {TINY} {off} {files} {extra} --out {out}")
    return Run(place / out)


def make_parent(name: str, place: Path, files: str) -> None:
    """Run what writes the file in --init, and what writes that one's, where they are not there yet."""
    if parse(name).init and not (place / parse(name).init).exists():
        words = first_phase(name)
        make_parent(words[0].removeprefix("@recipes/").removesuffix(".args"), place, files)
        small_run(place, words, "--steps 1", files)


def weighted(line: dict, args) -> list[float]:
    """A log line's terms times their weights, by the flags."""
    rec = [getattr(args, f"{term}_weight") * line[term] for term in TERMS if term in line]
    return [*rec, line.get("disc_weight", 0) * line.get("adv", 0)]


@pytest.mark.parametrize("name", ALL)
def test_recipe_trains(name, place, files, thin):
    """Three steps in which all that the recipe names takes part, a fourth after a resume, and eval.py."""
    args, words = parse(name), [f"@recipes/{name}.args"]
    make_parent(name, place, files)
    first = small_run(place, words, "--steps 3", files, to="-tested").state()
    run = small_run(place, words, "--steps 4 --resume", files, to="-tested")
    state, steps = run.state(), run.steps
    assert (first["step"], state["step"], len(steps)) == (3, 4, 4)
    assert all(math.isfinite(value) for line in run.lines for value in line.values())
    for step, line in enumerate(steps):
        if not args.alternate or step % 2 == 0:             # else it is the discriminator's turn alone
            expected = {term for term in TERMS if getattr(args, f"{term}_weight")} - {"lpips", "kl", "vq"}
            assert expected <= line.keys() and ("vq" if args.codebook_size else "kl") in line
            terms = weighted(line, args)                    # of both signs: they may cancel
            assert line["loss"] == pytest.approx(sum(terms), rel=0, abs=1e-5 * sum(map(abs, terms)))
        both = args.disc != "none" and not args.alternate
        assert ("adv" in line) == (both or args.alternate and step % 2 == 0)
        assert ("disc" in line) == (both or args.alternate and step % 2 == 1)
    moved = {key.split(".")[0] for key in state["model"]
             if not torch.equal(first["model"][key], state["model"][key])}
    assert ("encoder" in moved) == (args.encoder not in ("dwt", "dwt2") and not args.freeze_encoder
                                    and not args.alternate)
    assert ("decoder" in moved) == (not args.alternate)     # its fourth step is the discriminator's
    assert (state["ema"] is None) == (args.ema_decay == 0)
    assert (state["parent"] is None) == (args.init is None)
    call("eval", place, f"{run.folder}/ckpt.pt --data synthetic --limit 1 --num-workers 0 --device cpu "
                        f"--metrics psnr --json {place}/scores.json")
    scores = json.loads((place / "scores.json").read_text())
    assert scores["n"] == 1 and scores["res"] == 64 and math.isfinite(scores["psnr"])


# ---- every flag of every recipe ----------------------------------------------------------------------------


def plan(args) -> list:
    """Names and shapes of all tensors, the discriminator's too, and the rates by which they learn."""
    with torch.device("meta"):
        net = build(options.build_config(args))
        disc = None if args.disc == "none" else DISCRIMINATORS[args.disc](args.in_channels, args.res)
    parts = [{key: tensor.shape for key, tensor in part.state_dict().items()} for part in (net, disc) if part]
    steps = (0, 500, args.steps // 2, args.steps - 1)
    factors = [train.lr_factor(step, args.warmup, args.schedule, args.steps) for step in steps]
    rates = [rate * factor for rate in (args.lr, args.disc_lr) for factor in factors]
    return [*parts, rates, train.ema_decay(args.steps, args.ema_decay)]


def trace(place: Path, words: list[str], files: str, lpips: bool) -> tuple:
    """Two small steps: log lines, each term times its weight in fp64, and the sum of all weights after."""
    shutil.rmtree(place / "trace", ignore_errors=True)
    args = train.parse_args(words)
    every = "--r1-every 1" if args.r1 else ""               # else no penalty within two steps
    run = small_run(place, words, f"--steps 2 --out trace {every}", files, lpips)
    state = run.state()
    products = [sum(weighted(line | {"disc_weight": args.disc_weight}, args)) for line in run.steps]
    lines = [{key: value for key, value in line.items() if key != "lr"} for line in run.lines]
    weights = [sum(float(w.double().sum()) for w in state[name].values()) if state[name] else None
               for name in ("model", "ema", "disc")]
    return lines, products, weights


@pytest.mark.parametrize("name", [param for param in ALL if param.values != ("litevae-b-128",)])
def test_every_flag_has_an_effect(name, place, files, thin, monkeypatch, tmp_path):
    """Without any one of its flags: other tensors, other rates, another run, or two steps that differ.

    What the flags then leave may also be refused. litevae-b-128 has the defaults, written out.
    """
    args, traced = parse(name), {}
    make_parent(name, place, files)
    for i, (words, less) in enumerate(without_each(name, tmp_path).items()):
        changed = {dest for dest in vars(args) if getattr(args, dest) != getattr(less, dest)}
        if words.startswith("@") or changed & RUN:
            assert changed, words
            continue
        try:
            train.check_flags(less, options.build_config(less))
        except ValueError:
            continue
        if plan(args) == plan(less):
            lpips = "lpips_weight" in changed
            if lpips not in traced:
                traced[lpips] = trace(place, [f"@recipes/{name}.args"], files, lpips)
            assert trace(place, [f"@{tmp_path}/less-{i}.args"], files, lpips) != traced[lpips], words
