"""Train a LiteVAE, or a system from variants/: flags, set-up, and one loop.

    torchrun --nproc_per_node=8 train.py --scale B --res 128      # ImageNet on 8 GPUs, the paper's recipe
    python train.py @recipes/demo.args                            # minutes on a CPU, generated images

Each step updates both networks: the autoencoder on reconstruction, KL and adversarial terms with constant
weights (paper Sec. 4.3), the discriminator on the same images and reconstructions. --batch-size counts the
images of all processes, so the run does not depend on the number of GPUs. All randomness derives from (seed,
step, sample), so resuming needs only the step and is exact to the bit.

Exit codes: 0 done; 1 the run failed; 2 the set-up was rejected; 75 stopped by SIGTERM, SIGINT or SIGUSR1
after the current step, and saved (--resume continues). A second SIGINT ends the run at once.
"""

import argparse
import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import checkpoint
import data
import losses
from discriminators import update_spectral_norm
from evaluation import metrics
from losses import DEFAULT_WEIGHTS as W
from model import SCALES, LiteVAEConfig, count_parameters
from optimizers import Muon, adam, set_rate, split_parameters
from runtime import cli, distributed, sources
from runtime.distributed import print0
from runtime.failures import STOPPED, catch_signals, failures
from runtime.log import Log, best_by, history
from runtime.randomness import NOISE, seeded
from runtime.watch import Watch
from runtime.weights import load_vgg
from variants import options
from variants.build import DISCRIMINATORS, build, build_discriminator
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
    add("--seed", type=cli.natural, default=0, help="of weights, data order, crops and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="bf16 autocast or fp32 (on CUDA fp32 means TF32); auto: bf16 on CUDA and CPUs with AMX")
    add("--compile", action=switch, help="torch.compile (default: on CUDA only)")

    text = "sources are folders, .tar, .zip, globs, {0000..0252} ranges, joined by commas, or 'synthetic'"
    add = parser.add_argument_group("data", text).add_argument
    add("--data", metavar="SRC", help="training images (default: $IMAGENET/train or datasets/imagenet/train)")
    add("--val-data", metavar="SRC",
        help="validation images (default: the val folder next to train/, else images held out of training)")
    add("--val-count", type=cli.positive, default=256, help="images to validate on")
    add("--res", type=cli.positive, default=128, help="side of the square training crops, pixels")
    add("--rescale", type=float, nargs=2, default=(1.0, 1.0), metavar=("LO", "HI"),
        help="short side uniform in [LO res, HI res] before the crop; open-LiteVAE: 1 2")
    add("--num-workers", type=cli.natural, default=4, help="loader processes of each training process")

    add = parser.add_argument_group("model").add_argument
    add("--scale", choices=tuple(SCALES), default="B", help="of encoders with wavelets, paper Table 2")
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
    add("--optimizer", choices=("adam", "muon"), default="adam",
        help="of the autoencoder; muon: for inner convolutions and linear layers, Adam for the rest")
    add("--lr", type=cli.amount, default=1e-4, help="Adam with betas (0.5, 0.9), and Muon")
    add("--lr-scaling", choices=("fan-in", "none"),
        help="Adam's rate of the autoencoder: --lr x min(1, 72 / inputs per output), or --lr for all "
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
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def ema_decay(step: int, decay: float) -> float:
    """The EMA decay of a step: small at first, so that the average forgets the random start."""
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


def pick_precision(flag: str, device: torch.device) -> str:
    """auto is bf16 where that is fast: on CUDA since Ampere, on CPUs with AMX."""
    if flag != "auto":
        return flag
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # AVX512-BF16 without AMX: a step of LiteVAE-B takes 2.7 times as long in bf16 as in fp32
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("amx_bf16") else "fp32"


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


def open_data(args: argparse.Namespace) -> tuple[data.TrainSet, data.ValSet]:
    """Training and validation set; ValueError or OSError in one line if there is nothing to train on."""
    spec = args.data or data.default_train_spec()
    source = sources.open_source(spec)
    val_spec = args.val_data or data.default_val_spec(spec)
    if val_spec:
        val_source = sources.open_source(val_spec, held_out=True)
    else:
        source, val_source = data.split_val(source, args.val_count)
    train_set = data.TrainSet(source, args.res, args.seed, tuple(args.rescale), channels=args.in_channels)
    val_set = data.ValSet(val_source, args.res, args.val_count, channels=args.in_channels)
    val_name = val_spec or f"{spec}, held out"
    print0(f"data: {len(source):,} images of {spec}; validation: {len(val_set):,} images of {val_name}")
    return train_set, val_set


def reconstruction_terms(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """(name, weight, function of (x, recon)) of every term in use; ValueError if LPIPS has no weights."""
    terms = [
        ("l1", args.l1_weight, losses.l1_loss),
        ("l2", args.l2_weight, losses.l2_loss),
        ("wavelet", args.wavelet_weight, losses.wavelet_loss),
        ("gaussian", args.gaussian_weight, losses.gaussian_loss),
    ]
    if args.lpips_weight:
        vgg = distributed.from_main(lambda: load_vgg(args.vgg_file))
        terms.append(("lpips", args.lpips_weight, losses.LPIPS(vgg).to(device)))
    return [term for term in terms if term[1]]


def find_start(args: argparse.Namespace, out: Path) -> tuple[str, Path | None]:
    """What to start from: ("resume" or "init", checkpoint) or ("", None); ValueError if --out is taken."""
    taken = next(checkpoint.candidates(out), None)
    if args.resume and args.resume != "latest":
        path = Path(args.resume)
        if taken and path.resolve().parent != out.resolve():
            raise ValueError(f"{out} already holds another run than {path}: choose another --out")
        return "resume", path
    if args.resume and taken:
        path, damaged = checkpoint.newest(out)
        for line in damaged:
            print0(f"note: {line}")
        return "resume", path
    if taken:
        raise ValueError(f"{out} already holds a run: go on with --resume, or choose another --out")
    if args.resume:
        print0(f"resume: nothing saved in {out} yet, starting at step 0")
    return ("init", Path(args.init)) if args.init else ("", None)


BEFORE = {"optimizer": "adam", "lr_scaling": "none"}      # checkpoints from before these flags


def resume(state: dict, path: Path, args: argparse.Namespace, nets: dict, optimizers: dict) -> None:
    """Fill everything from a checkpoint of the same run; flags that do not change the networks may differ."""
    for name in ("disc", "freeze_encoder", "optimizer", "lr_scaling"):
        saved, wanted = (BEFORE | state["args"])[name], getattr(args, name)
        if saved != wanted:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{path} was trained with {name}={saved}, the flags ask for {wanted}: "
                             f"set {flag} as it was, or start a new phase with --init")
    if "opt" not in state:
        raise ValueError(f"{path} has weights alone: start a new phase from it with --init")
    check_batch(state["args"], path, args)
    for name, now in vars(args).items():
        before = state["args"].get(name)
        if before != now and name not in ("resume", "init"):
            print0(f"resume: --{name.replace('_', '-')} was {before} and is now {now}")
    for name, net in nets.items():
        # a run may gain an EMA, which then starts from the weights, or LeCam
        weights = state[name] or (state["model"] if name == "ema" else None)
        if net and weights:
            checkpoint.load_weights(net, weights, path)
    for name, optimizer in optimizers.items():
        if optimizer:
            optimizer.load_state_dict(state[name])
            for p, slot in optimizer.state.items():       # fused Adam wants the strides of the parameter
                slot |= {key: torch.empty_like(p).copy_(t) for key, t in slot.items() if t.shape == p.shape}


def check_batch(saved: dict, path: Path, args: argparse.Namespace) -> None:
    """ValueError if a resumed run would go on with another global batch, unless --allow-batch-change."""
    if args.allow_batch_change:
        return
    if "accumulate" in saved:                             # from before --batch-size meant all processes
        raise ValueError(f"{path} was trained with {saved['batch_size']} x {saved['accumulate']} images in "
                         "each process: set --batch-size to that times its processes, with "
                         "--allow-batch-change")
    if saved["batch_size"] != args.batch_size:
        raise ValueError(f"{path} was trained with --batch-size {saved['batch_size']}, not "
                         f"{args.batch_size}: set it as it was, or give --allow-batch-change")


def init(state: dict, path: Path, args: argparse.Namespace, nets: dict) -> None:
    """Fill the networks from a checkpoint of an earlier phase, or from a file of averaged weights alone.

    With a frozen encoder both go on from the average, so that the latents stay those of the parent.
    """
    average = state.get("ema") or state["model"]
    weights = {"model": average if args.freeze_encoder else state.get("model") or average, "ema": average}
    for name in weights:
        if nets[name]:
            checkpoint.load_weights(nets[name], weights[name], path)
    if nets["disc"] and state.get("disc") and state["args"]["disc"] == args.disc:
        checkpoint.load_weights(nets["disc"], state["disc"], path)
        if nets["lecam"] and state["lecam"]:
            checkpoint.load_weights(nets["lecam"], state["lecam"], path)
    elif nets["disc"]:
        print0(f"init: the discriminator {args.disc} starts afresh, {path} has none of its kind")


def provenance(how: str, state: dict | None, path: Path | None, train_set: data.TrainSet) -> dict:
    """Where a checkpoint comes from: code, data, and the phase before it, with its own provenance."""
    parent = state.get("parent") if state else None
    if how == "init":
        about = {name: state.get(name) for name in ("step", "args", "versions", "git", "data", "parent")}
        parent = {"path": str(path), **about}
    versions = {"torch": str(torch.__version__), "numpy": np.__version__}
    return {"versions": versions, "git": checkpoint.git_hash(), "data": sources.summary(train_set.source),
            "parent": parent}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def wrap(module: nn.Module) -> nn.Module:
    """DDP around a module, for its backward pass. Saving, EMA and evaluation use the bare module."""
    return DDP(module, forward_sync_buffers=False) if distributed.world_size() > 1 else module


def no_sync(module: nn.Module, last: bool):
    """Context of one micro-batch: DDP averages gradients over processes only in the last one."""
    return module.no_sync() if isinstance(module, DDP) and not last else nullcontext()


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


def freeze_encoder(model: nn.Module) -> None:
    """Only the decoder's side keeps its gradients."""
    model.requires_grad_(False)
    for part in (model.decoder, getattr(model, "post_quant_conv", None)):
        if part is not None:
            part.requires_grad_(True)


def states(parts: dict) -> dict:
    return {name: part.state_dict() if part else None for name, part in parts.items()}


def add_means(logged: dict[str, Tensor], parts: dict[str, Tensor], count: int) -> None:
    """Adds the share of one of `count` micro-batches."""
    for name, part in parts.items():
        logged[name] = logged.get(name, 0) + part.detach() / count


def update_average(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)                             # a codebook's counts


def finish(log: Log, broken: set[str], skipped: int, stopping: bool, step: int, out: Path) -> None:
    """The last lines of a run, and its exit code."""
    log.close()
    replaced = set().union(*distributed.gather(broken))
    if replaced:
        print0(f"broken images, named above and replaced: {len(replaced)}")
    ill = skipped == MAX_SKIPPED
    if not ill:
        end = f"stopped by a signal after step {step}, saved; go on with --resume:" if stopping else "done:"
        print0(f"{end} {out / 'ckpt.pt'}")
    distributed.cleanup()
    if ill or stopping:
        sys.exit(1 if ill else STOPPED)


# ----------------------------------------------------------------------------
# the loop


@failures()
def main() -> None:
    args = parse_args()
    with cli.user_errors():
        # device and precision
        device = distributed.init(args.device)
        world = distributed.world_size()
        precision = pick_precision(args.precision, device)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        compiled = device.type == "cuda" if args.compile is None else args.compile
        memory_format = set_fast_math(device)

        # everything that a user can get wrong fails here, before anything is written
        config = options.build_config(args)
        check_flags(args, config)
        micro_batch, accumulate = divide_batch(args.batch_size, world, args.micro_batch)
        out = Path(args.out)
        how, start_path = distributed.from_main(lambda: find_start(args, out))
        train_set, val_set = distributed.from_main(lambda: open_data(args))
        terms = reconstruction_terms(args, device)
        extra = options.Options(args, device)

        # networks and optimizers
        torch.manual_seed(args.seed)
        model = build(config).to(device, memory_format=memory_format)
        if args.freeze_encoder:
            freeze_encoder(model)
        ema = copy.deepcopy(model).requires_grad_(False).eval() if args.ema_decay else None
        disc = None
        if args.disc != "none":
            disc = build_discriminator(args.disc, args.in_channels, args.res)
            disc = disc.to(device, memory_format=memory_format)
        extra.watch(model, ema, disc)
        matrices, others = split_parameters(model) if args.optimizer == "muon" else ([], trainable(model))
        opt = adam(others, args.lr_scaling)
        opt_muon = Muon(matrices, args.lr) if matrices else None
        opt_disc = adam(trainable(disc)) if disc else None
        nets = {"model": model, "ema": ema, "disc": disc, "lecam": extra.lecam}
        optimizers = {"opt": opt, "opt_muon": opt_muon, "opt_disc": opt_disc}

        # resume or initialise
        state, start = None, 0
        if how:
            state = checkpoint.load(start_path)
            checkpoint.check_config(state, config, start_path)
            print0(f"{how}: {start_path}, step {state['step']}")
        if how == "resume":
            resume(state, start_path, args, nets, optimizers)
            start = state["step"]
        elif how == "init":
            init(state, start_path, args, nets)
        lines, validated, best = distributed.from_main(lambda: history(out, start))
        if start > args.steps or start == args.steps and validated:
            print0(f"done: {start_path} has {start} of --steps {args.steps}")
            return distributed.cleanup()
        about = {"config": asdict(config), "args": vars(args)}
        about |= distributed.from_main(lambda: provenance(how, state, start_path, train_set))
        state = None                                      # the networks have copies

        # loaders
        batches = data.GlobalBatchSampler(
            micro_batch, accumulate, distributed.rank(), world, start, args.steps
        )
        train_loader = data.train_loader(train_set, batches, args.num_workers, device)
        val_loader = data.val_loader(
            val_set, micro_batch, args.num_workers, device, distributed.rank(), world
        )
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out, lines, start)

    print0(f"parameters: encoder {count_parameters(model.encoder):,}, decoder "
           f"{count_parameters(model.decoder):,}, discriminator {count_parameters(disc) if disc else 0:,}")
    print0(f"batch: {args.batch_size} images = {world} processes x {accumulate} x {micro_batch}")
    print0(f"device: {device}, {precision}, {'compiled' if compiled else 'eager'}; output: {out}")

    # wrap last and once: model, ema and disc stay bare, so state dicts never have a prefix
    ddp_model = wrap(torch.compile(model) if compiled else model)
    fast_disc = torch.compile(disc) if compiled and disc else disc
    ddp_disc = wrap(fast_disc) if disc else None
    # a compiled network cannot be backpropagated through twice, as the adaptive weight does
    judge = disc if args.adaptive_weight else fast_disc
    latent_shape = (config.latent_channels, *[args.res // config.downsample_factor] * 2)
    broken: set[str] = set()                              # files named so far
    train_batches = data.report_broken(train_loader, broken)
    skipped, stopping, overdue, received = 0, False, False, catch_signals()
    watch, grey = Watch(print0), None
    bar = tqdm(range(start, args.steps + 1), initial=start, total=args.steps, dynamic_ncols=True,
               disable=not distributed.is_main())

    for step in bar:                                      # one turn more than updates: save, evaluate, stop
        done, last = step + 1, step == args.steps

        # save; after a skipped step, wait for a finite one
        overdue = step > start and (overdue or last or step % args.save_every == 0)
        if stopping or overdue and (last or not skipped):
            if distributed.is_main():
                state = {"step": step, **about, **states({**nets, **optimizers})}
                checkpoint.save(out, state, args.keep)
                checkpoint.save_weights(out / "model.pt", state)
            overdue = False
        if stopping:
            break

        # evaluate on all ranks; the log line comes last, since a resumed run relies on it
        if step > 0 and (last or step % args.eval_every == 0) and (step > start or not validated):
            scores = validate(nets, val_loader, broken, device, autocast)
            x = show(step, ema or model, val_loader, device, autocast, log)
            if x is not None and disc and step > args.disc_start + args.disc_warmup:
                with autocast:
                    scores["adaptive_weight"] = extra.would_be_weight(terms, x[:micro_batch], disc)
            if best_by(scores) > best:
                best = best_by(scores)
                if distributed.is_main():
                    state = {"step": step, **about, "val_psnr": best, **states({"model": model, "ema": ema})}
                    checkpoint.save_weights(out / "best.pt", state)
            if grey is None:
                shown = data.report_broken(val_loader, broken)
                grey = metrics.evaluate(Grey(), shown, device)["psnr"]
            watch.validation(step, scores["val_psnr"], grey)
            log.scalars(step, scores)
            print0(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if last:
            break

        # whose turn it is, learning rates, noise
        train_disc = disc is not None and step >= args.disc_start
        adversarial = train_disc and step >= args.disc_start + args.disc_warmup
        update_model, train_disc = extra.turns(step, train_disc)
        factor = lr_factor(step, args.warmup, args.schedule, args.steps)
        for optimizer in filter(None, (opt, opt_muon)):
            set_rate(optimizer, args.lr * factor)
        noise = torch.randn(args.batch_size, *latent_shape, generator=seeded(args.seed, step, NOISE))
        extra.begin(step, noise)
        logged: dict[str, Tensor] = {}                    # means over micro-batches, on the device
        pairs = []                                        # (x, recon) per micro-batch, for the discriminator

        # 1. gradients of the autoencoder: reconstruction + kl KL + disc adversarial
        if disc:
            disc.requires_grad_(False)                    # this half gives the discriminator no gradient
        for micro in range(accumulate):
            rows = batches.rows(micro)
            x = data.to_float(next(train_batches).to(device, non_blocking=True))
            x = x.contiguous(memory_format=memory_format)
            z_noise = noise[rows].to(device)
            extra.micro_batch(step, rows)
            with no_sync(ddp_model, micro == accumulate - 1), torch.set_grad_enabled(update_model):
                with autocast:
                    recon, posterior, features = ddp_model(x, z_noise, with_features=True)
                    parts = {name: term(x, recon) for name, _, term in terms}
                    rec = sum(weight * parts[name] for name, weight, _ in terms)
                    rec = rec + extra.reconstruction(parts, x, recon, z_noise)
                    if config.codebook_size:
                        parts["loss"] = rec + extra.codebook(parts, posterior, rows)
                    else:
                        parts["kl"] = losses.kl_loss(*posterior)
                        parts["loss"] = rec + args.kl_weight * parts["kl"]
                    if adversarial and update_model:
                        parts["adv"] = losses.adv_loss(args.disc_loss, judge(recon))
                        parts["disc_weight"] = extra.disc_weight(rec, parts["adv"], recon, features)
                        parts["loss"] = parts["loss"] + parts["disc_weight"] * parts["adv"]
                if update_model:
                    (parts["loss"] / accumulate).backward()
            pairs.append((x, recon.detach()))
            parts["mse"] = losses.l2_loss(*pairs[-1])
            add_means(logged, parts, accumulate)
        if update_model:
            logged["grad_norm"] = nn.utils.clip_grad_norm_(trainable(model), args.clip or math.inf)

        # 2. gradients of the discriminator: its loss on the same x and recon
        if train_disc:
            since = args.disc_start                       # its learning rate warms up from here
            disc_factor = lr_factor(step - since, args.warmup, args.schedule, args.steps - since)
            set_rate(opt_disc, args.disc_lr * disc_factor)
            disc.requires_grad_(True)
            update_spectral_norm(disc)
            for micro, (x, recon) in enumerate(pairs):
                with no_sync(ddp_disc, micro == accumulate - 1):
                    with autocast:
                        real, fake = ddp_disc(x), ddp_disc(recon)
                        parts = {"disc": losses.disc_loss(args.disc_loss, real, fake)}
                        rows = batches.rows(micro)
                        penalties = extra.penalties(parts, disc, ddp_disc, step, rows, x, recon, real, fake)
                        loss = parts["disc"] + penalties
                    (loss / accumulate).backward()
                add_means(logged, parts | losses.disc_health(real[0], fake[0]), accumulate)
            logged["disc_grad_norm"] = nn.utils.clip_grad_norm_(trainable(disc), args.clip or math.inf)

        # 3. update both networks or neither: if one number on one rank is not finite, no rank moves
        logged["signal"] = torch.tensor(float(bool(received)), device=device)
        means = distributed.mean(torch.stack([value.float() for value in logged.values()])).tolist()
        values = dict(zip(logged, means, strict=True))
        stopping = values.pop("signal") > 0               # a signal on one rank stops all after this step
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        skipped = skipped + 1 if bad else 0
        if not bad:
            for optimizer in (opt, opt_muon) if update_model else ():
                if optimizer:
                    optimizer.step()
            if train_disc:
                opt_disc.step()
            values |= extra.update(update_model, train_disc)
            if ema and update_model:
                # a new phase inherits an average; a random start is better forgotten
                decay = args.ema_decay if about["parent"] else ema_decay(step, args.ema_decay)
                update_average(ema, model, decay, step)
        for optimizer in filter(None, optimizers.values()):
            optimizer.zero_grad(set_to_none=True)

        # log
        if bad:
            log.line(done, {"skipped": bad})
            print0(f"step {done} skipped, not finite: {', '.join(bad)}")
        elif extra.logged(done) or done == args.steps:
            values["batch_psnr"] = 10 * math.log10(4 / max(values.pop("mse"), 1e-10))
            log.scalars(done, {**values, "lr": args.lr * factor})
            bar.set_postfix(loss=f"{values['loss']:.4f}", psnr=f"{values['batch_psnr']:.2f}")
        if update_model and not bad:
            watch.gradient(done, values["grad_norm"])
        if skipped == MAX_SKIPPED:
            saved = next(checkpoint.candidates(out), "none, as none was saved yet")
            print0(f"error: {skipped} steps in a row were not finite; lower --lr or set --clip, and go on "
                   f"with --resume. Last good checkpoint: {saved}")
            break

    finish(log, broken, skipped, stopping, step, out)


if __name__ == "__main__":
    main()
