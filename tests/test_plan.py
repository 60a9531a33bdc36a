"""Run: python -m pytest tests/test_plan.py. --plan against hand counts, torch's tools and real steps."""

import os
import re

import pytest
import torch
from conftest import SMALL, call, torchrun
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

import plan
import train
from model import count_macs
from variants import options
from variants.build import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No ImageNet, no network, an empty torch hub, one thread."""
    def no_network(*args, **kwargs):
        raise AssertionError("a plan downloads nothing")

    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(flags: str = "", stepped: bool = True) -> train.Trainer:
    """A trainer at toy size; `stepped`: its optimizers have taken a step."""
    args = train.parse_args(f"{SMALL} --plan {flags}".split())
    trainer = train.Trainer(args, options.build_config(args), CPU)
    if stepped:
        plan.small_step(trainer, 1)
    return trainer


@pytest.fixture(scope="module")
def plain() -> train.Trainer:
    """SMALL as it is."""
    return make_trainer("--batch-size 12")


@pytest.fixture(scope="module")
def predictions(plain) -> dict[bool, plan.Prediction]:
    """Of `plain`, without and with gradient checkpointing."""
    return {recompute: plan.predict(plain, recompute) for recompute in (False, True)}


@pytest.fixture
def quick(monkeypatch):
    """One timed step is enough."""
    monkeypatch.setattr(plan, "STEPS", 1)


# ---- counting ----------------------------------------------------------------------------------------------


def test_live_agrees_with_the_allocator():
    """Every allocation of a step as torch's profiler sees it: temporaries inside kernels are below 3%."""
    trainer = make_trainer("--disc patch")
    peak = max(plan.small_step(trainer, 4).bytes)
    batches = plan.random_batches(trainer, 4)
    trainer.rows = [slice(0, 4)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step(0, batches, stop=False)
    sizes, now, most = [], 0, 0

    def collect(events: list) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    collect(profiler.profiler.kineto_results.experimental_event_tree())
    for _, size in sorted(sizes):
        now += size
        most = max(most, now)
    assert 0.97 * most < peak <= most


def test_operations_are_those_of_torchs_counter():
    """A whole step, discriminator and LPIPS included, and linear in the images."""
    trainer = make_trainer("--disc patch --lpips-weight 1")
    prediction = plan.predict(trainer, recompute=False)
    for images in (1, 4):
        trainer.rows, batches = [slice(0, images)], plan.random_batches(trainer, images)
        with FlopCounterMode(display=False) as counter:
            trainer.step(0, batches, stop=False)
        assert counter.get_total_flops() == prediction.flops + images * prediction.flops_per_image


def test_operations_by_hand(plain, predictions):
    """A step is three forward passes, less the input gradients of the layers that see the image first."""
    prediction = predictions[False]
    with torch.device("meta"):
        model = build(plain.config)
    forward = count_macs(model.encoder, 1, 3, 32, 32) + count_macs(model.decoder, 1, 12, 4, 4)
    first = sum(side * side * 9 * 12 * 16 for side in (16, 8, 4))      # conv_in of three extractors, scale S
    assert prediction.flops == 0
    assert prediction.flops_per_image == 2 * (3 * forward - first)


# ---- the fixed part ----------------------------------------------------------------------------------------

P = 1_038_012 + 108_199           # LiteVAE-S, decoder of width 8
DECODER = 108_199
PATCH = 2_765_633
VGG = 14_714_688 + 64 + 128 + 256 + 512 + 512 + 6                     # convolutions, linear layers, scaling


@pytest.mark.parametrize("flags, copies", [
    ("", {"weights": P, "gradients": P, "Adam": 2 * P, "average": P}),
    ("--ema-decay 0", {"weights": P, "gradients": P, "Adam": 2 * P}),
    ("--freeze-encoder --init x.pt",
     {"weights": P, "gradients": DECODER, "Adam": 2 * DECODER, "average": P}),
    ("--lpips-weight 1", {"weights": P, "gradients": P, "Adam": 2 * P, "average": P, "loss networks": VGG}),
    ("--gradient-checkpointing", {"weights": P, "gradients": P, "Adam": 2 * P, "average": P}),
])  # fmt: skip
def test_fixed_part_by_hand(flags, copies):
    """4 bytes for each number of each copy, exactly."""
    sizes = plan.fixed(make_trainer(flags, stepped=False))
    assert sizes == {kind: 4 * count for kind, count in copies.items()}


def test_fixed_part_with_a_discriminator():
    """It has weights, gradients and Adam, no average; batch norm's statistics and counters."""
    sizes = plan.fixed(make_trainer("--disc patch", stepped=False))
    statistics = 2 * 4 * (128 + 256 + 512) + 3 * 8
    assert sizes == {"weights": 4 * (P + PATCH) + statistics, "gradients": 4 * (P + PATCH),
                     "Adam": 8 * (P + PATCH), "average": 4 * P}


def test_fixed_part_with_muon():
    """Muon keeps one number where Adam keeps two: for all weights of two or more dimensions but the edges."""
    trainer = make_trainer("--optimizer muon", stepped=False)
    edges = ("conv_in.weight", "conv_out.weight")
    muon = sum(p.numel() for name, p in trainer.model.named_parameters()
               if p.ndim > 1 and not name.endswith(edges))
    sizes = plan.fixed(trainer)
    assert (sizes["Muon"], sizes["Adam"]) == (4 * muon, 8 * (P - muon)) and muon > 0.9 * P
    assert sizes["gradients"] == 4 * P


@pytest.mark.parametrize("flags", ["--disc patch", "--optimizer muon"])
def test_fixed_part_is_what_is_there(flags):
    """All but the gradients lies in networks and optimizers after a step, beside Adam's step counters."""
    trainer = make_trainer(flags)
    counters = 4 * sum(len(optimizer.state) for name, optimizer in trainer.optimizers.items()
                       if optimizer and name != "opt_muon")
    sizes = plan.fixed(trainer)
    assert plan.nbytes(plan.held(trainer)) == sum(sizes.values()) - sizes["gradients"] + counters


# ---- prediction and measurement ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--batch-size 9",
    "--res 64 --disc unet-s --batch-size 4 --disc-start 3 --disc-warmup 2",
    "--optimizer muon --batch-size 1",
    "--lpips-weight 1 --disc patch --batch-size 4",
    "--gradient-checkpointing --batch-size 16",
    "--precision bf16 --batch-size 8",
    "--disc patch --alternate --r1 1 --r1-every 3 --lecam 0.1 --adaptive-weight --batch-size 4",
    "--codebook-size 16 --codebook-update ema --conv1x1 --ldl-weight 0.1 --batch-size 4",
], ids=["plain", "disc", "muon", "lpips", "recompute", "bf16", "alternate", "codebook"])  # fmt: skip
def test_prediction_is_what_is_measured(quick, flags):
    """From steps of 2 and 3 images, within 0.1% of a step of the real size."""
    trainer = make_trainer(flags)
    batch, recompute = trainer.args.batch_size, trainer.args.gradient_checkpointing
    predicted, measured = plan.predict(trainer, recompute), plan.measure(trainer, batch, 1)
    assert predicted.peak(batch, batch) == pytest.approx(measured.bytes, rel=1e-3)
    assert measured.bytes > plan.nbytes(plan.held(trainer)) + trainer_gradients(trainer)


