"""Run: python -m pytest tests/test_options.py. The options of train.py that LiteVAE itself does without."""

import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Run, call, equal, torchrun, train_in
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from variants import perceptual, quantize

NETS = ("model", "ema", "disc", "lecam", "opt", "opt_disc")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    """SMALL as it is, to compare with."""
    return train_in(tmp_path_factory.mktemp("base"), "")


def after(run: Run, step: int) -> dict:
    """The checkpoint of a step, with --save-every 1 --keep 9."""
    return run.state(f"ckpt-{step:08d}.pt")


def same(a: dict, b: dict, part: str) -> bool:
    return equal(a[part], b[part])


# ---- architectures -----------------------------------------------------------------------------------------

SHAPES = [  # flags, a tensor of the model and its shape; None where there is none of that name
    ("--encoder dwt --scale B", "decoder.conv_in.weight", (32, 12, 3, 3)),
    ("--encoder dwt2 --scale B --latent-channels 48", "decoder.conv_in.weight", (32, 48, 3, 3)),
    ("--extractor nafnet", "encoder.extractors.0.mid.0.depthwise.weight", (64, 1, 3, 3)),
    ("--shared-extractor", "encoder.extractors.1.conv_in.weight", None),
    ("--first-level 2", "encoder.aggregator.conv_in.weight", (16, 24, 3, 3)),
    ("--downsample conv", "encoder.pools.0.weight", (12, 12, 4, 4)),
    ("--aggregator vit", "encoder.aggregator.position", (16, 64)),
    ("--codebook-size 8 --codebook-update ema", "quantizer.ema_count", (8,)),
]


@pytest.mark.parametrize("flags, name, shape", SHAPES, ids=[row[0] for row in SHAPES])
def test_architectures(train_run, flags, name, shape):
    """Each trains two steps, shows in the shapes of the weights, and all that it has to train moves."""
    run = train_run(f"{flags} --save-every 1 --keep 9")
    first, last = after(run, 1)["model"], run.state()["model"]
    assert (last[name].shape if shape else name in last) == (shape or False)
    assert all(math.isfinite(value) for line in run.lines for value in line.values())
    moved = {key.split(".")[0] for key in last if not torch.equal(first[key], last[key])}
    assert moved == {key.split(".")[0] for key in last}


def test_wavelet(train_run, base):
    """db2 in the place of Haar is another encoder without another parameter."""
    run = train_run("--wavelet db2")
    assert run.state()["model"].keys() == base.state()["model"].keys()
    assert run.steps[0]["l1"] != base.steps[0]["l1"]


def test_vit_is_bound_to_its_size(tmp_path, train_run, refused, capsys):
    """A ViT at another --res is refused in one line by eval.py, and by train.py as a new phase."""
    run = train_run("--aggregator vit --steps 1")
    call("eval", tmp_path, "run/ckpt.pt --data synthetic --limit 1 --num-workers 0 --metrics psnr")
    capsys.readouterr()
    line = refused("eval", "run/ckpt.pt --data synthetic --limit 1 --res 64")
    assert "--res 64: the ViT of this model only takes 32" in line
    line = refused("train", f"{SMALL} --data synthetic --aggregator vit --res 64 --out b --init run/ckpt.pt")
    assert "resolution=32, the flags ask for 64" in line and run.folder.exists()


# ---- resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--dropout 0.5 --lr 1e-3 --batch-size 4 --micro-batch 2",
    "--disc patch --alternate --lecam 0.1 --r1 1 --r1-every 2 --adaptive-weight",
    "--codebook-size 64 --lr 1e-3",
    "--codebook-size 64 --codebook-update ema --vq-weight 2 --lr 1e-3",
    "--se-weight 0.25 --res 64 --lr 1e-3",
    "--eq-vae --res 64 --disc patch --lr 1e-3",
], ids=["dropout", "discriminator", "codebook", "moving average", "scale", "EQ-VAE"])  # fmt: skip
def test_resume_is_exact(train_run, monkeypatch, flags):
    """Two steps, a resume and two more: bitwise what four in a row give, and the same log."""
    monkeypatch.setattr(quantize, "REVIVE_AFTER", 2)
    straight = train_run(f"{flags} --steps 4 --out straight")
    train_run(f"{flags} --steps 2")
    resumed = train_run(f"{flags} --steps 4 --resume")
    for part in NETS:
        assert same(straight.state(), resumed.state(), part), part
    assert straight.steps == resumed.steps


