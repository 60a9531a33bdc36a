"""What a run will need: `train.py --plan` prints sizes, operations, memory, speed and hours, and exits.

    python train.py @recipes/litevae-b-128.args --plan

Images, noise and network weights are random. Time and memory do not depend on their values, so a plan needs
no data and no checkpoint, and writes no file. `trainer` is train.Trainer everywhere.

operations   Those of convolutions and matrix products, forward and backward, counted by
             runtime.measure.Tally.
fixed        4 bytes for each number in weights, gradients, optimizers, average and loss networks.
prediction   Steps of 2 and of 3 images run under a Tally, which follows the bytes that are alive. All steps
             have the same operations, and what is alive after each of them is linear in the number of
             images. The peak is the highest of these lines.
measurement  On CUDA: torch.cuda.max_memory_allocated over the timed steps. Elsewhere: a step of the real
             size under a Tally.

A Tally does not see the memory that kernels use inside (workspaces of cuDNN and oneDNN). It sees networks
that are not compiled; compiled ones usually need less.
"""

import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from data import GlobalBatchSampler
from model import count_parameters
from runtime import distributed, weights
from runtime.distributed import print0
from runtime.measure import Tally
from variants.build import recompute_blocks

STEPS = 20          # timed; elsewhere than on CUDA fewer if they take longer than SECONDS
SECONDS = 60.0
WARM_UP = 3         # steps before the timed ones, to compile and, on CUDA, to choose kernels
USABLE = 0.9        # ours: the part of the free memory to plan with; the rest is for workspaces
DEVICES = 8         # of the recipes' commands


# ----------------------------------------------------------------------------
# counting


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    return [tensor for module in modules if module for tensor in (*module.parameters(), *module.buffers())]


def loss_networks(trainer) -> list[nn.Module]:
    terms = (term for _, _, term in (*trainer.terms, *trainer.extra.terms))
    return [term for term in terms if isinstance(term, nn.Module)]


def held(trainer) -> list[Tensor]:
    """What a trainer keeps from one step to the next: networks, states of optimizers, loss networks."""
    optimizers = filter(None, trainer.optimizers.values())
    slots = [slot for optimizer in optimizers for slot in optimizer.state.values()]
    states = [value for slot in slots for value in slot.values() if torch.is_tensor(value)]
    return tensors_of(*trainer.nets.values(), *loss_networks(trainer)) + states


def trained(trainer, *names: str) -> int:
    """How many numbers these optimizers train."""
    optimizers = filter(None, (trainer.optimizers[name] for name in names))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return sum(p.numel() for group in groups for p in group["params"])


def fixed(trainer) -> dict[str, int]:
    """Bytes that do not depend on the micro-batch, by kind; everything is fp32, 4 bytes a number.

    Adam keeps two numbers for each that it trains, Muon one.
    """
    adam, muon = trained(trainer, "opt", "opt_disc"), trained(trainer, "opt_muon")
    nets = [net for name, net in trainer.nets.items() if name != "ema"]
    kinds = {
        "weights": nbytes(tensors_of(*nets)),
        "gradients": 4 * (adam + muon),
        "Adam": 2 * 4 * adam,
        "Muon": 4 * muon,
        "average": nbytes(tensors_of(trainer.ema)),
        "loss networks": nbytes(tensors_of(*loss_networks(trainer))),
    }
    return {kind: size for kind, size in kinds.items() if size}


def buckets(trainer) -> int:
    """Bytes in which DDP keeps the gradients, between steps too; 0 without DDP."""
    return fixed(trainer)["gradients"] if distributed.world_size() > 1 else 0


# ----------------------------------------------------------------------------
# steps