def trainer_gradients(trainer: train.Trainer) -> int:
    """Bytes of the gradients that the autoencoder has at the end of its backward pass."""
    return sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)


def test_prediction_with_accumulation(quick):
    """The gradients that wait are added, so the prediction is a bound, and at most by them too high."""
    trainer = make_trainer("--disc patch --batch-size 8 --micro-batch 2")
    predicted, measured = plan.predict(trainer, False).peak(2, 8), plan.measure(trainer, 2, 4).bytes
    assert measured <= predicted <= 1.01 * measured + 4 * max(P, PATCH)


def test_an_image_costs_what_backward_saves(plain, predictions):
    """For many images the growth is the bytes that autograd saves, and at most a tenth more."""
    trainer, prediction, sizes = plain, predictions[False], []
    for images in (1, 2):
        x, noise = next(plan.random_batches(trainer, images))
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = x / 127.5 - 1
            outputs = trainer.model(x, noise, with_features=True)
            trainer.model_losses(slice(0, images), x, noise, *outputs, others=[], adversarial=False)
        sizes.append(sum(storage.nbytes() for storage in saved.values()))
    growth = prediction.peak(1001, 1001) - prediction.peak(1000, 1000)
    assert sizes[1] - sizes[0] <= growth < 1.1 * (sizes[1] - sizes[0])