def test_dropout(train_run, base):
    """The branches that it is in start at 0: the first loss is the same, the gradients are not."""
    plain, dropped = base.steps[0], train_run("--dropout 0.5 --steps 1").steps[0]
    assert plain["loss"] == dropped["loss"] and plain["grad_norm"] != dropped["grad_norm"]


# ---- who trains when ---------------------------------------------------------------------------------------


def test_alternate(train_run):
    """Until the discriminator trains all steps are the autoencoder's, then the even ones alone."""
    flags = "--disc patch --disc-start 2 --alternate --steps 6 --batch-size 1"
    run = train_run(f"{flags} --save-every 1 --keep 9")
    states = [after(run, step) for step in range(1, 7)]
    for state in states:                                    # batch norm's statistics move in both
        state["disc"] = {key: w for key, w in state["disc"].items() if key.endswith(("weight", "bias"))}
    for step in range(1, 6):
        mine = step < 2 or step % 2 == 0
        old, new = states[step - 1], states[step]
        changed = {part for part in NETS if not same(old, new, part)}
        assert changed == ({"model", "ema", "opt"} if mine else {"disc", "opt_disc"}), step
        assert ("grad_norm" in run.steps[step]) == mine != ("disc_grad_norm" in run.steps[step])
        assert ("loss" in run.steps[step]) == mine          # nor are the losses of the autoencoder computed
        assert ("adv" in run.steps[step]) == (mine and step >= 2)
    for name, updates in (("opt", 4), ("opt_disc", 2)):
        assert {slot["step"].item() for slot in states[-1][name]["state"].values()} == {updates}


# ---- regularisers ------------------------------------------------------------------------------------------


def disc_gradients(run: Run, steps: int) -> list[Tensor]:
    """The discriminator's gradient of each step, out of Adam's mean m <- m / 2 + g / 2."""
    slots = [after(run, step)["opt_disc"]["state"].values() for step in range(1, steps + 1)]
    means = [torch.cat([slot["exp_avg"].double().flatten() for slot in step]) for step in slots]
    return [2 * new - old for old, new in zip([torch.zeros_like(means[0]), *means[:-1]], means, strict=True)]


def test_r1(train_run):
    """Every second step, times two, and in no other; its part of the gradient grows as gamma does."""
    flags = "--disc patch --lr 0 --disc-lr 0 --steps 4 --batch-size 1 --save-every 1 --keep 9"
    runs = [train_run(f"{flags} --r1 {gamma} --r1-every {every} --out run{gamma}-{every}")
            for gamma, every in ((1, 2), (2, 2), (1, 4))]
    plain = train_run(flags)
    assert [["r1" in line for line in run.steps] for run in runs] == [
        [False, True, False, True], [False, True, False, True], [False, False, False, True]]
    assert not any("r1" in line for line in plain.steps)
    none = disc_gradients(plain, 4)
    one, two, four = ([g - g0 for g, g0 in zip(disc_gradients(run, 4), none, strict=True)] for run in runs)
    assert max(one[2].norm(), two[2].norm(), four[2].norm()) < 1e-4 * one[3].norm()
    for g, double in ((one[1], two[1]), (one[3], two[3]), (one[3], four[3])):
        assert g.norm() > 0 and (double - 2 * g).norm() < 1e-4 * g.norm()


