"""Train a LiteVAE, or a system from variants/: flags, set-up, and one loop.

    torchrun --nproc_per_node=8 train.py --scale B --res 128      # ImageNet on 8 GPUs, our defaults
    python train.py @recipes/demo.args                            # minutes on a CPU, generated images

Each step updates both networks: the autoencoder on reconstruction, KL and adversarial terms with constant
weights (paper Sec. 4.3), the discriminator on the same images and reconstructions. --batch-size counts the
images of all processes, so the run does not depend on the number of GPUs. All randomness derives from (seed,
step, sample), so resuming needs only the step and is exact to the bit.

Exit codes: 0 done; 1 the run failed; 2 the set-up was rejected; 75 stopped by SIGTERM, SIGINT or SIGUSR1
within two steps, and saved (--resume continues). A second SIGINT ends the run at once.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import checkpoint
import data
import losses
import plan
from discriminators import update_spectral_norm
from evaluation import metrics
from losses import DEFAULT_WEIGHTS as W
from model import SCALES, LiteVAEConfig, Posterior, count_parameters
from optimizers import Muon, adam, set_rate, split_parameters
from runtime import cli, distributed, sources
from runtime.distributed import print0
from runtime.failures import STOPPED, catch_signals, failures
from runtime.log import Log, Numbers, Progress, Waiting, best_by, history
from runtime.watch import Watch
from runtime.weights import load_vgg
from variants import options
from variants.build import DISCRIMINATORS, build, build_discriminator, recompute_blocks
from wavelets import FILTERS

# ----------------------------------------------------------------------------
# flags

MAX_SKIPPED = 10       # ours: steps in a row that are not finite before the run ends


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="checkpoints and logs (default: out/<model>-<res>)")
    add("--resume", nargs="?", const="latest", metavar="CKPT",
        help="continue from CKPT; without CKPT: from the newest good one in --out, or from step 0")
    add("--init", metavar="CKPT",
        help="new phase: weights of model, EMA and discriminator, fresh optimizers, step 0")
    add("--allow-batch-change", action="store_true",
        help="--resume with another --batch-size, although the order of the images then jumps")
    add("--plan", action="store_true",
        help="print parameters, operations, memory, speed and hours of these flags, and train nothing")
    add("--seed", type=cli.natural, default=0, help="of weights, data order, crops and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="bf16 autocast or fp32 (on CUDA fp32 means TF32); auto: bf16 where it is faster")
    add("--compile", action=switch, help="torch.compile (default: on CUDA only)")

    text = "sources are folders, .tar, .zip, globs, {0000..0252} ranges, joined by commas, or 'synthetic'"
    add = parser.add_argument_group("data", text).add_argument
    add("--data", metavar="SRC", help="training images (default: $IMAGENET/train or datasets/imagenet/train)")
    add("--val-data", metavar="SRC",
        help="validation images (default: the val folder next to train/, else images held out of training)")
    add("--val-count", type=cli.positive, default=256,
        help="images to validate on; without --val-data at most a quarter of --data")
    add("--res", type=cli.positive, default=128, help="side of the square training crops, pixels")
    add("--rescale", type=float, nargs=2, default=(1.0, 1.0), metavar=("LO", "HI"),
        help="short side uniform in [LO res, HI res] before the crop; open-LiteVAE: 1 2")
    add("--jpeg-oversampling", type=cli.amount, default=data.OVERSAMPLING,
        help="decode training JPEGs at 1/2, 1/4 or 1/8 if the short side then has X times the length "
             "that it is resized to; 0: always in full")
    add("--num-workers", type=cli.natural, default=data.default_workers(),
        help="loader processes of each training process; 4, or fewer on fewer cores")
    add("--listing-cache", action=switch, default=True,
        help="keep long listings of files in ~/.cache/litevae and use them while nothing has changed")

    add = parser.add_argument_group("model").add_argument
    add("--scale", choices=tuple(SCALES), default="B", help="size of the wavelet encoder, paper Table 2")
    add("--wavelet", choices=tuple(FILTERS), default="haar", help="of the encoder and of wavelet output")
    add("--latent-channels", type=cli.positive, default=12, help="n_z")
    add("--levels", type=int, choices=(2, 3, 4), default=3, help="the latent is 4, 8 or 16 times smaller")
    add("--in-channels", type=int, choices=(1, 3), default=3, help="1 trains on grey images")
    add("--dec-channels", dest="decoder_channels", type=cli.positive, default=128,
        help="base width of the decoder")
    add("--dec-blocks", dest="decoder_blocks", type=cli.positive, default=3,
        help="ResBlocks per resolution of the decoder")
    add("--decoder-norm", choices=("smc", "group"), default="smc",
        help="smc: self-modulated convolutions (Eq. 3); group: SD-VAE's group norm")
    add("--decoder-attention", action=switch, default=False, help="in the middle of the decoder")
    add("--output", choices=("image", "wavelet"), default="image", help="what the decoder predicts")
    add("--freeze-encoder", action=switch, default=False,
        help="train only the decoder, from the EMA weights of --init")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=cli.positive, default=200_000, help="each updates both networks, or one in turn")
    add("--batch-size", type=cli.positive, default=32, help="images per step, over all processes")
    add("--micro-batch", type=cli.natural, default=0, metavar="N",
        help="images of one process that go through the networks at once; its gradients accumulate over its "
             "share of the batch; 0: the whole share")
    add("--gradient-checkpointing", action=switch, default=False,
        help="the backward pass of the autoencoder recomputes its blocks: less memory, a slower step")
    add("--optimizer", choices=("adam", "muon"), default="adam",
        help="of the autoencoder; muon: for inner convolutions and linear layers, Adam for the rest")
    add("--lr", type=cli.amount, default=1e-4, help="of the autoencoder; Adam has betas (0.5, 0.9)")
    add("--lr-scaling", choices=("fan-in", "none"),
        help="Adam's rate of the autoencoder: --lr x min(1, 144 / inputs per output), or --lr for all "
             "(default: fan-in with --decoder-norm smc, else none)")
    add("--disc-lr", type=cli.amount, default=1e-4,
        help="Adam's rate of the discriminator, one for all layers")
    add("--warmup", type=cli.natural, default=1000,
        help="steps of linear learning-rate warm-up of each network; not in the paper")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="cosine ends at 0")
    add("--clip", type=cli.amount, default=0.0, help="limit of both gradient norms, 0 = off")
    add("--ema-decay", type=cli.amount, default=0.999, help="of the moving average of weights, 0 = off")

    add = parser.add_argument_group("discriminator").add_argument
    add("--disc", choices=("none", *DISCRIMINATORS), default="unet-s", help="paper Table 10")
    add("--disc-loss", choices=("hinge", "logistic"), default="hinge", help="paper Table 16")
    add("--disc-start", type=cli.natural, default=0, help="step from which it trains")
    add("--disc-warmup", type=cli.natural, default=0,
        help="steps it then trains alone, before the autoencoder sees it")
    text = ("total = l1 |x - r| + l2 (x - r)^2 + lpips LPIPS + wavelet Charbonnier(details) + gaussian "
            "L1(high-pass) + kl KL + disc adversarial; every term is a mean, sources in losses.py")
    add = parser.add_argument_group("loss weights", text).add_argument
    add("--l1-weight", type=cli.amount, default=W["l1"], help="mean over elements")
    add("--l2-weight", type=cli.amount, default=W["l2"], help="mean over elements")
    add("--lpips-weight", type=cli.amount, default=W["lpips"], help="mean over images; needs VGG16")
    add("--kl-weight", type=cli.amount, default=W["kl"], help="mean over latent elements")
    add("--wavelet-weight", type=cli.amount, default=W["wavelet"], help="mean over elements")
    add("--gaussian-weight", type=cli.amount, default=W["gaussian"], help="mean over elements")
    add("--disc-weight", type=cli.amount, default=W["disc"], help="mean over logits")
    add("--vgg-file", metavar="FILE", help="VGG16 weights for LPIPS (default: torch hub's cache)")
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log-every", type=cli.positive, default=50, help="steps")
    add("--eval-every", type=cli.positive, default=5000, help="steps; the last step always evaluates")
    add("--save-every", type=cli.positive, default=5000, help="steps; the last step always saves")
    add("--keep", type=cli.natural, default=1, help="older checkpoints to keep beside ckpt.pt")

    options.add_flags(parser)
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{options.run_name(args)}-{args.res}"
    args.lr_scaling = args.lr_scaling or ("fan-in" if args.decoder_norm == "smc" else "none")
    return args


def check_flags(args: argparse.Namespace, config: LiteVAEConfig) -> None:
    """ValueError on flags that are right one by one and wrong together."""
    f = config.downsample_factor
    if args.res % f:
        raise ValueError(f"--res {args.res} is not divisible by the downsample factor {f}: use a multiple")
    if args.res < 16:
        raise ValueError(f"--res {args.res} is below 16, the least that SSIM and LPIPS can judge")
    if not args.l1_weight and not args.l2_weight:
        raise ValueError("nothing to reconstruct by: --l1-weight or --l2-weight must be above 0")
    if args.ema_decay >= 1:
        raise ValueError(f"--ema-decay must be below 1, got {args.ema_decay}")
    if args.freeze_encoder and not (args.init or args.resume):
        raise ValueError("--freeze-encoder would keep a random encoder: give a trained one with --init CKPT")
    options.check(args)
    check_idle_flags(args)
    if args.warmup >= args.steps:
        print0(f"note: --warmup {args.warmup} is not over after --steps {args.steps}, --lr is never reached")


def check_idle_flags(args: argparse.Namespace) -> None:
    """ValueError on flags with no effect; a note on settings of a part that is switched off."""
    defaults = parse_args([])

    def given(name: str) -> bool:
        return getattr(args, name) != getattr(defaults, name)

    for name, reason in options.idle(args).items():
        if given(name):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} has no effect: {reason}")
    off = {
        "--disc none": args.disc == "none" and ("disc_loss", "disc_start", "disc_warmup", "disc_lr",
                                                "disc_weight"),
        "--lpips-weight 0": not args.lpips_weight and ("vgg_file",),
        "--vgg19-weight 0": not args.vgg19_weight and ("vgg19_file",),
        "--identity-weight 0": not args.identity_weight and ("moco_file",),
    }
    for switch, names in off.items():
        for name in filter(given, names or ()):
            print0(f"note: --{name.replace('_', '-')} {getattr(args, name)} has no effect with {switch}")


# ----------------------------------------------------------------------------
# small pure functions


def lr_factor(step: int, warmup: int, schedule: str, steps: int) -> float:
    """The learning rate of a step relative to --lr: linear warm-up, then constant or half a cosine to 0."""
    # differs from the paper: it mentions no warm-up
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def ema_decay(step: int, decay: float) -> float:
    """The EMA decay of a step: small at first, so that the average forgets the random start."""
    # differs from the paper: it mentions no average
    return min(decay, (1 + step) / (10 + step))


def divide_batch(batch: int, processes: int, micro: int) -> tuple[int, int]:
    """(images of a micro-batch, micro-batches of a process); ValueError if they are not whole numbers."""
    share = batch // processes
    if not share or batch % processes:
        below, above = share * processes, (share + 1) * processes
        raise ValueError(f"--batch-size {batch} counts the images of all {processes} processes and cannot be "
                         f"divided among them: use {f'{below} or ' if below else ''}{above}")
    micro = min(micro, share) or share
    if share % micro:
        below, above = (next(n for n in numbers if share % n == 0)
                        for numbers in (range(micro, 0, -1), range(micro, share + 1)))
        raise ValueError(f"--micro-batch {micro} does not divide the {share} images of each process "
                         f"(--batch-size {batch}, {processes} processes): use {below} or {above}")
    return micro, share // micro


def pick_precision(flag: str, device: torch.device, resumed: dict | None = None) -> str:
    """auto is bf16 where that is fast: on CUDA since Ampere; on a CPU, rank 0 times both.

    A run that is resumed from a checkpoint of the same kind of device keeps the precision that it had.
    """
    if flag != "auto":
        return flag
    if resumed and resumed.get("device") == device.type:
        return resumed["precision"]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and distributed.from_main(bf16_pays) else "fp32"


def bf16_pays() -> bool:
    """Whether a wide convolution and its backward pass take less than 0.7 of their fp32 time on this CPU.

    The list of instructions does not tell: of two CPUs with AVX512-BF16 and without AMX, a step of LiteVAE-B
    took 2.7 times its fp32 time on one and 0.58 times on the other.
    """
    seconds, threads = {torch.float32: [], torch.bfloat16: []}, torch.get_num_threads()
    torch.set_num_threads(1)                              # on a busy machine threads wait for each other
    for _ in range(4):                                    # the first of each warms up
        for dtype, times in seconds.items():
            x, weight = torch.ones(1, 128, 32, 32, dtype=dtype), torch.ones(128, 128, 3, 3, dtype=dtype)
            start = time.perf_counter()
            F.conv2d(x.requires_grad_(), weight.requires_grad_(), padding=1).sum().backward()
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) < 0.7 * min(seconds[torch.float32])


# ----------------------------------------------------------------------------
# set-up


def set_fast_math(device: torch.device) -> torch.memory_format:
    """TF32 and cuDNN's autotuner on CUDA; returns the memory format that pays there (channels_last)."""
    if device.type != "cuda":
        return torch.contiguous_format
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True                 # every training batch has the same shape
    return torch.channels_last