def first_step(args) -> int:
    """The number of a step in which all networks train, with R1 if there is any."""
    every = args.r1_every if args.r1 else 1
    updates = -(-(args.disc_start + args.disc_warmup) // turns(args)) + 1
    return turns(args) * (-(-updates // every) * every - 1)


def turns(args) -> int:
    """Steps that belong together: one, or with --alternate one of each network."""
    return 1 + args.alternate


def random_batches(trainer, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images and noise of one micro-batch, again and again; pinned for CUDA, as a loader's are."""
    args, config = trainer.args, trainer.config
    side = args.res // config.downsample_factor
    x = torch.randint(0, 256, (images, args.in_channels, args.res, args.res), dtype=torch.uint8)
    noise = torch.randn(images, config.latent_channels, side, side)
    return repeat(tuple(t.pin_memory() if trainer.device.type == "cuda" else t for t in (x, noise)))


def watched(trainer, batches: Iterator[tuple[Tensor, Tensor]]) -> Tally:
    """Takes one step, or one of each kind, under a Tally."""
    start = first_step(trainer.args)
    with Tally(trainer.device) as tally:
        for step in range(start, start + turns(trainer.args)):
            trainer.step(step, batches, stop=False)
    return tally


def small_step(trainer, images: int) -> Tally:
    """A step of one micro-batch of so many images on each process, neither compiled nor in DDP."""
    args, batch = trainer.args, trainer.args.batch_size
    trainer.rows, trainer.inherited = [slice(0, images)], False
    trainer.ddp_model, trainer.ddp_disc, trainer.judge = trainer.model, trainer.disc, trainer.disc
    args.batch_size = images
    tally = watched(trainer, random_batches(trainer, images))
    args.batch_size = batch
    return tally


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """The model with gradient checkpointing, and afterwards without."""
    recompute_blocks(model)
    yield
    for module in model.modules():
        vars(module).pop("forward", None)


# ----------------------------------------------------------------------------
# prediction


class Prediction(NamedTuple):
    """Bytes and FLOPs of a step of one process, as functions of its images.

    two, three: bytes that are alive besides `base` after each operation, in steps of 2 and of 3 images. (In a
    step of 1 image, an operation or two may be missing: a dimension of 1 needs no transposing.)
    """

    base: int                # bytes that stay from one step to the next
    two: Tensor
    three: Tensor
    gradients: int           # bytes that wait while further micro-batches pass
    pair: int                # bytes of an image and its reconstruction, which wait for the discriminator
    flops: int
    flops_per_image: int

    def peak(self, images: int, share: int) -> int:
        """Bytes at the peak of a step of `share` images in micro-batches of `images`; at most, if several."""
        alive = self.two + (images - 2) * (self.three - self.two)
        waiting = self.gradients + (share - images) * self.pair if images < share else 0
        return self.base + int(alive.max()) + waiting

    def largest(self, share: int, budget: float) -> int:
        """The largest micro-batch that divides the share and fits into so many bytes, 0 if none does."""
        return max((n for n in divisors(share) if self.peak(n, share) <= budget), default=0)


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def predict(trainer, recompute: bool) -> Prediction:
    """The prediction with or without gradient checkpointing; the states of the optimizers must exist."""
    with recomputed(trainer.model) if recompute else nullcontext():
        two, three = small_step(trainer, 2), small_step(trainer, 3)
    base = nbytes(held(trainer)) + buckets(trainer)
    # in the discriminator's half, the autoencoder's gradients are always there
    gradients = 4 * max(trained(trainer, "opt", "opt_muon"), trained(trainer, "opt_disc"))
    pair = 2 * 4 * trainer.args.in_channels * trainer.args.res**2
    image = three.flops - two.flops
    flops = (two.flops - 2 * image) // turns(trainer.args), image // turns(trainer.args)
    return Prediction(base, *timelines(two.bytes, three.bytes), gradients, pair, *flops)


def timelines(two: list[int], three: list[int]) -> tuple[Tensor, Tensor]:
    """Both as tensors of one length: if the operations should differ, only the peaks are compared."""
    same = len(two) == len(three)
    return tuple(torch.tensor(alive if same else [max(alive)]) for alive in (two, three))


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: of its GPU, or its part of the available RAM."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    else:                                                 # macOS tells only what there is in all
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ----------------------------------------------------------------------------
# measurement


class Measurement(NamedTuple):
    bytes: int
    steps: int
    seconds: float           # of all these steps


def measure(trainer, micro: int, accumulate: int) -> Measurement:
    """Peak and time of steps as in training: compiled and with DDP where training has them."""
    rank, world = distributed.rank(), distributed.world_size()
    sampler = GlobalBatchSampler(micro, accumulate, rank, world, 0, 1)
    trainer.prepare([sampler.rows(i) for i in range(accumulate)], inherited=False)
    batches, cuda = random_batches(trainer, micro), trainer.device.type == "cuda"
    steps, peak = STEPS, 0
    if not cuda:
        began = time.perf_counter()
        peak = watched(trainer, batches).peak + nbytes(held(trainer)) + buckets(trainer)
        steps = steps_in_time((time.perf_counter() - began) / turns(trainer.args), turns(trainer.args))
    if cuda or trainer.compiled:
        take_steps(trainer, batches, WARM_UP * turns(trainer.args))
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = take_steps(trainer, batches, steps)
    return Measurement(torch.cuda.max_memory_allocated(trainer.device) if cuda else peak, steps, seconds)


def steps_in_time(seconds: float, turns: int) -> int:
    """How many steps of so many seconds to time: STEPS, or what SECONDS allow; whole turns, at least one."""
    steps = min(STEPS, int(SECONDS / max(distributed.gather(seconds))))
    return max(turns, steps - steps % turns)


def take_steps(trainer, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> float:
    """The seconds that so many steps take, until their last number has arrived."""
    start, began = first_step(trainer.args), time.perf_counter()
    for step in range(start + 1, start + 1 + count):
        numbers = trainer.step(step, batches, stop=False)
    numbers.read()
    return time.perf_counter() - began


# ----------------------------------------------------------------------------
# weights of LPIPS


def load_vgg(file: str | None) -> dict[str, Tensor]:
    """VGG16's weights if they are there, else random ones and a note; ValueError if `file` cannot be read."""
    path = weights.find(weights.URLS["vgg"], file)
    if file or path.exists():
        return weights.load_vgg(file)
    print0(f"note: LPIPS gets random weights for this plan, since there is no {path}")
    return make_layers(cfgs["D"]).state_dict()


# ----------------------------------------------------------------------------
# the plan


@dataclass
class Plan:
    fixed: dict[str, int]
    budget: float                        # bytes that all tensors may take
    predicted: dict[bool, Prediction]    # without and with gradient checkpointing
    largest: dict[bool, int]             # micro-batch that fits, likewise; 0 if none does
    micro: int                           # images of a micro-batch that was measured, 0 if none was
    share: int                           # images of a process in a step
    measured: Measurement | None


def make(trainer, micro: int, accumulate: int) -> Plan:
    """Predicts, and measures what fits: micro-batches as asked for, or the largest that fit."""
    share, recompute = micro * accumulate, trainer.args.gradient_checkpointing
    budget = USABLE * min(distributed.gather(nbytes(held(trainer)) + free_memory(trainer.device)))
    small_step(trainer, 1)                                # makes the states of the optimizers
    predicted = {flag: predict(trainer, flag) for flag in (False, True)}
    largest = {flag: prediction.largest(share, budget) for flag, prediction in predicted.items()}
    if predicted[recompute].peak(micro, share) > budget:
        micro = largest[recompute]
    measured = measure(trainer, micro, share // micro) if micro else None
    return Plan(fixed(trainer), budget, predicted, largest, micro, share, measured)


def hours(images: float, rate: float) -> float:
    """Hours for so many images at `rate` images per second."""
    return images / rate / 3600


def time_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def giga(count: float) -> str:
    return f"{count / 1e12:,.4g} T" if count >= 1e12 else f"{count / 1e9:,.4g} G"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{cpu}, {torch.get_num_threads()} threads" if device.type == "cpu" else platform.machine()


def table(trainer, plan: Plan) -> list[str]:
    """The lines that --plan prints."""
    args, model, disc, world = trainer.args, trainer.model, trainer.disc, distributed.world_size()
    prediction = plan.predicted[args.gradient_checkpointing]
    flops = args.batch_size * prediction.flops_per_image + world * prediction.flops
    further = prediction.peak(plan.share + 1, 0) - prediction.peak(plan.share, 0)
    largest = [f"{plan.largest[flag] or 'none'} of {plan.share} {word} --gradient-checkpointing"
               for flag, word in ((False, "without"), (True, "with"))]
    rows = {
        "device": f"{trainer.device} ({device_name(trainer.device)}), {trainer.precision}, "
                  f"{'compiled' if trainer.compiled else 'eager'}, {processes(world)}",
        "parameters": f"encoder {count_parameters(model.encoder):,}, decoder "
                      f"{count_parameters(model.decoder):,}, discriminator "
                      f"{count_parameters(disc) if disc else 0:,}",
        "operations": f"{giga(flops / 2)}MACs = {giga(flops)}FLOPs in a step of {args.batch_size} images",
        "fixed": f"{memory(sum(plan.fixed.values()))}: "
                 + ", ".join(f"{kind} {memory(size)}" for kind, size in plan.fixed.items()),
        "variable": f"{memory(further)} for each further image of a micro-batch (predicted)",
        "peak": peak_text(plan, prediction, trainer.device),
        "usable": f"{memory(plan.budget)}, {USABLE:.0%} of the free memory",
        "micro-batch": f"largest that fits: {', '.join(largest)}",
        **time_rows(args, world, plan.measured),
    }  # fmt: skip
    return [f"{label:<12}{text}" for label, text in rows.items()]


def processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def peak_text(plan: Plan, prediction: Prediction, device: torch.device) -> str:
    if not plan.measured:
        return f"predicted {memory(prediction.peak(1, plan.share))} in micro-batches of 1: does not fit"
    predicted, measured = prediction.peak(plan.micro, plan.share), plan.measured.bytes
    means = "allocated by torch" if device.type == "cuda" else "live tensors"
    return (f"predicted {memory(predicted)}, measured {memory(measured)} ({means}), error "
            f"{predicted / measured - 1:+.1%}, in micro-batches of {plan.micro}")


def time_rows(args, world: int, measured: Measurement | None) -> dict[str, str]:
    """Speed and hours; more processes are taken to be as fast as these, each for itself."""
    if not measured:
        return {"speed": "not measured"}
    rate, images = args.batch_size * measured.steps / measured.seconds, args.batch_size * args.steps
    scaled = hours(images, rate * DEVICES / world)
    return {
        "speed": f"{rate:.3g} img/s over {measured.steps} steps, without reading data",
        "hours": f"{time_text(hours(images, rate))} for --steps {args.steps} on {processes(world)}, "
                 f"{time_text(scaled)} on {DEVICES} (perfect scaling: each as fast as one here)",
    }  # fmt: skip


def show(trainer, micro: int, accumulate: int) -> None:
    """Prints the plan on rank 0; all processes take part. Exit code 1 if a GPU's memory runs out over it."""
    args = trainer.args
    for name in ("init", "resume"):
        if getattr(args, name):
            print0(f"note: --plan does not read --{name} {getattr(args, name)}")
    try:
        plan = make(trainer, micro, accumulate)
    except torch.OutOfMemoryError as error:
        print(f"[rank {distributed.rank()}] error: out of memory in the plan's own steps (3 images, or a "
              f"micro-batch): {weights.one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    for line in table(trainer, plan):
        print0(line)