def test_lecam(train_run):
    """Its averages, here of two steps, are in the checkpoint; it counts from the second step on."""
    run = train_run("--disc patch --lecam 0.1")
    plain = train_run("--disc patch --out plain")
    state, steps = run.state()["lecam"], run.steps
    assert state["updates"] == 2 and plain.state()["lecam"] is None
    for name in ("real", "fake"):
        mean = sum(line[f"logits_{name}"] for line in steps) / 2
        assert state[name].item() == pytest.approx(mean, rel=1e-4)
    assert all(line["lecam"] > 0 for line in steps) and "lecam" not in plain.steps[0]
    # the same networks before the first update, and another gradient
    assert steps[0]["disc"] == plain.steps[0]["disc"]
    assert steps[0]["disc_grad_norm"] != plain.steps[0]["disc_grad_norm"]


# ---- codebook ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_codebook(train_run, kind):
    """Instead of KL the log has the codebook's loss, times --vq-weight, its usage and perplexity."""
    run = train_run(f"--codebook-size 8 --codebook-update {kind} --vq-weight 2")
    for line in run.steps:
        rec = line["l1"] + line["wavelet"] + 0.5 * line["gaussian"]
        assert line["loss"] == pytest.approx(rec + 2 * line["vq"], rel=1e-6) and "kl" not in line
        assert line["vq"] > 0 and 1 / 8 <= line["usage"] <= 1
        assert 1 <= line["perplexity"] <= 8 * line["usage"] + 1e-4
    tensors, trained = run.state()["model"], run.state()["opt"]["state"]
    assert ("quantizer.ema_sum" in tensors) == (kind == "ema")
    assert len(trained) == sum("quantizer" not in key for key in tensors) + (kind == "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_codebook_of_two_processes(tmp_path, kind):
    """2 x 2 images by two processes or by accumulation leave the codebook as 4 do, up to fp32's rounding."""
    flags = f"--codebook-size 64 --codebook-update {kind} --steps 3 --lr 1e-5 --val-count 1"
    joined = train_in(tmp_path, f"{flags} --batch-size 4 --out joined")
    train_in(tmp_path, f"{flags} --batch-size 4 --micro-batch 2 --out accumulated")
    done = torchrun(tmp_path, f"train.py --data synthetic {SMALL} {flags} --batch-size 4 --out two")
    assert done.returncode == 0, done.stderr
    expected = joined.state()["model"]
    for other in (Run(tmp_path / "accumulated"), Run(tmp_path / "two")):
        weights = other.state()["model"]
        for key in (key for key in expected if key.startswith("quantizer.")):
            assert torch.allclose(weights[key], expected[key], rtol=1e-4, atol=2e-5), key
        assert torch.equal(weights["quantizer.idle"], expected["quantizer.idle"])
        for line, wanted in zip(other.steps, joined.steps, strict=True):
            assert line == pytest.approx(wanted, rel=1e-3, abs=1e-5)


# ---- equivariance ------------------------------------------------------------------------------------------


def test_scale_equivariance(train_run):
    """Its term is in the log and, weighted, in the loss; the other terms stay as they are without it."""
    flags = "--res 64 --steps 1"
    line, plain = (train_run(f"{flags} {more}").steps[0] for more in ("--se-weight 0.25", "--out plain"))
    assert line["se"] > 0 and line["loss"] == pytest.approx(plain["loss"] + 0.25 * line["se"], rel=1e-6)
    assert all(line[name] == plain[name] for name in ("l1", "wavelet", "gaussian", "kl", "batch_psnr"))
    assert line["grad_norm"] != plain["grad_norm"]


def test_eq_vae(train_run):
    """Some steps are the plain ones, --eq-identity says how many; the discriminator sees the same images."""
    flags = "--res 64 --disc patch --lr 0 --disc-lr 0 --steps 6"
    plain = train_run(f"{flags} --out plain").steps
    half = train_run(f"{flags} --eq-vae --out half").steps
    never = train_run(f"{flags} --eq-vae --eq-identity 0").steps
    for name in ("l1", "adv", "disc", "logits_real"):
        same = [line[name] == other[name] for line, other in zip(plain, half, strict=True)]
        assert 0 < sum(same) < 6
        for i, line in enumerate(never):
            assert line[name] != plain[i][name] and (line[name] == half[i][name]) != same[i]
    assert all(a["kl"] == b["kl"] for a, b in zip(plain, never, strict=True))


@pytest.mark.parametrize("flags", ["--se-weight 0.25", "--eq-vae --eq-identity 0"])
def test_equivariance_accumulates(tmp_path, flags):
    """Micro-batches of 1 have the turns and scales of the whole batch: the same log up to fp32's rounding."""
    flags = f"--res 64 --batch-size 3 --lr 0 {flags}"
    joined = train_in(tmp_path, f"{flags} --out joined")
    parts = train_in(tmp_path, f"{flags} --micro-batch 1")
    for line, expected in zip(parts.steps, joined.steps, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--se-weight 0.25", "--eq-vae --eq-identity 0.2"])
def test_equivariance_of_two_processes(tmp_path, flags):
    """2 x 2 images of two processes give the gradients (Adam's mean of them) and the log of 4."""
    flags = f"--res 64 --batch-size 4 --steps 3 --lr 0 --val-count 1 {flags}"
    joined = train_in(tmp_path, f"{flags} --out joined")
    done = torchrun(tmp_path, f"train.py --data synthetic {SMALL} {flags} --micro-batch 1 --out two")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        torch.cat([slot["exp_avg"].double().flatten() for slot in run.state()["opt"]["state"].values()])
        for run in (joined, Run(tmp_path / "two")))
    assert (ours - theirs).norm() < 1e-6 * ours.norm()
    for line, expected in zip(Run(tmp_path / "two").steps, joined.steps, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---- losses ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files for VGG19 and MoCo with random weights under the real names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vgg = {f"features.{key}": w for key, w in make_layers(cfgs["E"]).state_dict().items()}
    torch.save(vgg, folder / "vgg19.pth")
    moco = {f"module.encoder_q.{key}": w for key, w in perceptual.moco_net().state_dict().items()}
    torch.save({"state_dict": moco}, folder / "moco.pth")
    return folder


def test_total_loss(train_run, files, capsys):
    """VGG19, identity and LDL terms are in the log, and the loss is the weighted sum of all."""
    line = train_run(f"--vgg19-weight 0.25 --vgg19-file {files}/vgg19.pth --identity-weight 3 --moco-file "
                     f"{files}/moco.pth --ldl-weight 0.5 --steps 1 --batch-size 1").steps[0]
    rest = line["l1"] + line["wavelet"] + 0.5 * line["gaussian"] + 6.25e-8 * line["kl"]
    assert min(line["vgg19"], line["identity"], line["ldl"]) > 0
    sides = 0.25 * line["vgg19"] + 3 * line["identity"] + 0.5 * line["ldl"]
    assert line["loss"] == pytest.approx(rest + sides, rel=1e-6)
    shown = capsys.readouterr().out
    assert "not the published file" in shown and f"moco: {files}/moco.pth, md5 " in shown


def test_adaptive_weight_knows_all_terms(train_run):
    """Its reconstruction gradient has LDL in it."""
    flags = "--disc patch --adaptive-weight --steps 1"
    with_ldl, without = train_run(f"{flags} --ldl-weight 5 --out a"), train_run(flags)
    assert with_ldl.steps[0]["l1"] == without.steps[0]["l1"]
    assert with_ldl.steps[0]["disc_weight"] > 1.01 * without.steps[0]["disc_weight"]


# ---- what a user can get wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--encoder sd", "--scale S has no effect: --encoder sd has one size"),
    ("--encoder dwt", "--scale S has no effect: --encoder dwt has one size"),
    ("--sd-channels 8", "--sd-channels 8 has no effect: the width is that of --encoder sd, got litevae"),
    ("--encoder sd --scale B --decoder-norm group --initialisation torch", "changes nothing: encoder=sd and"),
    ("--encoder dwt2 --scale B", "encoder=dwt2 gives 48 latent channels for 3 of the image"),
    ("--encoder sd --scale B --extractor nafnet", "extractor=nafnet needs encoder=litevae, got sd"),
    ("--encoder sd --scale B --dropout 0.1", "dropout=0.1 needs encoder=litevae, got sd"),
    ("--encoder sd --scale B --wavelet db2", "wavelet=db2 has nothing to act on"),
    ("--encoder open-litevae --aggregator vit", "aggregator=vit needs encoder=litevae, got open-litevae"),
    ("--encoder open-litevae --shared-extractor", "shared_extractor=True needs encoder=litevae"),
    ("--first-level 4", "first_level must be one of 1, 2, 3, got 4"),
    ("--first-level 3 --downsample conv", "downsample=conv has nothing to act on"),
    ("--dropout 1", "dropout must be at least 0 and below 1, got 1.0"),
    ("--wavelet db9", "argument --wavelet: invalid choice: 'db9'"),
    ("--codebook-size 1", "codebook_size must be 0 (no codebook) or at least 2, got 1"),
    ("--codebook-update ema", "codebook_update=ema needs a codebook"),
    ("--codebook-size 8 --kl-weight 1e-3", "--kl-weight 0.001 has no effect: a codebook has no KL"),
    ("--vq-weight 2", "--vq-weight 2.0 has no effect: there is no codebook, set --codebook-size"),
    ("--disc patch --r1-every 4", "--r1-every 4 has no effect: there is no penalty, set --r1"),
    ("--r1 1", "--r1 needs a discriminator, got --disc none"),
    ("--lecam 1", "--lecam needs a discriminator, got --disc none"),
    ("--alternate", "--alternate needs a discriminator, got --disc none"),
    ("--ldl-weight 1 --ema-decay 0", "--ldl-weight compares with the averaged weights"),
    ("--identity-weight 1", "could not load them (no file given): pass moco_v2_800ep_pretrain.pth.tar"),
    ("--identity-weight 1 --moco-file no.pth", "could not load no.pth"),
    ("--vgg19-weight 1 --vgg19-file no.pth", "could not load no.pth"),
    ("--se-weight 1 --eq-vae --res 64", "--se-weight and --eq-vae both regularise the latent space"),
    ("--se-weight 1", "--res must be a multiple of 32 and at least 64, got 32"),
    ("--se-weight 1 --res 64 --codebook-size 8", "--se-weight needs a Gaussian posterior, got --codebook"),
    ("--eq-vae --res 64 --codebook-size 8", "--eq-vae needs a Gaussian posterior, got --codebook-size 8"),
    ("--eq-vae --res 64 --ldl-weight 1", "--ldl-weight compares with untransformed images"),
    ("--eq-vae --res 64 --eq-identity 1", "--eq-identity must be below 1, got 1.0"),
    ("--eq-vae --res 16", "below --res 16 there is no side"),
    ("--eq-vae --res 64 --disc unet-s", "below --res 64 there is no side that the latents and"),
    ("--eq-identity 0.4", "--eq-identity 0.4 has no effect: there are no transforms, set --eq-vae"),
    ("--res 96 --disc stylegan", "96"),
    ("--res 32 --disc gigagan", "takes multiples of 64 pixels, at least 64, got 32x32"),
])  # fmt: skip
def test_user_errors(refused, flags, expected):
    """Each is one line and exit code 2 before anything is written."""
    assert expected in refused("train", f"{SMALL} --data synthetic {flags}")


def test_settings_of_a_part_that_is_off_are_noted(train_run, base, capsys):
    """What a flag file leaves behind for a part that is switched off is named, and nothing comes of it."""
    flags = "--disc-start 5 --disc-weight 0.5 --vgg-file no.pth --moco-file no.pth"
    assert train_run(flags).steps == base.steps
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: --disc-start 5 has no effect with --disc none",
        "note: --disc-weight 0.5 has no effect with --disc none",
        "note: --vgg-file no.pth has no effect with --lpips-weight 0",
        "note: --moco-file no.pth has no effect with --identity-weight 0",
    ]