def test_gradient_checkpointing_needs_less(plain, predictions):
    """An image costs less than half, and more operations; the model is left as it was."""
    without, recompute = predictions.values()
    growth = [prediction.peak(101, 101) - prediction.peak(100, 100) for prediction in (without, recompute)]
    assert growth[1] < 0.5 * growth[0] and recompute.flops_per_image > without.flops_per_image
    assert plan.small_step(plain, 3).bytes == without.three.tolist()


def test_prediction_by_hand():
    """One operation keeps 100, the other 30 for each image. 1000 stay; 50 wait, and 1 for each image."""
    two, three = torch.tensor([100, 60]), torch.tensor([100, 90])
    prediction = plan.Prediction(1000, two, three, gradients=50, pair=1, flops=0, flops_per_image=0)
    assert [prediction.peak(n, n) for n in (1, 2, 3, 4, 8)] == [1100, 1100, 1100, 1120, 1240]
    assert [prediction.peak(n, 12) for n in (1, 3, 4, 12)] == [1161, 1159, 1178, 1360]
    assert [prediction.largest(12, budget) for budget in (1158, 1159, 1236, 1359, 1360)] == [0, 3, 6, 6, 12]


def test_other_operations_leave_the_peaks():
    """Should steps of 2 and 3 images differ in their operations, their peaks make the line."""
    two, three = plan.timelines([1, 7, 2], [1, 9])
    assert (two.tolist(), three.tolist()) == ([7], [9])
    assert [t.tolist() for t in plan.timelines([1, 7], [1, 9])] == [[1, 7], [1, 9]]


def test_what_does_not_fit(quick, plain, predictions, monkeypatch):
    """The largest micro-batch that fits is measured in place of the one asked for, and the table says so."""
    trainer, prediction = plain, predictions[False]
    budget = (prediction.peak(4, 12) + prediction.peak(6, 12)) / 2
    free = int(budget / plan.USABLE) - plan.nbytes(plan.held(trainer))
    monkeypatch.setattr(plan, "predict", lambda trainer, recompute: predictions[recompute])
    monkeypatch.setattr(plan, "free_memory", lambda device: free)
    found = plan.make(trainer, 12, 1)
    assert (found.micro, found.share, found.largest[False]) == (4, 12, 4) and found.largest[True] == 12
    text = "\n".join(plan.table(trainer, found))
    assert "4 of 12 without --gradient-checkpointing, 12 of 12 with" in text
    assert "in micro-batches of 4" in text
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)
    text = "\n".join(plan.table(trainer, plan.make(trainer, 12, 1)))
    assert "none of 12 without --gradient-checkpointing, none of 12 with" in text
    assert "in micro-batches of 1: does not fit" in text and "not measured" in text


