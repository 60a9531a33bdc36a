"""Run: python -m pytest tests/test_train.py. Whole trainings at toy size, looked at from outside."""

import functools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, Run, call, crash, equal, torchrun, train_in, write_images
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import center_crop

import checkpoint
import data
import losses
import train
from model import LiteVAEConfig, scale_fields
from runtime import listings, sources
from runtime.log import Log, Numbers, Progress, Waiting
from runtime.watch import Watch
from variants.build import DISCRIMINATORS, build, recompute_blocks

# everything at once: 5 steps, the discriminator trains from step 2 and is felt from step 3
STORY = ("--res 64 --disc unet-s --disc-start 2 --disc-warmup 1 --disc-lr 0.01 --cutmix 0.5 "
         "--adaptive-weight --steps 5 --batch-size 2 --micro-batch 1 --lr 1e-3 --schedule cosine "
         "--warmup 1 --rescale 1 1.5")
NETS = ("model", "ema", "disc")
OPTIMIZERS = ("opt", "opt_disc")


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Run:
    """STORY with a checkpoint of each step, ckpt-<step>.pt holding what there was after that many."""
    return train_in(tmp_path_factory.mktemp("story"), f"{STORY} --save-every 1 --keep 9")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    """SMALL as it is, to compare with."""
    return train_in(tmp_path_factory.mktemp("base"), "")


def distance(a: dict, b: dict) -> float:
    """The largest difference between two state dicts."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def gradients(optimizer: dict) -> torch.Tensor:
    """Adam's running mean of gradients, of all parameters in one vector."""
    return torch.cat([slot["exp_avg"].double().flatten() for slot in optimizer["state"].values()])


def after(run: Run, step: int) -> dict:
    return run.state(f"ckpt-{step:08d}.pt")


# ---- pure functions ----------------------------------------------------------------------------------------


def test_learning_rate():
    """Warm-up over 4 steps is 1/5, 2/5, 3/5, 4/5, then 1; the cosine is 1, 1/2, 0 at start, middle, end."""
    warm = [train.lr_factor(step, 4, "constant", 100) for step in (0, 1, 2, 3, 4, 99)]
    assert warm == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert train.lr_factor(0, 0, "constant", 1) == 1.0
    cosine = [train.lr_factor(step, 20, "cosine", 100) for step in (19, 20, 40, 60, 80, 100)]
    assert cosine == pytest.approx([20 / 21, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0], abs=1e-15)


def test_ema_decay():
    """(1 + step) / (10 + step), and never more than the flag."""
    assert [train.ema_decay(step, 0.95) for step in (0, 8, 80, 171, 10**6)] == [0.1, 0.5, 0.9, 0.95, 0.95]


def test_precision_auto(monkeypatch):
    """auto is bf16 where it is fast; fp32 and bf16 are what they say."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for pays, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(train, "bf16_pays", lambda x=pays: x)
        assert train.pick_precision("auto", cpu) == expected
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, x=native: x)
        assert train.pick_precision("auto", cuda) == expected
    assert train.pick_precision("fp32", cuda) == "fp32" and train.pick_precision("bf16", cpu) == "bf16"


def test_resume_keeps_the_precision(train_run, monkeypatch):
    """Which of the two is faster is measured anew at each start; a run stays what it was, bit for bit."""
    for pays, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(train, "bf16_pays", lambda pays=pays: pays)
        train_run(f"--precision auto --steps 1 --out {precision}")
        monkeypatch.setattr(train, "bf16_pays", lambda pays=pays: not pays)
        resumed = train_run(f"--precision auto --steps 2 --resume --out {precision}")
        straight = train_run(f"--precision {precision} --steps 2 --out straight-{precision}")
        assert resumed.lines[-1] == straight.lines[-1] and resumed.state()["precision"] == precision
    moved = {"device": "cuda", "precision": "bf16"}
    assert train.pick_precision("auto", torch.device("cpu"), moved) == "bf16"       # measured: it pays
    moved["device"] = "cpu"
    assert train.pick_precision("fp32", torch.device("cpu"), moved) == "fp32"


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_bf16_is_timed(monkeypatch, slow):
    """bf16 is picked if it is the faster one, whatever the CPU says of itself."""
    conv, threads = train.F.conv2d, torch.get_num_threads()

    def delayed(x, *args, **options):
        time.sleep(0.05 * (x.dtype == slow))
        return conv(x, *args, **options)

    monkeypatch.setattr(train.F, "conv2d", delayed)
    assert train.bf16_pays() == (slow == torch.float32) and torch.get_num_threads() == threads


def test_default_out():
    """out/<model>-<res>."""
    assert train.parse_args([]).out == "out/litevae-b-128"
    assert train.parse_args(["--encoder", "sd", "--res", "256"]).out == "out/sd-256"
    assert train.parse_args(["--encoder", "open-litevae"]).out == "out/open-litevae-b-128"
    assert train.parse_args(["--encoder", "dwt2"]).out == "out/dwt2-128"


# ---- what happens in a step --------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """The networks and optimizers of the next run; watch.look(optimizer) is called before each update."""
    seen = SimpleNamespace(nets=[], optimizers=[], look=lambda optimizer: None)
    wrap, adam = train.wrap, train.adam

    def spy_wrap(module):
        seen.nets.append(module)
        return wrap(module)

    def spy_adam(*args):
        optimizer = adam(*args)
        optimizer.register_step_pre_hook(lambda *_: seen.look(optimizer))
        seen.optimizers.append(optimizer)
        return optimizer

    monkeypatch.setattr(train, "wrap", spy_wrap)
    monkeypatch.setattr(train, "adam", spy_adam)
    return seen


def test_fault_03_gradients_stay_in_their_half(train_run, watch, monkeypatch):
    """When the discriminator's half begins it has no gradient; what the autoencoder has, that half leaves."""
    between, update, equalities = [], train.update_spectral_norm, []

    def spy(disc):
        update(disc)
        assert {p.grad for p in disc.parameters()} == {None}
        between[:] = [p.grad.clone() for p in watch.nets[0].parameters()]

    def look(optimizer):
        if optimizer is watch.optimizers[0]:
            grads = [p.grad for p in watch.nets[0].parameters()]
            equalities.extend(map(torch.equal, grads, between))
            assert all(p.grad is not None for p in watch.nets[1].parameters())

    monkeypatch.setattr(train, "update_spectral_norm", spy)
    watch.look = look
    run = train_run("--res 64 --disc unet-s --cutmix 0.5 --adaptive-weight --batch-size 4 --micro-batch 2")
    assert len(equalities) == 2 * len(run.state()["model"]) and all(equalities)