def open_data(args: argparse.Namespace, config: LiteVAEConfig) -> tuple[data.TrainSet, data.ValSet]:
    """Training and validation set; ValueError or OSError in one line if there is nothing to train on."""
    spec = args.data or data.default_train_spec()
    source = sources.open_source(spec, cached=args.listing_cache)
    val_spec = args.val_data or data.default_val_spec(spec)
    if val_spec:
        val_source = sources.open_source(val_spec, held_out=True, cached=args.listing_cache)
    else:
        source, val_source = data.split_val(source, args.val_count)
    latent_shape = (config.latent_channels, *[args.res // config.downsample_factor] * 2)
    train_set = data.TrainSet(source, args.res, args.seed, tuple(args.rescale), channels=args.in_channels,
                              latent_shape=latent_shape, oversampling=args.jpeg_oversampling)
    val_set = data.ValSet(val_source, args.res, args.val_count, channels=args.in_channels)
    val_name = val_spec or f"{spec}, held out"
    print0(f"data: {len(source):,} images of {spec}; validation: {len(val_set):,} images of {val_name}")
    return train_set, val_set


def reconstruction_terms(args: argparse.Namespace, dtype: torch.dtype, **place) -> list[tuple]:
    """(name, weight, function of (x, recon)) of every term in use; ValueError if LPIPS has no weights."""
    terms = [
        ("l1", args.l1_weight, losses.l1_loss),
        ("l2", args.l2_weight, losses.l2_loss),
        ("wavelet", args.wavelet_weight, losses.wavelet_loss),
        ("gaussian", args.gaussian_weight, losses.gaussian_loss),
    ]
    if args.lpips_weight:
        load = plan.load_vgg if args.plan else load_vgg
        vgg = distributed.from_main(lambda: load(args.vgg_file))
        terms.append(("lpips", args.lpips_weight, losses.LPIPS(vgg, dtype).to(**place)))
    return [term for term in terms if term[1]]


def freeze_encoder(model: nn.Module) -> None:
    """Only the decoder's side keeps its gradients."""
    model.requires_grad_(False)
    for part in (model.decoder, getattr(model, "post_quant_conv", None)):
        if part is not None:
            part.requires_grad_(True)


# ----------------------------------------------------------------------------
# one step


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def wrap(module: nn.Module) -> nn.Module:
    """DDP around a module, for its backward pass. Saving, EMA and evaluation use the bare module."""
    if distributed.world_size() == 1:
        return module
    return DDP(module, forward_sync_buffers=False, gradient_as_bucket_view=True)


def no_sync(module: nn.Module, last: bool):
    """Context of one micro-batch: DDP averages gradients over processes only in the last one."""
    return module.no_sync() if isinstance(module, DDP) and not last else nullcontext()


def add_means(logged: dict[str, Tensor], parts: dict[str, Tensor], count: int) -> None:
    """Adds the share of one of `count` micro-batches."""
    for name, part in parts.items():
        logged[name] = logged.get(name, 0) + part.detach() / count


def gradient_norm(module: nn.Module, limit: float) -> Tensor:
    """The norm of all gradients together; `limit` clips them to it, 0 leaves them."""
    if limit:
        return nn.utils.clip_grad_norm_(trainable(module), limit)
    return nn.utils.get_total_norm([p.grad for p in trainable(module) if p.grad is not None])


@torch.no_grad()
def update_average(ema: nn.Module, model: nn.Module, share: Tensor) -> None:
    """ema <- ema + share (model - ema); a share of 0 changes nothing."""
    averages = list(ema.parameters())
    change = torch._foreach_sub([p.detach() for p in model.parameters()], averages)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(averages, change)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)                             # a codebook's counts


class Trainer:
    """The networks and optimizers of a run, and its training step.

    `prepare` is called once the weights are loaded. A step never waits for the device: all decisions that
    depend on its numbers are taken on the device, and the numbers are read later (`Numbers`).
    """

    def __init__(
        self, args: argparse.Namespace, config: LiteVAEConfig, device: torch.device,
        resumed: dict | None = None,
    ) -> None:  # fmt: skip
        self.args, self.config, self.device = args, config, device
        self.memory_format = set_fast_math(device)
        self.precision = pick_precision(args.precision, device, resumed)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        self.compiled = device.type == "cuda" if args.compile is None else args.compile
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.terms = reconstruction_terms(args, dtype, device=device, memory_format=self.memory_format)
        self.extra = options.Options(args, device)

        torch.manual_seed(args.seed)
        self.model = build(config).to(device, memory_format=self.memory_format)
        if args.freeze_encoder:
            freeze_encoder(self.model)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if args.ema_decay else None
        self.disc = None
        if args.disc != "none":
            self.disc = build_discriminator(args.disc, args.in_channels, args.res)
            self.disc = self.disc.to(device, memory_format=self.memory_format)
        self.extra.watch(self.model, self.ema, self.disc)
        self.nets = {"model": self.model, "ema": self.ema, "disc": self.disc, "lecam": self.extra.lecam}

        muon = args.optimizer == "muon"
        matrices, others = split_parameters(self.model) if muon else ([], trainable(self.model))
        self.opt = adam(others, args.lr_scaling)
        self.opt_muon = Muon(matrices, args.lr) if matrices else None
        self.opt_disc = adam(trainable(self.disc)) if self.disc else None
        self.optimizers = {"opt": self.opt, "opt_muon": self.opt_muon, "opt_disc": self.opt_disc}

    def prepare(self, rows: list[slice], inherited: bool) -> None:
        """Compile and wrap the networks.

        rows: the rows of the global batch in each micro-batch of this process. inherited: whether the average
        of the weights is that of an earlier phase.
        """
        self.rows, self.inherited = rows, inherited
        if self.args.gradient_checkpointing:
            recompute_blocks(self.model)
        # wrap last and once: model, ema and disc stay bare, so state dicts never have a prefix
        self.ddp_model = wrap(torch.compile(self.model) if self.compiled else self.model)
        fast_disc = torch.compile(self.disc) if self.compiled and self.disc else self.disc
        self.ddp_disc = wrap(fast_disc) if self.disc else None
        # a compiled graph cannot be backpropagated through twice, as the adaptive weight does
        twice = self.args.adaptive_weight
        self.judge = self.disc if twice else fast_disc
        self.compare = torch.compile(self.compare) if self.compiled and not twice else self.compare

    def close(self) -> None:
        """Drop DDP, which holds the process group: `distributed.cleanup` can then end the group's threads."""
        self.ddp_model = self.ddp_disc = None

    def states(self) -> dict:
        """What a checkpoint holds of the networks and optimizers."""
        return states(self.nets | self.optimizers)

    def step(self, step: int, batches: Iterator[tuple[Tensor, Tensor]], stop: bool) -> Numbers:
        """One update of both networks, or of neither if one number on one process is not finite.

        batches: yields (uint8 images, noise) for each micro-batch. stop: whether this process is to stop.
        Returns the means over processes of everything that is logged.
        """
        args, extra = self.args, self.extra
        train_disc = self.disc is not None and step >= args.disc_start
        adversarial = train_disc and step >= args.disc_start + args.disc_warmup
        update_model, train_disc = extra.turns(step, train_disc)
        lr = self.set_rates(step, train_disc)
        extra.begin(step, (args.batch_size, *[args.res // self.config.downsample_factor] * 2))

        logged, pairs = self.model_gradients(step, batches, adversarial, update_model)
        if train_disc:
            logged |= self.disc_gradients(step, pairs)
        logged["stop"] = torch.full((), float(stop), device=self.device)
        values = distributed.mean(torch.stack([value.float() for value in logged.values()]))
        shown = self.update(step, update_model, train_disc, failed=(~values.isfinite().all()).float())
        return Numbers(step + 1, [*logged, *shown], torch.stack([*values, *shown.values()]), lr=lr)

    def set_rates(self, step: int, train_disc: bool) -> float:
        """Sets the learning rates of a step; returns that of the autoencoder."""
        args, since = self.args, self.args.disc_start     # the discriminator's warms up when it starts
        lr = args.lr * lr_factor(step, args.warmup, args.schedule, args.steps)
        for optimizer in filter(None, (self.opt, self.opt_muon)):
            set_rate(optimizer, lr)
        if train_disc:
            factor = lr_factor(step - since, args.warmup, args.schedule, args.steps - since)
            set_rate(self.opt_disc, args.disc_lr * factor)
        return lr

    def model_gradients(
        self, step: int, batches: Iterator[tuple[Tensor, Tensor]], adversarial: bool, update: bool
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:  # fmt: skip
        """Gradients of the autoencoder; returns the means of its losses, and (x, recon) per micro-batch.

        Without `update` there are only the pairs and their mean square error.
        """
        logged, pairs = {}, []
        if self.disc:
            self.disc.requires_grad_(False)               # this half gives the discriminator no gradient
        for rows in self.rows:
            x, noise = (batch.to(self.device, non_blocking=True) for batch in next(batches))
            x = data.to_float(x).contiguous(memory_format=self.memory_format)
            self.extra.micro_batch(step, rows)
            views, target = self.extra.views(rows), self.extra.target(x, rows)
            with no_sync(self.ddp_model, rows is self.rows[-1]), torch.set_grad_enabled(update):
                with self.autocast:
                    recon, posterior, features, *others = self.ddp_model(
                        x, noise, with_features=True, views=views)
                    outputs = target, noise, recon, posterior, features, others
                    parts = self.model_losses(rows, *outputs, adversarial) if update else {}
                if update:
                    (parts["loss"] / len(self.rows)).backward()
            pairs.append((target, recon.detach()))
            parts["mse"] = losses.l2_loss(*pairs[-1])
            add_means(logged, parts, len(self.rows))
        if update:
            logged["grad_norm"] = gradient_norm(self.model, self.args.clip)
        return logged, pairs

    def model_losses(
        self, rows: slice, x: Tensor, noise: Tensor, recon: Tensor, posterior: Posterior, features: Tensor,
        others: list[Tensor], adversarial: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms of one micro-batch by name; "loss" is reconstruction + kl KL + disc adversarial."""
        args, extra = self.args, self.extra
        parts = self.compare(x, recon)
        rec = sum(weight * parts[name] for name, weight, _ in self.terms)
        rec = rec + extra.reconstruction(parts, x, recon, noise)
        rec = rec + extra.scale_equivariance(parts, self.terms, x, others)
        if self.config.codebook_size:
            parts["loss"] = rec + extra.codebook(parts, posterior, rows)
        else:
            parts["kl"] = losses.kl_loss(*posterior)
            parts["loss"] = rec + args.kl_weight * parts["kl"]
        if adversarial:
            parts["adv"] = losses.adv_loss(args.disc_loss, self.judge(recon))
            parts["disc_weight"] = extra.disc_weight(rec, parts["adv"], recon, features)
            parts["loss"] = parts["loss"] + parts["disc_weight"] * parts["adv"]
        return parts

    def compare(self, x: Tensor, recon: Tensor) -> dict[str, Tensor]:
        """The reconstruction terms by name, without their weights."""
        return {name: term(x, recon) for name, _, term in self.terms}

    def disc_gradients(self, step: int, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Gradients of the discriminator on the same images and reconstructions; the means of its losses."""
        logged = {}
        self.disc.requires_grad_(True)
        update_spectral_norm(self.disc)
        for rows, (x, recon) in zip(self.rows, pairs, strict=True):
            with no_sync(self.ddp_disc, rows is self.rows[-1]):
                with self.autocast:
                    # in one dtype, else the discriminator is compiled for each
                    real, fake = self.ddp_disc(x.to(recon.dtype)), self.ddp_disc(recon)
                    parts = {"disc": losses.disc_loss(self.args.disc_loss, real, fake)}
                    outputs = x, recon, real, fake
                    penalties = self.extra.penalties(parts, self.disc, self.ddp_disc, step, rows, *outputs)
                    loss = parts["disc"] + penalties
                (loss / len(self.rows)).backward()
            add_means(logged, parts | losses.disc_health(real[0], fake[0]), len(self.rows))
        logged["disc_grad_norm"] = gradient_norm(self.disc, self.args.clip)
        return logged

    def update(self, step: int, model_moves: bool, disc_moves: bool, failed: Tensor) -> dict[str, Tensor]:
        """Moves what is to move, unless `failed` is 1 (on the device): then all of it keeps its bits.

        The discriminator's buffers have moved by then: spectral norm's u and v, which stay finite, and
        PatchGAN's running statistics, which nothing reads.
        """
        moving = [self.opt, self.opt_muon] if model_moves else []
        for optimizer in filter(None, [*moving, self.opt_disc if disc_moves else None]):
            optimizer.found_inf = failed                  # the name that gradient scalers use
            optimizer.step()
        shown = self.extra.update(model_moves, disc_moves, failed)
        if self.ema and model_moves:
            # a new phase inherits an average; a random start is better forgotten
            decay = self.args.ema_decay if self.inherited else ema_decay(step, self.args.ema_decay)
            update_average(self.ema, self.model, (1 - decay) * (1 - failed))
        for optimizer in filter(None, self.optimizers.values()):
            optimizer.zero_grad(set_to_none=True)
        return shown


# ----------------------------------------------------------------------------
# validation


class Grey(nn.Module):
    """Reconstructs every image as mid-grey: what any autoencoder has to beat."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(x), None


@torch.no_grad()
def validate(nets: dict, val_loader, broken: set, device, autocast) -> dict[str, float]:
    """PSNR and SSIM of raw and EMA weights over the images of all ranks, alike on each."""
    scores = {}
    for suffix, net in (("", nets["model"]), ("_ema", nets["ema"])):
        if net:
            result = metrics.evaluate(net, data.report_broken(val_loader, broken), device, autocast)
            scores[f"val_psnr{suffix}"], scores[f"val_ssim{suffix}"] = result["psnr"], result["ssim"]
    return scores


@torch.no_grad()
def show(step: int, net: nn.Module, val_loader, device, autocast, log: Log) -> Tensor | None:
    """Logs pictures and latents of the first validation images, and returns the images, on rank 0."""
    batch = next(iter(val_loader))[0] if distributed.is_main() else ()
    if len(batch):
        x, training = data.to_float(batch[:8].to(device)), net.training
        net.eval()
        with autocast:
            recon, posterior = net(x)
        net.train(training)
        log.pictures(step, x, recon.float(), posterior.mean)
        return x
    return None


# ----------------------------------------------------------------------------
# the loop


def states(parts: dict) -> dict:
    return {name: part.state_dict() if part else None for name, part in parts.items()}


def finish(progress: Progress, broken: set[str], step: int, out: Path) -> None:
    """The last lines of a run, and its exit code."""
    progress.log.close()
    replaced = set().union(*distributed.gather(broken))
    if replaced:
        print0(f"broken images, named above and replaced: {len(replaced)}")
    ill = progress.skipped >= MAX_SKIPPED
    if ill:
        saved = next(checkpoint.candidates(out), "none, as none was saved yet")
        print0(f"error: {progress.skipped} steps in a row were not finite; lower --lr or set --clip, and go "
               f"on with --resume. Last good checkpoint: {saved}")
    else:
        stopped = f"stopped by a signal after step {step}, saved; go on with --resume:"
        print0(f"{stopped if progress.stopping else 'done:'} {out / 'ckpt.pt'}")
    distributed.cleanup()
    if ill or progress.stopping:
        sys.exit(1 if ill else STOPPED)


@failures()
def main() -> None:
    args = parse_args()
    with cli.user_errors():
        # everything that a user can get wrong fails here, before anything is written
        device = distributed.init(args.device)
        rank, world = distributed.rank(), distributed.world_size()
        config = options.build_config(args)
        check_flags(args, config)
        micro_batch, accumulate = divide_batch(args.batch_size, world, args.micro_batch)
        trainer = Trainer(args, config, device) if args.plan else None
    if args.plan:
        plan.show(trainer, micro_batch, accumulate)
        trainer.close()
        return distributed.cleanup()

    with cli.user_errors():
        out = Path(args.out)
        how, start_path = distributed.from_main(lambda: checkpoint.find_start(args, out))
        train_set, val_set = distributed.from_main(lambda: open_data(args, config))
        state, start = None, 0
        if how:
            state = checkpoint.load(start_path)
            checkpoint.check_config(state, config, start_path)
            print0(f"{how}: {start_path}, step {state['step']}")
        trainer = Trainer(args, config, device, resumed=state if how == "resume" else None)

        # resume or initialise
        if how == "resume":
            checkpoint.resume(state, start_path, args, trainer.nets, trainer.optimizers)
            start = state["step"]
        elif how == "init":
            checkpoint.init(state, start_path, args, trainer.nets)
        lines, validated, best = distributed.from_main(lambda: history(out, start))
        if start > args.steps or start == args.steps and validated:
            print0(f"done: {start_path} has {start} of --steps {args.steps}")
            return distributed.cleanup()
        about = {"config": asdict(config), "args": vars(args),
                 "device": device.type, "precision": trainer.precision}
        source = train_set.source
        about |= distributed.from_main(lambda: checkpoint.provenance(how, state, start_path, source))
        state = None                                      # the networks have copies

        # loaders
        sampler = data.GlobalBatchSampler(micro_batch, accumulate, rank, world, start, args.steps)
        train_loader = data.train_loader(train_set, sampler, args.num_workers, device)
        val_loader = data.val_loader(val_set, micro_batch, args.num_workers, device, rank, world)
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out, lines, start)

    model, ema, disc = trainer.model, trainer.ema, trainer.disc
    print0(f"parameters: encoder {count_parameters(model.encoder):,}, decoder "
           f"{count_parameters(model.decoder):,}, discriminator {count_parameters(disc) if disc else 0:,}")
    print0(f"batch: {args.batch_size} images = {world} processes x {accumulate} x {micro_batch}")
    mode = "compiled" if trainer.compiled else "eager"
    print0(f"device: {device}, {trainer.precision}, {mode}; output: {out}")

    trainer.prepare([sampler.rows(micro) for micro in range(accumulate)], inherited=bool(about["parent"]))
    broken: set[str] = set()                              # files named so far
    batches = Waiting(data.report_broken(train_loader, broken))
    received, overdue, watch, grey = catch_signals(), False, Watch(print0), None
    bar = tqdm(range(start, args.steps + 1), initial=start, total=args.steps, dynamic_ncols=True,
               disable=not distributed.is_main())
    progress = Progress(log, watch, bar, batches)

    for step in bar:                                      # one turn more than updates: save, evaluate, stop
        done, last = step + 1, step == args.steps

        # save; after a skipped step, wait for a finite one
        overdue = step > start and (overdue or last or step % args.save_every == 0)
        if progress.stopping or overdue and (last or not progress.skipped):
            if distributed.is_main():
                state = {"step": step, **about, **trainer.states()}
                checkpoint.save(out, state, args.keep)
                checkpoint.save_weights(out / "model.pt", state)
            overdue = False
        if progress.stopping:
            break

        # evaluate on all ranks; the log line comes last, since a resumed run relies on it
        if step > 0 and (last or step % args.eval_every == 0) and (step > start or not validated):
            scores = validate(trainer.nets, val_loader, broken, device, trainer.autocast)
            x = show(step, ema or model, val_loader, device, trainer.autocast, log)
            if x is not None and disc and step > args.disc_start + args.disc_warmup:
                with trainer.autocast:
                    weight = trainer.extra.would_be_weight(trainer.terms, x[:micro_batch], disc)
                scores["adaptive_weight"] = weight
            if best_by(scores) > best:
                best = best_by(scores)
                if distributed.is_main():
                    state = {"step": step, **about, "val_psnr": best, **states({"model": model, "ema": ema})}
                    checkpoint.save_weights(out / "best.pt", state)
            if grey is None:
                grey = metrics.evaluate(Grey(), data.report_broken(val_loader, broken), device)["psnr"]
            watch.validation(step, scores["val_psnr"], grey)
            log.scalars(step, scores)
            print0(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if last:
            break

        # train; numbers that decide about the next turn are read at once
        numbers = trainer.step(step, batches, stop=bool(received))
        logged = trainer.extra.logged(done) or done == args.steps
        turn = overdue or done % args.save_every == 0 or done % args.eval_every == 0
        progress.add(numbers, logged, now=logged or turn)
        if progress.skipped >= MAX_SKIPPED:
            break

    trainer.close()
    finish(progress, broken, step, out)


if __name__ == "__main__":
    main()