def test_free_memory(monkeypatch):
    """Between the pages that nothing uses and all pages; processes of one machine share it."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = plan.free_memory(CPU)
    assert 0.8 * page * os.sysconf("SC_AVPHYS_PAGES") < free < page * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan.free_memory(CPU) == pytest.approx(free / 4, rel=0.2)


def test_hours():
    """200,000 steps of 32 images at 100 images a second are 64,000 seconds."""
    assert plan.hours(200_000 * 32, 100) == pytest.approx(64_000 / 3600)


def test_speed_counts_all_processes():
    """10 steps of 8 images in 5 seconds are 16 img/s, on however many; 3600 steps take half an hour."""
    args = train.parse_args("--steps 3600 --batch-size 8".split())
    rows = plan.time_rows(args, 2, plan.Measurement(1, steps=10, seconds=5.0))
    assert rows["speed"].startswith("16 img/s over 10 steps")
    assert rows["hours"].startswith("0.5 for --steps 3600 on 2 processes, 0.125 on 8 (perfect scaling")


def test_steps_in_time():
    """20 steps, fewer if they would take more than a minute, whole turns, at least one."""
    assert [plan.steps_in_time(seconds, 1) for seconds in (0.1, 3, 7, 61)] == [20, 20, 8, 1]
    assert [plan.steps_in_time(seconds, 2) for seconds in (0.1, 6.5, 61)] == [20, 8, 2]


def test_everything_trains_in_the_first_step():
    """After the start and warm-up of the discriminator, the first of its turn, and with R1 in that turn."""
    flags = "--disc-start 100 --disc-warmup 1 --r1 1 --r1-every 3"
    assert plan.first_step(train.parse_args(flags.split())) == 101         # the 102nd update
    assert plan.first_step(train.parse_args(f"{flags} --alternate".split())) == 106      # 107 is the 54th
    assert plan.first_step(train.parse_args([])) == 0


# ---- the command -------------------------------------------------------------------------------------------

ROWS = ("device", "parameters", "operations", "fixed", "variable", "peak", "usable", "micro-batch", "speed",
        "hours")


def test_command(quick, tmp_path, capsys):
    """A table without data, and notes about checkpoints and LPIPS. It returns, and nothing is written."""
    call("train", tmp_path, f"{SMALL} --plan --disc patch --lpips-weight 1 --init no.pt --resume no.pt")
    notes, lines = [], capsys.readouterr().out.splitlines()
    while lines[0].startswith("note: "):
        notes.append(lines.pop(0))
    assert notes[0].startswith("note: LPIPS gets random weights for this plan, since there is no ")
    assert notes[1:] == [f"note: --plan does not read --{name} no.pt" for name in ("init", "resume")]
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert tuple(rows) == ROWS
    assert rows["parameters"] == "encoder 1,038,012, decoder 108,199, discriminator 2,765,633"
    assert f"loss networks {plan.memory(4 * VGG)}" in rows["fixed"]
    assert "predicted" in rows["peak"] and "measured" in rows["peak"] and "error +0.0%" in rows["peak"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes(tmp_path):
    """torchrun's exit code is 0, rank 0 alone prints, and a run that is in --out already stays as it is."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.pt").write_text("a run")
    done = torchrun(tmp_path, f"train.py {SMALL} --plan --batch-size 4")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(ROWS)
    assert "2 processes" in done.stdout and "2 of 2 without" in done.stdout
    assert f"{plan.memory(5 * 4 * P)}: weights" in done.stdout    # DDP's buckets are the gradients
    error = re.search(r"error ([+-][\d.]+)%", done.stdout)[1]
    assert abs(float(error)) < 1
    more = torchrun(tmp_path, f"train.py {SMALL} --plan --batch-size 16")    # its peak is before any gradient
    assert "error +0.0%" in more.stdout
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["run", "run/ckpt.pt"]


def test_lpips_with_weights(tmp_path, capsys):
    """A file that is there is read."""
    weights = make_layers(cfgs["D"]).state_dict()
    torch.save(weights, tmp_path / "vgg.pth")
    trainer = make_trainer(f"--lpips-weight 1 --vgg-file {tmp_path}/vgg.pth", stepped=False)
    assert "note" not in capsys.readouterr().out
    assert torch.equal(plan.loss_networks(trainer)[0].lpips.net.slice1[0].weight, weights["0.weight"])


@pytest.mark.parametrize("flags, expected", [
    ("--res 100", "--res 100 is not divisible by the downsample factor 8"),
    ("--batch-size 8 --micro-batch 3", "--micro-batch 3 does not divide the 8 images"),
    ("--freeze-encoder", "give a trained one with --init CKPT"),
    ("--res 96 --disc unet-s", "takes multiples of 64 pixels, at least 64, got 96x96"),
    ("--lpips-weight 1 --vgg-file no.pth", "LPIPS needs VGG16 weights and could not load no.pth"),
    ("--encoder sd", "--scale S has no effect"),
    ("--device tpu", "no device 'tpu'"),
])  # fmt: skip
def test_wrong_flags(refused, flags, expected):
    """The same checks as in training: one line, exit code 2."""
    assert expected in refused("train", f"{SMALL} --plan {flags}")


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    """A GPU that is too small for the plan itself: one line, exit code 1."""
    def full(trainer, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\n to allocate")

    monkeypatch.setattr(plan, "small_step", full)
    with pytest.raises(SystemExit) as stop:
        call("train", tmp_path, f"{SMALL} --plan")
    line = capsys.readouterr().err
    assert stop.value.code == 1 and line.count("\n") == 1 and "CUDA out of memory. Tried to allocate" in line