def test_discriminator_sees_detached_images(train_run, watch, monkeypatch):
    """Only in the autoencoder's half do gradients pass through the discriminator's input, and to it none."""
    passes, disc = [], train.DISCRIMINATORS["unet-s"]

    def spied(in_channels, res):
        net = disc(in_channels, res)
        net.register_forward_pre_hook(lambda net, args: passes.append(
            (args[0].requires_grad, any(p.requires_grad for p in net.parameters()))))
        return net

    monkeypatch.setitem(train.DISCRIMINATORS, "unet-s", spied)
    train_run("--res 64 --disc unet-s --cutmix 0.5 --batch-size 4 --micro-batch 2")
    through, into = (True, False), (False, True)
    assert passes[:-1] == 2 * [through, through, *(2 * [into, into, into])]     # x, recon, their mix
    assert passes[-1] == through                          # the would-be adaptive weight, at validation


@pytest.mark.parametrize("flags", ["--disc patch", "--freeze-encoder --conv1x1"])
def test_fault_08_every_tensor_is_in_one_optimizer(train_run, parent, watch, flags):
    """What trains is in exactly one optimizer; with --freeze-encoder that is the decoder's side alone."""
    train_run(f"{flags} --steps 1" + f" --init {parent.folder}/ckpt.pt" * ("freeze" in flags))
    groups = [group for optimizer in watch.optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    named = [(name, p) for net in watch.nets if net for name, p in net.named_parameters()]
    frozen = {name.split(".")[0] for name, p in named if id(p) not in held}
    assert len(held) == len(set(held)) and set(held) <= {id(p) for _, p in named}
    assert frozen == ({"encoder", "quant_conv"} if "freeze" in flags else set())


def test_fault_13_clip(train_run, watch):
    """--clip limits both gradient norms, and the log has the norms from before."""
    norms = []
    watch.look = lambda optimizer: norms.append(
        nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]]).item())
    line = train_run("--disc patch --steps 1 --clip 0.01").steps[0]
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert line["grad_norm"] > 0.1 and line["disc_grad_norm"] > 0.1


def test_fault_07_a_step_is_one_update(story):
    """Step 5 of the story: 5 updates of the autoencoder and 3 of the discriminator, which began at step 2."""
    state = after(story, 5)
    counts = [{slot["step"].item() for slot in state[name]["state"].values()} for name in OPTIMIZERS]
    assert state["step"] == 5 and counts == [{5.0}, {3.0}]


def test_disc_start_and_warmup(story):
    """Untouched before --disc-start; then it trains; after --disc-warmup the autoencoder feels it."""
    discs = [after(story, step)["disc"] for step in (1, 2, 3)]
    assert equal(discs[0], discs[1]) and not equal(discs[1], discs[2])
    assert ["disc" in line for line in story.steps] == [False, False, True, True, True]
    assert ["adv" in line for line in story.steps] == [False, False, False, True, True]
    assert after(story, 2)["opt_disc"]["state"] == {} and after(story, 3)["opt_disc"]["state"][0]["step"] == 1


def test_spectral_norm_advances_once(story):
    """One power iteration in a step of 2 micro-batches with 3 passes each: v = W'u, u = Wv, normalised."""
    old, new = after(story, 4)["disc"], after(story, 5)["disc"]

    def iterate(name: str, u: torch.Tensor) -> torch.Tensor:
        matrix = old[f"{name}.weight"].flatten(1)
        v = nn.functional.normalize(matrix.T @ u, dim=0)
        return nn.functional.normalize(matrix @ v, dim=0)

    names = [key.removesuffix(".u") for key in old if key.endswith(".u")]
    once = {name: iterate(name, old[f"{name}.u"]) for name in names}
    twice = {name: iterate(name, u) for name, u in once.items()}
    assert len(names) == 37
    assert max((once[name] - new[f"{name}.u"]).abs().max() for name in names) < 1e-6
    assert max((twice[name] - new[f"{name}.u"]).abs().max() for name in names) > 1e-3


def test_fault_06_ema_tracks_every_parameter(story):
    """ema <- d ema + (1 - d) model with d = (1 + step) / (10 + step), for every tensor of the state dict."""
    for step in (1, 4):
        old, new = after(story, step), after(story, step + 1)
        d = (1 + step) / (10 + step)
        expected = {name: d * old["ema"][name].double() + (1 - d) * w for name, w in new["model"].items()}
        assert distance(expected, new["ema"]) < 1e-6
        assert distance(new["model"], new["ema"]) > 1e-4
        assert all(not torch.equal(old["ema"][name], new["ema"][name]) for name in expected)


def test_total_loss(parent):
    """The logged loss is the sum that the help shows, with the default weights, and batch_psnr is of mse."""
    for line in parent.steps:
        total = (line["l1"] + line["wavelet"] + 0.5 * line["gaussian"] + 6.25e-8 * line["kl"]
                 + 0.1 * line["adv"])
        assert line["loss"] == pytest.approx(total, rel=1e-6) and line["disc_weight"] == pytest.approx(0.1)
        assert 20 * math.log10(2 / line["l1"]) - 6 < line["batch_psnr"] <= 20 * math.log10(2 / line["l1"])


def test_adaptive_weight(story):
    """With --adaptive-weight the logged weight is no constant."""
    weights = [line["disc_weight"] for line in story.steps if "adv" in line]
    assert len(set(weights)) == 2
    assert all(0 < weight < 1000 and abs(weight - 0.1) > 1e-3 for weight in weights)


def test_learning_rates_of_a_run(train_run, watch):
    """One step of warm-up, half a cosine over two: both optimizers step at 1/2, 1, 1/2 of their own rate."""
    rates, flags = [], "--disc patch --lr 1e-3 --disc-lr 4e-3 --warmup 1 --schedule cosine"
    watch.look = lambda optimizer: rates.append(max(group["lr"] for group in optimizer.param_groups))
    run = train_run(f"{flags} --steps 3 --batch-size 1")
    assert rates == pytest.approx([0.5e-3, 2e-3, 1e-3, 4e-3, 0.5e-3, 2e-3])
    assert [line["lr"] for line in run.steps] == pytest.approx([0.5e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize("flags, scaled", [("", True), ("--lr-scaling none", False),
                                           ("--decoder-norm group", False),
                                           ("--decoder-norm group --lr-scaling fan-in", True)])
def test_lr_scaling(train_run, watch, flags, scaled):
    """Each parameter of the autoencoder steps at --lr times its scale, by default in self-modulated ones."""
    rates = {}
    watch.look = lambda optimizer: rates.update(
        (tuple(p.shape), group["lr"]) for group in optimizer.param_groups for p in group["params"])
    train_run(f"--lr 1e-3 --steps 1 {flags}")
    wide = {shape: rate for shape, rate in rates.items() if len(shape) > 1 and math.prod(shape[1:]) > 144}
    assert len(wide) > 2 and len(rates) > 2 * len(wide)
    for shape, rate in rates.items():
        inputs = math.prod(shape[1:]) if scaled and len(shape) > 1 else 0
        assert rate == pytest.approx(1e-3 * 144 / max(144, inputs))


def test_older_runs_go_on_as_they_began(train_run, base, tmp_path, refused, capsys):
    """A checkpoint from before --optimizer and --lr-scaling resumes with Adam at one rate, and only so."""
    run = train_run("--lr-scaling none --steps 2")
    state = torch.load(run.folder / "ckpt.pt", weights_only=True)
    del state["args"]["optimizer"], state["args"]["lr_scaling"], state["opt_muon"]
    for group in state["opt"]["param_groups"]:
        del group["scale"]
    torch.save(state, run.folder / "ckpt.pt")
    capsys.readouterr()
    line = refused("train", f"--data synthetic {SMALL} --steps 3 --resume")
    assert "was trained with lr_scaling=none, the flags ask for fan-in" in line
    assert train_run("--lr-scaling none --steps 3 --resume").steps[-1]["step"] == 3


def test_another_factor_of_lr_scaling(train_run, refused, capsys):
    """A checkpoint whose optimizer has other groups of parameters is refused with the way out."""
    run = train_run("--steps 2")
    state = torch.load(run.folder / "ckpt.pt", weights_only=True)
    first, second, *others = state["opt"]["param_groups"]
    state["opt"]["param_groups"] = [first | {"params": first["params"] + second["params"]}, *others]
    torch.save(state, run.folder / "ckpt.pt")
    capsys.readouterr()
    line = refused("train", f"--data synthetic {SMALL} --steps 3 --resume")
    assert "has other groups of parameters" in line and "start a new phase with --init" in line


def test_another_batch_size(train_run, refused, capsys):
    """A resumed run keeps its global batch, also one saved when --batch-size was that of a process."""
    run = train_run()
    capsys.readouterr()
    line = refused("train", f"--data synthetic {SMALL} --batch-size 1 --resume")
    assert "--batch-size 2, not 1: set it as it was" in line
    flags = "--allow-batch-change --steps 3 --resume"
    assert train_run(f"--batch-size 1 {flags}").steps[-1]["step"] == 3
    state = torch.load(run.folder / "ckpt.pt", weights_only=True)
    state["args"]["accumulate"] = 3
    torch.save(state, run.folder / "ckpt.pt")
    capsys.readouterr()
    assert "1 x 3 images in each process" in refused("train", f"--data synthetic {SMALL} --resume")
    assert train_run(f"--batch-size 3 {flags} --steps 4").steps[-1]["step"] == 4


def test_tensorboard(parent):
    """Scalars of the log, a grid of input, reconstruction and difference, a histogram per latent channel."""
    board = EventAccumulator(str(parent.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = board.Tags()
    assert {"l1", "adv", "disc", "lr", "val_psnr", "val_ssim_ema"} <= set(tags["scalars"])
    assert [event.value for event in board.Scalars("l1")] == pytest.approx([x["l1"] for x in parent.steps])
    assert set(tags["histograms"]) == {f"latent/{channel}" for channel in range(12)}
    picture = board.Images(tags["images"][0])[0]
    assert (picture.width, picture.height) == (3 * 66 + 2, 2 * 66 + 2)    # a batch of 2, at 64 px


# ---- learning ----------------------------------------------------------------------------------------------


def test_eight_images_are_overfitted(tmp_path):
    """60 steps on 8 pictures, reconstructed from a 4 x 4 latent: 4 dB past what their mean colours score."""
    write_images(tmp_path / "eight", [f"{i}.png" for i in range(8)], side=16)
    run = train_in(tmp_path, "--data eight --val-data eight --val-count 8 --res 16 --levels 2 --batch-size 8 "
                             "--steps 60 --lr 1e-3 --clip 1 --wavelet-weight 0 --gaussian-weight 0")
    pictures = [np.asarray(center_crop(Image.open(path), 16)) for path in (tmp_path / "eight").iterdir()]
    flat = [np.broadcast_to(np.rint(x.mean(axis=(0, 1))).astype(np.uint8), x.shape) for x in pictures]
    mean_colours = np.mean([peak_signal_noise_ratio(x, y) for x, y in zip(pictures, flat, strict=True)])
    assert run.lines[-1]["val_psnr_ema"] > mean_colours + 4
    assert run.steps[-1]["batch_psnr"] > run.steps[0]["batch_psnr"] + 6


@pytest.mark.slow
def test_the_default_learns_at_full_width(tmp_path):
    """LiteVAE-B, default decoder, 64 px, batch 4: validations at steps 40 and 60 beat that at step 20."""
    run = train_in(tmp_path, "--scale B --dec-channels 128 --dec-blocks 3 --res 64 --batch-size 4 --steps 60 "
                             "--warmup 20 --eval-every 20 --val-count 16 --save-every 1000")
    psnr = [line["val_psnr"] for line in run.lines if "val_psnr" in line]
    average = [line["val_psnr_ema"] for line in run.lines if "val_psnr" in line]
    assert len(psnr) == 3 and min(psnr[1:]) > psnr[0] and min(average[1:]) > average[0], (psnr, average)
    shutil.rmtree(run.folder)                                         # 0.9 GB


def test_discriminator_health(parent):
    """Logged: accuracy and gap of the logits; at validation, what the adaptive weight would be."""
    for line in parent.steps:
        assert 0 <= line["disc_accuracy"] <= 1 and "adaptive_weight" not in line
        assert line["logit_gap"] == pytest.approx(line["logits_real"] - line["logits_fake"], abs=1e-6)
    assert 0 < parent.lines[-1]["adaptive_weight"] != 0.1


def test_would_be_adaptive_weight(parent):
    """The logged value by plain backward passes: ratio of last-layer gradients on the validation set."""
    state = parent.state()
    model, _ = checkpoint.load_model(parent.folder / "ckpt.pt", raw=True)
    disc = DISCRIMINATORS["unet-s"](3, 64)
    disc.load_state_dict(state["disc"])
    images = data.ValSet(sources.SyntheticSource(sources.HELD_OUT, 2), 64)
    x = data.to_float(torch.stack([images[i][0] for i in range(2)]))
    recon, _ = model(x)
    rec = (losses.l1_loss(x, recon) + losses.wavelet_loss(x, recon) + 0.5 * losses.gaussian_loss(x, recon))
    adv = -sum(logits.mean() for logits in disc(recon)) / 2
    norms = [torch.autograd.grad(loss, model.decoder.conv_out.weight, retain_graph=True)[0].norm()
             for loss in (rec, adv)]
    expected = 0.1 * norms[0] / (norms[1] + 1e-4)
    assert parent.lines[-1]["adaptive_weight"] == pytest.approx(expected.item(), rel=1e-4)


def test_broken_file_is_named_and_replaced(train_run, tmp_path, capsys):
    """A file that is cut short is named once, in training and validation together, and the run goes on."""
    folder = write_images(tmp_path / "some", [f"{i}.png" for i in range(4)], side=32)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:500])
    run = train_run("--data some --val-data some --steps 8")
    assert capsys.readouterr().err.count("broken image, number 1: some/3.png") == 1
    assert len(run.steps) == 8


# ---- resume, init ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [STORY, "--disc patch --steps 5 --batch-size 1"], ids=["unet", "patch"])
def test_fault_04_13_14_resume_is_exact(train_run, story, tmp_path, monkeypatch, flags):
    """Saved after 3 steps, dead in the 5th, resumed: weights, optimizers and log as if nothing had been."""
    straight = story if flags == STORY else train_run(f"{flags} --out straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash(patch, 4)
        # an absolute path, since tensorboard's thread outlives the crash
        train_run(f"{flags} --save-every 3 --out {tmp_path}/run")
    dead = Run(tmp_path / "run")
    assert dead.state()["step"] == 3 and len(dead.steps) == 4
    resumed = train_run(f"{flags} --resume")
    for name in ("step", *NETS, *OPTIMIZERS):
        assert equal(straight.state()[name], resumed.state()[name]), name
    assert straight.lines == resumed.lines
    assert {path.name for path in resumed.folder.iterdir() if path.is_file()} == {
        "ckpt.pt", "ckpt-00000003.pt", "ckpt-00000005.pt", "model.pt", "best.pt", "log.jsonl"}


def test_fault_19_resume_of_a_finished_run(train_run, parent, tmp_path, capsys):
    """Nothing is trained, and checkpoint and log stay as they were."""
    shutil.copytree(parent.folder, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("ckpt.pt", "log.jsonl")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    train_run("--res 64 --disc unet-s --conv1x1 --resume")
    assert files[0].stat().st_mtime_ns == before[0][1]
    assert [path.read_bytes() for path in files] == [content for content, _ in before]
    assert "resume: run/ckpt.pt, step 2" in capsys.readouterr().out


def test_resume_with_nothing_saved(train_run, capsys, base):
    """It starts at step 0 and says so."""
    run = train_run("--resume")
    assert "resume: nothing saved in run yet, starting at step 0" in capsys.readouterr().out
    assert run.lines == base.lines


def test_init_starts_a_new_phase(train_run, parent):
    """Weights of model, EMA and discriminator go on, at another size; the rest starts afresh."""
    init = f"--init {parent.folder}/ckpt.pt"
    flags = f"--res 128 --disc unet-s --conv1x1 {init} --lr 0 --disc-lr 0 --steps 1 --batch-size 1"
    old, new = parent.state(), train_run(flags).state()               # no learning: what is there came
    assert equal(old["model"], new["model"])
    weights = {name: w for name, w in old["disc"].items() if name.endswith(("weight", "bias"))}
    assert equal(weights, {name: new["disc"][name] for name in weights})
    # the average it inherits keeps its long memory
    expected = {name: 0.999 * old["ema"][name].double() + 0.001 * w for name, w in old["model"].items()}
    assert distance(expected, new["ema"]) < 3e-7 < 0.1 * distance(old["ema"], old["model"])
    assert new["step"] == 1 and new["opt"]["state"][0]["step"] == new["opt_disc"]["state"][0]["step"] == 1


def test_init_with_another_discriminator(train_run, parent):
    """A phase with another discriminator takes the model's weights and begins its own."""
    run = train_run(f"--conv1x1 --init {parent.folder}/ckpt.pt --disc patch --lr 0 --steps 1")
    assert equal(run.state()["model"], parent.state()["model"])
    assert run.state()["disc"].keys().isdisjoint(parent.state()["disc"])


def test_init_and_resume_together(train_run, parent, capsys):
    """The same command again goes on: --init counts only while there is nothing to resume."""
    flags = f"--conv1x1 --init {parent.folder}/ckpt.pt --resume"
    train_run(f"{flags} --steps 1")
    assert "init: " in capsys.readouterr().out
    run = train_run(f"{flags} --steps 2")
    assert "resume: run/ckpt.pt, step 1" in capsys.readouterr().out and run.state()["step"] == 2


def test_freeze_encoder(train_run, parent):
    """The encoder's side stays bitwise the parent's average, in both networks; all of the decoder moves."""
    run = train_run(f"--conv1x1 --init {parent.folder}/ckpt.pt --freeze-encoder --steps 1")
    for name in ("model", "ema"):
        old, new = parent.state()["ema"], run.state()[name]
        same = {name.split(".")[0] for name in old if torch.equal(old[name], new[name])}
        moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        assert same == {"encoder", "quant_conv"} and moved == {"decoder", "post_quant_conv"}


def test_ema_switched_off_and_on(train_run):
    """--ema-decay 0 keeps none; a run resumed with one starts it from the weights."""
    off = train_run("--ema-decay 0 --steps 1")
    first = off.state()
    assert first["ema"] is None and not any("ema" in name for line in off.lines for name in line)
    second = train_run("--ema-decay 0.9 --steps 2 --resume").state()
    d = 2 / 11
    expected = {name: d * w.double() + (1 - d) * second["model"][name] for name, w in first["model"].items()}
    assert distance(expected, second["ema"]) < 1e-6


# ---- what the host waits for ----------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Collects the calls that would make the host wait for a GPU: reads of numbers, and blocking copies.

    Some appear as functions of Python, others (`dispatched`) only below, as float(x) does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.dispatched = Dispatched(self.found)

    def __enter__(self):
        self.dispatched.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.dispatched.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        ours = "site-packages" not in sys._getframe(1).f_code.co_filename     # torch moves within a device
        moved = name == "to" and any(isinstance(arg, torch.device) for arg in (*args, *kwargs.values()))
        if name in ("tolist", "numpy", "cpu", "cuda") or ours and moved and not kwargs.get("non_blocking"):
            self.found.append(name)
        return func(*args, **kwargs)


class Dispatched(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_sees_them():
    """The guard itself: ways to read a number or to bring one to the device, and none of a step's kind."""
    x, cpu = torch.ones(2), torch.device("cpu")
    for wait in (lambda: x[0].item(), lambda: bool(x.sum() > 1), lambda: torch.tensor(1.0), lambda: x[x > 0],
                 lambda: [float(number) for number in x], lambda: x.tolist(), lambda: x.to(cpu)):
        with Waits() as waits:
            wait()
        assert waits.found
    with Waits() as waits:
        torch.where(x > 0, x, 0).to(cpu, non_blocking=True)[:1].sum().add_(torch.full((), 2.0))
    assert not waits.found


@pytest.mark.parametrize("flags", [
    "--disc unet-s --cutmix 0.5",
    "--disc patch --lecam 0.1 --adaptive-weight --clip 1 --batch-size 4 --micro-batch 2 --disc-warmup 1",
    "--disc patch --alternate --r1 1 --optimizer muon --dropout 0.1",
    "--codebook-size 16 --codebook-update ema --conv1x1 --ldl-weight 0.1",
    "--se-weight 0.25 --disc patch --adaptive-weight",
    "--eq-vae --disc patch --micro-batch 1",
], ids=["default", "adaptive", "alternate, muon", "codebook", "scale equivariance", "EQ-VAE"])  # fmt: skip
def test_a_step_never_waits(train_run, monkeypatch, flags):
    """A step reads no number on the host and copies none to the device, with whatever it is composed of."""
    step, found = train.Trainer.step, []

    def watched(trainer, number, batches, stop):
        loaded = iter([next(batches) for _ in trainer.rows])           # in this process here, as there are
        with Waits() as waits:                                          # no workers
            numbers = step(trainer, number, loaded, stop)
        found.append(waits.found)
        return numbers

    monkeypatch.setattr(train.Trainer, "step", watched)
    train_run(f"--res 64 {flags} --steps 3 --log-every 5")
    assert found == [[], [], []]


def test_numbers_are_read_a_step_late(tmp_path):
    """The numbers of a step wait for the next one, unless they are wanted now or a signal came."""
    log = Log(tmp_path, [], 0)
    progress = Progress(log, Watch(print), SimpleNamespace(set_postfix=lambda **_: None), Waiting(()))

    def add(done, mse, stop=0.0, now=False):
        values = torch.tensor([mse, stop])
        progress.add(Numbers(done, ["mse", "stop"], values, lr=0.1), logged=now, now=now)
        return len(progress.unread), progress.skipped, progress.stopping

    ill = float("nan")
    assert [add(1, ill), add(2, ill), add(3, 0.5)] == [(1, 0, False), (1, 1, False), (1, 2, False)]
    assert add(4, 0.25, now=True) == (0, 0, False)
    assert [add(5, 0.5, stop=0.5), add(6, 0.5)] == [(1, 0, False), (0, 0, True)]
    log.close()
    lines = Run(tmp_path).lines
    assert lines[:2] == [{"step": 1, "skipped": ["mse"]}, {"step": 2, "skipped": ["mse"]}]
    assert lines[2:] == [{"step": 4, "lr": 0.1, "batch_psnr": pytest.approx(10 * math.log10(16))}]


def test_waiting_for_batches(monkeypatch):
    """Only the time inside next() counts, and `take` starts again at 0."""
    now = [0.0]

    def batches():
        for seconds in (2, 3, 5):
            now[0] += seconds
            yield seconds

    monkeypatch.setattr("runtime.log.time", SimpleNamespace(perf_counter=lambda: now[0]))
    waiting, taken = Waiting(batches()), []
    for seconds in waiting:
        now[0] += 100                                     # a training step
        taken.append(waiting.take() if seconds > 2 else None)
    assert taken == [None, 5, 5] and waiting.take() == 0


def test_data_wait(train_run, monkeypatch, capsys):
    """data_wait is the mean per step since the last logged one, in tensorboard and the bar, not log.jsonl."""
    real = data.TrainSet.__getitem__

    def slow(self, k: int):
        time.sleep(0.3 if k in (2, 3) else 0)             # the second of four steps takes 0.6 s to load
        return real(self, k)

    monkeypatch.setattr(data.TrainSet, "__getitem__", slow)
    run = train_run("--steps 4 --log-every 2 --batch-size 2")
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    first, second = board.Scalars("data_wait")
    assert (first.step, second.step) == (2, 4) and 0.3 <= first.value < 0.6 and second.value < 0.2
    assert not any("data_wait" in line for line in run.lines)
    assert f"data_wait={second.value:.3f}s" in capsys.readouterr().err


# ---- several processes -------------------------------------------------------------------------------------


def test_fault_02_two_processes_and_accumulation_equal_the_joined_batch(tmp_path):
    """2 x 2 images by two processes, or by accumulation, train as 4 do, U-Net discriminator and CutMix on.

    With weights that stand still, gradients (Adam's mean of them) agree to 1e-6 of their norm, and the log to
    1e-5. Of the one validation image the second process has none.
    """
    flags = "--res 64 --disc unet-s --cutmix 0.5 --val-count 1 --lr 0 --disc-lr 0"
    joined = train_in(tmp_path, f"{flags} --batch-size 4 --out joined")
    train_in(tmp_path, f"{flags} --batch-size 4 --micro-batch 2 --out accumulated")
    done = torchrun(tmp_path, f"train.py --data synthetic {SMALL} {flags} --batch-size 4 --out two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch: 4 images = 2 processes x 1 x 2") == 1
    for other in (Run(tmp_path / "accumulated"), Run(tmp_path / "two")):
        for name in OPTIMIZERS:
            ours, theirs = gradients(joined.state()[name]), gradients(other.state()[name])
            assert (ours - theirs).norm() < 1e-6 * ours.norm(), name
        for line, expected in zip(other.lines, joined.lines, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_resume_on_another_number_of_processes(tmp_path):
    """Two steps by two processes and two by one, micro-batches of 1, are the run of one process."""
    flags = "--res 64 --disc unet-s --steps 4 --batch-size 4 --lr 1e-5 --disc-lr 1e-5 --val-count 1"
    straight = train_in(tmp_path, f"{flags} --out straight")
    done = torchrun(tmp_path, f"train.py --data synthetic {SMALL} {flags} --steps 2 --micro-batch 1 "
                              "--out other")
    assert done.returncode == 0, done.stderr
    assert "batch: 4 images = 2 processes x 2 x 1" in done.stdout
    resumed = train_in(tmp_path, f"{flags} --out other --resume")
    for line, expected in zip(resumed.lines[-3:], straight.lines[-3:], strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("batch, processes, micro, expected", [
    (32, 8, 0, (4, 1)), (32, 1, 0, (32, 1)), (32, 1, 4, (4, 8)), (32, 4, 64, (8, 1)), (1, 1, 1, (1, 1)),
    (30, 8, 0, "among them: use 24 or 32"), (4, 8, 0, "among them: use 8"),
    (32, 4, 3, "the 8 images of each process (--batch-size 32, 4 processes): use 2 or 4"),
])  # fmt: skip
def test_divide_batch(batch, processes, micro, expected):
    """The global batch in whole micro-batches; what cannot be divided names the nearest that can."""
    if isinstance(expected, tuple):
        assert train.divide_batch(batch, processes, micro) == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        train.divide_batch(batch, processes, micro)


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """The full default model, two processes, a fake ImageNet: torchrun train.py and eval.py verbatim."""
    names = ("n01440764/a", "n01440764/b", "n01443537/c", "n01443537/d")
    write_images(tmp_path / "imagenet/train", [f"{name}.JPEG" for name in names], side=140)
    write_images(tmp_path / "imagenet/val", ["1.JPEG", "2.JPEG"], side=140)
    # eval.py computes in fp32, so training has to validate in fp32 for the comparison below
    command = "train.py --scale B --res 128 --steps 1 --batch-size 2 --lpips-weight 0 --precision fp32"
    done = torchrun(tmp_path, command, IMAGENET="imagenet")
    assert done.returncode == 0, done.stderr
    assert "data: 4 images of imagenet/train; validation: 2 images of imagenet/val" in done.stdout
    run = Run(tmp_path / "out/litevae-b-128")
    assert [line["step"] for line in run.lines] == [1, 1] and "adv" in run.lines[0]

    monkeypatch.setenv("IMAGENET", "imagenet")
    call("eval", tmp_path, "out/litevae-b-128/ckpt.pt --imagenet-val --metrics psnr --json scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n"] == 2 and scores["res"] == 128
    # the same images and weights as the validation at the end of training
    assert scores["psnr"] == pytest.approx(run.lines[1]["val_psnr_ema"], abs=0.01)
    shutil.rmtree(run.folder)                                         # 0.9 GB


# ---- every other flag --------------------------------------------------------------------------------------

SHAPES = [  # flags, a tensor of the model, its shape
    ("--in-channels 1", "decoder.conv_out.weight", (1, 8, 3, 3)),
    ("--levels 2", "decoder.up.4.conv1.conv.weight", (8, 16, 3, 3)),
    ("--levels 4 --res 64", "encoder.extractors.3.conv_in.weight", (16, 12, 3, 3)),
    ("--encoder sd --scale B --steps 1 --ema-decay 0", "encoder.conv_in.weight", (128, 3, 3, 3)),
    ("--encoder sd --scale B --sd-channels 24", "encoder.conv_in.weight", (24, 3, 3, 3)),
    ("--encoder open-litevae --extractor-blocks 3", "encoder.extractors.0.mid_block.2.norm1.weight", (32,)),
    ("--encoder open-litevae --aggregator-blocks 3", "encoder.aggregator.mid_block.2.norm1.weight", (32,)),
    ("--decoder open-litevae", "decoder.conv_norm.scales", (8,)),
    ("--output wavelet", "decoder.conv_out.weight", (12, 8, 3, 3)),
    ("--decoder-norm group", "decoder.norm_out.weight", (8,)),
    ("--decoder-attention", "decoder.mid.1.qkv.weight", (96, 32, 1, 1)),
    ("--latent-channels 5", "decoder.conv_in.weight", (32, 5, 3, 3)),
    ("--dec-channels 12 --dec-blocks 2", "decoder.up.10.conv2.conv.weight", (12, 12, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("flags, name, shape", SHAPES, ids=[row[0] for row in SHAPES])
def test_architecture_flags(train_run, flags, name, shape):
    """Each trains two steps, changes every kind of layer it should, and shows in the weights' shapes."""
    run = train_run(flags)
    assert run.state()["model"][name].shape == shape
    assert all(math.isfinite(value) for line in run.lines for value in line.values())


LOGS = [  # flags, what their log lines of step 1 and 2 must satisfy, given those of SMALL
    ("--no-compile --no-conv1x1 --no-decoder-attention --no-freeze-encoder --no-adaptive-weight",
     lambda log, base: log == base),
    ("--num-workers 2", lambda log, base: log == base),
    ("--seed 1", lambda log, base: log[0]["kl"] != base[0]["kl"]),
    ("--rescale 1 2", lambda log, base: log[0]["l1"] != base[0]["l1"]),
    ("--initialisation torch", lambda log, base: log[0]["kl"] < 0.2 * base[0]["kl"]),
    ("--lr 1e-3", lambda log, base: log[0]["l1"] == base[0]["l1"] and log[1]["l1"] != base[1]["l1"]),
    ("--disc patch", lambda log, base: {"adv", "disc", "logits_real", "logits_fake"} <= log[0].keys()),
    ("--disc patch --disc-loss logistic --disc-weight 0.5",
     lambda log, base: abs(log[0]["disc"] - math.log(2)) < 0.2 and log[0]["disc_weight"] == 0.5),
    ("--l1-weight 0 --l2-weight 3 --wavelet-weight 0 --gaussian-weight 0 --kl-weight 2",
     lambda log, base: "l1" not in log[0] and "wavelet" not in log[0] and "gaussian" not in log[0]
     and log[0]["loss"] == pytest.approx(3 * log[0]["l2"] + 2 * log[0]["kl"])),
    ("--log-every 2", lambda log, base: log == base[1:]),
]  # fmt: skip


@pytest.mark.parametrize("flags, holds", LOGS, ids=[row[0] for row in LOGS])
def test_flags_that_show_in_the_log(train_run, base, flags, holds):
    """Each does in the first two log lines what it says; a switch turned off is no switch."""
    assert holds(train_run(flags).steps, base.steps)


def test_fault_05_parameters_stay_fp32_under_bf16(train_run):
    """Autocast to bf16 changes the numbers by less than 1%; all that is saved stays fp32."""
    flags = "--disc patch --steps 1 --batch-size 1 --val-count 1"
    run, exact = train_run(f"{flags} --precision bf16"), train_run(f"{flags} --out exact")
    for name in ("loss", "l1", "disc"):
        assert 0 < abs(run.steps[0][name] / exact.steps[0][name] - 1) < 0.01, name
    state = run.state()
    slots = [slot for name in OPTIMIZERS for slot in state[name]["state"].values()]
    tensors = [tensor for part in (*(state[name] for name in NETS), *slots) for tensor in part.values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def test_jpeg_oversampling(train_run, tmp_path):
    """JPEGs with pixels to spare train a little differently; 0 is full decoding, as of a lossless copy."""
    write_images(tmp_path / "jpeg", [f"{i}.jpg" for i in range(4)], side=128)
    (tmp_path / "png").mkdir()
    for file in (tmp_path / "jpeg").iterdir():
        Image.open(file).save(tmp_path / f"png/{file.stem}.png")
    flags = "--val-data synthetic --data"
    fast, exact = train_run(f"{flags} jpeg"), train_run(f"{flags} jpeg --jpeg-oversampling 0 --out exact")
    lossless = train_run(f"{flags} png --out png")
    assert exact.lines == lossless.lines
    for line, other in zip(fast.steps, exact.steps, strict=True):
        assert line["l1"] != other["l1"] and line["l1"] == pytest.approx(other["l1"], rel=0.05)


def test_listing_cache(train_run, tmp_path, monkeypatch):
    """The listings of training and validation images are kept, but not with --no-listing-cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "MIN_IMAGES", 1)
    monkeypatch.setattr(listings, "SETTLED", 0)
    for name in ("train", "val"):
        write_images(tmp_path / name, [f"{i}.png" for i in range(4)], side=32)
    without = train_run("--data train --no-listing-cache")
    assert not (tmp_path / "cache").exists()
    first, second = train_run("--data train --out first"), train_run("--data train --out second")
    assert len(list((tmp_path / "cache/litevae").iterdir())) == 2
    assert without.lines == first.lines == second.lines


def test_validation_data(train_run, tmp_path, capsys):
    """--val-data is what is validated on, --val-count of it, each --eval-every steps and at the end."""
    write_images(tmp_path / "own", [f"{i}.png" for i in range(6)], side=32)
    run = train_run("--val-data own --val-count 5 --eval-every 2 --steps 5")
    assert "validation: 5 images of own" in capsys.readouterr().out
    assert [line["step"] for line in run.lines if "val_psnr" in line] == [2, 4, 5]


def test_lpips_from_a_file(train_run, tmp_path):
    """--vgg-file: with VGG16 weights at hand, here random ones, --lpips-weight counts in the loss."""
    torch.manual_seed(0)
    weights = make_layers(cfgs["D"]).state_dict()
    torch.save({f"features.{name}": w for name, w in weights.items()}, tmp_path / "vgg.pth")
    line = train_run("--lpips-weight 2 --vgg-file vgg.pth --steps 1").steps[0]
    rest = line["l1"] + line["wavelet"] + 0.5 * line["gaussian"] + 6.25e-8 * line["kl"]
    assert line["lpips"] > 0 and line["loss"] == pytest.approx(rest + 2 * line["lpips"])


def test_compile(train_run, base, monkeypatch):
    """--compile traces the whole forward pass as one graph; numbers and names in checkpoints stay the same.

    Traced, but not made into C++: inductor takes minutes on a CPU.
    """
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    run = train_run("--compile --steps 1")
    assert run.steps[0] == pytest.approx(base.steps[0], rel=1e-5)
    assert run.state()["model"].keys() == base.state()["model"].keys()


def test_compiled_discriminator(train_run, parent, monkeypatch):
    """With autograd's ahead-of-time graphs, steps that are logged and others train as without compiling.

    Such a graph gives its buffers away in the backward pass, so that a second one through it is an error.
    """
    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend="aot_eager"))
    flags = "--res 64 --disc unet-s --steps 3 --batch-size 1 --log-every 2"
    run, plain = train_run(f"{flags} --compile"), train_run(f"{flags} --out plain")
    for line, expected in zip(run.steps, plain.steps, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_inductor(tmp_path):
    """C++ code for the whole step, alone and with DDP: the numbers of eager steps. Minutes."""
    flags = f"--data synthetic {SMALL} --res 64 --disc unet-s --steps 2 --batch-size 4"
    for out, more in (("plain", ""), ("compiled", "--compile"), ("ddp", "--compile")):
        if out == "ddp":
            done = torchrun(tmp_path, f"train.py {flags} {more} --out ddp")
            assert done.returncode == 0, done.stderr
        else:
            train_in(tmp_path, f"{flags} {more} --out {out}")
    plain, *others = (Run(tmp_path / out).steps for out in ("plain", "compiled", "ddp"))
    for steps in others:
        for line, expected in zip(steps, plain, strict=True):
            assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("flags", [
    "", "--dropout 0.5 --conv1x1", "--encoder open-litevae --extractor-blocks 3 --decoder open-litevae",
    "--extractor nafnet --aggregator vit",
], ids=["default", "dropout", "open-litevae", "ablations"])  # fmt: skip
def test_gradient_checkpointing(train_run, flags):
    """The same weights after two steps, and the blocks really run twice."""
    plain = train_run(f"{flags} --out plain")
    assert equal(train_run(f"{flags} --gradient-checkpointing").state()["model"], plain.state()["model"])


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_saves_memory(compiled):
    """Each block runs a second time in the backward pass, and far fewer numbers wait for that."""
    sizes = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(LiteVAEConfig(**scale_fields("S"), decoder_channels=8, decoder_blocks=1))
        x, seen = torch.randn(2, 3, 32, 32), {}
        if recompute:
            recompute_blocks(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            recon, _ = run(x)
        recon.sum().backward()
        sizes.append(sum(seen.values()))
    assert sizes[1] < 0.5 * sizes[0]


def test_moments_take_the_strides_of_their_parameters(train_run):
    """A checkpoint from CUDA, with moments in channels_last, resumes on the CPU as one from the CPU."""
    flags = "--steps 2 --save-every 1 --keep 9"
    straight, path = train_run(flags), None
    state = straight.state("ckpt-00000001.pt")
    for slot in state["opt"]["state"].values():
        for key, tensor in slot.items():
            if tensor.ndim == 4:
                slot[key] = tensor.contiguous(memory_format=torch.channels_last)
    path = straight.folder.parent / "cuda/ckpt.pt"
    path.parent.mkdir()
    torch.save(state, path)
    resumed = train_run(f"{flags} --resume {path} --out cuda")
    assert equal(straight.state()["model"], resumed.state()["model"])


# ---- what a user can get wrong -----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, parent) -> Path:
    """A checkpoint, damaged ones, a folder without images and one whose images are all broken."""
    (tmp_path / "good.pt").symlink_to(parent.folder / "ckpt.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("# not a checkpoint\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / f"broken/{i}.png").write_bytes(b"")
    return tmp_path


UNET = "--data synthetic --res 64 --disc unet-s --conv1x1"


@pytest.mark.parametrize("flags, expected", [
    ("", "no folder datasets/imagenet/train; set IMAGENET"),
    ("", "--data synthetic (needs no files)"),
    ("--data missing", "'missing' not found; give folders"),
    ("--data empty", "data source 'empty' contains no images"),
    ("--data text.pt", "is not a folder, .tar, .zip or image"),
    ("--data broken --val-data synthetic", "3 broken images in a row"),
    ("--data synthetic --val-data missing", "'missing' not found; give folders"),
    ("--data synthetic --val-data broken", "'broken': the first validation images are all broken"),
    ("--data synthetic --aggregator-blocks 3", "aggregator_blocks are 2 in litevae, got (2, 3)"),
    ("--data synthetic --decoder open-litevae --output wavelet", "it needs decoder_norm=smc"),
    ("--data synthetic --freeze-encoder", "give a trained one with --init CKPT"),
    ("--data synthetic --adaptive-weight", "--adaptive-weight needs a discriminator, got --disc none"),
    ("--data synthetic --ema-decay 1", "--ema-decay must be below 1, got 1.0"),
    (f"{UNET} --resume good.pt --freeze-encoder", "freeze_encoder=False, the flags ask for True"),
    ("--data synthetic --rescale 0.5 1", "rescale is 0.5 1.0, but must be 1 <= low <= high"),
    ("--data synthetic --res 100", "--res 100 is not divisible by the downsample factor 8"),
    ("--data synthetic --res 40 --levels 4", "--res 40 is not divisible by the downsample factor 16"),
    ("--data synthetic --res 8", "--res 8 is below 16"),
    ("--data synthetic --jpeg-oversampling 0.5", "oversampling is 0.5, but must be 0 or at least 1"),
    ("--data synthetic --res 96 --disc unet-s", "takes multiples of 64 pixels, at least 64, got 96x96"),
    ("--data synthetic --res 16 --disc patch", "takes multiples of 8 pixels, at least 32, got 16x16"),
    ("--data synthetic --cutmix 1 --disc patch", "--cutmix needs pixel logits, got --disc patch"),
    ("--data synthetic --cutmix 1", "--cutmix needs pixel logits, got --disc none"),
    ("--data synthetic --l1-weight 0", "--l1-weight or --l2-weight must be above 0"),
    ("--data synthetic --device tpu", "no device 'tpu'"),
    ("--data synthetic --lpips-weight 1 --vgg-file missing.pth", "needs VGG16 weights and could not load"),
    ("--data synthetic --out text.pt", "text.pt"),
    (f"{UNET} --resume missing.pt", "no checkpoint at missing.pt"),
    (f"{UNET} --resume cut.pt", "cut.pt is damaged or not a checkpoint"),
    (f"{UNET} --init text.pt", "text.pt is damaged or not a checkpoint"),
    (f"{UNET} --init good.pt --scale B", "extractor_channels=16, the flags ask for 32"),
    (f"{UNET} --init good.pt --no-conv1x1", "conv1x1=True, the flags ask for False"),
    (f"{UNET} --resume good.pt --dec-channels 16", "decoder_channels=8, the flags ask for 16"),
    (f"{UNET} --resume good.pt --disc none", "disc=unet-s, the flags ask for none"),
    (f"{UNET} --resume good.pt --batch-size 4", "was trained with --batch-size 2, not 4"),
    ("--data synthetic --batch-size 8 --micro-batch 3", "--micro-batch 3 does not divide the 8 images"),
])  # fmt: skip
def test_user_errors(place, refused, flags, expected):
    """Each is one line and exit code 2 before anything is written."""
    assert expected in refused("train", f"{SMALL} {flags}")


def test_lpips_without_network(refused, monkeypatch, tmp_path_factory):
    """No VGG16 file and no network: one line with the file, where it was looked for, and both ways out."""
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    home = tmp_path_factory.mktemp("hub")
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    line = refused("train", f"--data synthetic {SMALL} --lpips-weight 1")
    file = f"{home}/hub/checkpoints/vgg16-397923af.pth"
    for part in (file, "Name or service", "--vgg-file", "--lpips-weight 0"):
        assert part in line


def test_another_run_is_not_overwritten(place, refused):
    """--resume of a checkpoint elsewhere does not go on in an --out that holds a run of its own."""
    (place / "run").mkdir()
    shutil.copy(place / "good.pt", place / "run/ckpt.pt")
    line = refused("train", f"{UNET} {SMALL} --resume good.pt")
    assert "run already holds another run than good.pt" in line


def test_taken_out_is_refused(place, refused):
    """An --out that holds a run is left as it is, and the line names both ways out."""
    (place / "run").mkdir()
    shutil.copy(place / "good.pt", place / "run/ckpt.pt")
    before = (place / "run/ckpt.pt").read_bytes()
    line = refused("train", f"{SMALL} {UNET}")
    assert "run already holds a run" in line and "--resume" in line and "another --out" in line
    assert "run already holds a run" in refused("train", f"{SMALL} {UNET} --init good.pt")
    assert (place / "run/ckpt.pt").read_bytes() == before
