"""The flags of this folder, and what they add to a training step.

train.py adds the flags to its parser, makes one `Options` in its set-up, and calls its methods where a step
may differ from LiteVAE's. Without any of these flags the methods add nothing.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from losses import adv_loss
from model import scale_fields
from runtime import cli, distributed
from runtime.distributed import print0
from runtime.randomness import CUTMIX, DROPOUT, EQUIVARIANCE, REVIVAL, seeded, seeded_numpy
from variants import equivariance, perceptual, regularisers
from variants.adaptive import adaptive_weight, last_layer_gradient
from variants.config import AutoencoderConfig
from variants.quantize import Quantized, revival_slots, vq_loss

ONE_SIZE = ("sd", "dwt", "dwt2")       # encoders without scales

# ----------------------------------------------------------------------------
# flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags whose names are fields of AutoencoderConfig become those fields; see `build_config`."""
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("other architectures (variants/)").add_argument
    add("--encoder", choices=("litevae", "sd", "open-litevae", "dwt", "dwt2"), default="litevae",
        help="LiteVAE's, SD-VAE's, open-LiteVAE's, or the wavelet bands themselves (paper App. B)")
    add("--sd-channels", type=cli.positive, default=128, help="base width of SD-VAE's encoder")
    add("--decoder", choices=("sd", "open-litevae"), default="sd",
        help="layout: SD-VAE's (its norm is --decoder-norm), or open-LiteVAE's")
    add("--extractor-blocks", type=cli.positive, default=2, help="per width; open-LiteVAE: 3, 4, 5, 5")
    add("--aggregator-blocks", type=cli.positive, default=2, help="per width; open-LiteVAE: 3, 4, 4, 4")
    add("--extractor", choices=("unet", "nafnet"), default="unet", help="paper D.3")
    add("--shared-extractor", action=switch, default=False, help="one for all levels, paper D.4")
    add("--first-level", type=cli.positive, default=1, help="leave finer levels out; paper D.6: 2")
    add("--downsample", choices=("pool", "conv"), default="pool", help="of the extractors' outputs")
    add("--aggregator", choices=("unet", "vit"), default="unet", help="vit: bound to --res, paper D.5")
    add("--dropout", type=cli.amount, default=0.0, help="in extractors and aggregator")
    add("--conv1x1", action=switch, default=False, help="1x1 convs around the latent, paper Table 17")
    add("--codebook-size", type=cli.natural, default=0, help="entries of VQ-GAN's codebook, 0: Gaussian")
    add("--codebook-update", choices=("gradient", "ema"), default="gradient", help="how it learns")
    add("--initialisation", choices=("isometry", "torch"), default="isometry", help="ours, or torch's own")

    add = parser.add_argument_group("other adversarial training (variants/)").add_argument
    add("--adaptive-weight", action=switch, default=False,
        help="scale --disc-weight by the ratio of last-layer gradients (LDM; paper Table 8)")
    add("--alternate", action=switch, default=False,
        help="once the discriminator trains: even steps update the autoencoder, odd ones the discriminator")
    add("--r1", type=cli.amount, default=0.0, metavar="GAMMA", help="gradient penalty, 0 = off")
    add("--r1-every", type=cli.positive, default=16, help="updates from one penalty to the next")
    add("--lecam", type=cli.amount, default=0.0, metavar="WEIGHT", help="LeCam regulariser, 0 = off")
    add("--cutmix", type=cli.amount, default=0.0, metavar="WEIGHT",
        help="CutMix consistency of a U-Net's pixel logits, mean over pixels, 0 = off")

    add = parser.add_argument_group("equivariance of the latent space (variants/)").add_argument
    add("--se-weight", type=cli.amount, default=0.0,
        help="scale equivariance: reconstruction terms of latents and images downsampled by 2 or 4")
    add("--eq-vae", action=switch, default=False,
        help="EQ-VAE: turn and scale latents before they are decoded, and the images to compare with")
    add("--eq-identity", type=cli.amount, default=0.5, metavar="P",
        help="probability of a step of --eq-vae without turn and scale")

    add = parser.add_argument_group("other losses (variants/)").add_argument
    add("--vq-weight", type=cli.amount, default=1.0, help="codebook and commitment, means over elements")
    add("--vgg19-weight", type=cli.amount, default=0.0, help="mean over features, paper Table 14")
    add("--ldl-weight", type=cli.amount, default=0.0, help="mean over elements, paper Table 15; needs EMA")
    add("--identity-weight", type=cli.amount, default=0.0,
        help="mean over MoCo v2's embedding, Transfusion; needs --moco-file")
    add("--vgg19-file", metavar="FILE", help="VGG19 weights (default: torch hub's cache)")
    add("--moco-file", metavar="FILE", help="MoCo v2 ResNet-50, 800 epochs (default: none)")


def run_name(args: argparse.Namespace) -> str:
    """What --out is called after: litevae-b, sd, open-litevae-b, ..."""
    return args.encoder if args.encoder in ONE_SIZE else f"{args.encoder}-{args.scale.lower()}"


def build_config(args: argparse.Namespace) -> AutoencoderConfig:
    """The architecture that the flags ask for; ValueError on flags that do not go together."""
    given = {field.name: getattr(args, field.name)
             for field in fields(AutoencoderConfig) if hasattr(args, field.name)}
    resolution = args.res if args.aggregator == "vit" else 0
    return AutoencoderConfig(**scale_fields(args.scale), **given, resolution=resolution)


def check(args: argparse.Namespace) -> None:
    """ValueError on flags that are right one by one and wrong together."""
    if args.cutmix and not args.disc.startswith("unet"):
        raise ValueError(f"--cutmix needs pixel logits, got --disc {args.disc}: use unet-s, unet-m or unet-l")
    for name in ("adaptive_weight", "alternate", "r1", "lecam"):
        if getattr(args, name) and args.disc == "none":
            raise ValueError(f"--{name.replace('_', '-')} needs a discriminator, got --disc none")
    if args.ldl_weight and not args.ema_decay:
        raise ValueError("--ldl-weight compares with the averaged weights: --ema-decay must be above 0")
    if args.se_weight or args.eq_vae:
        check_equivariance(args)


def check_equivariance(args: argparse.Namespace) -> None:
    """Those of a latent space that is to be equivariant; `Options.watch` checks the sizes of --eq-vae."""
    flag = "--eq-vae" if args.eq_vae else "--se-weight"
    if args.se_weight and args.eq_vae:
        raise ValueError("--se-weight and --eq-vae both regularise the latent space: give one of them")
    if args.codebook_size:
        raise ValueError(f"{flag} needs a Gaussian posterior, got --codebook-size {args.codebook_size}")
    if args.eq_vae and args.ldl_weight:
        raise ValueError("--ldl-weight compares with untransformed images, so it cannot go with --eq-vae")
    if args.eq_identity >= 1:
        raise ValueError(f"--eq-identity must be below 1, got {args.eq_identity}: --eq-vae would do nothing")
    if args.se_weight:
        equivariance.check_resolution(args.res, 2**args.levels)


def idle(args: argparse.Namespace) -> dict[str, str]:
    """Flags that nothing would read if they were given, and why."""
    found = {
        "scale": args.encoder in ONE_SIZE and f"--encoder {args.encoder} has one size",
        "sd_channels": args.encoder != "sd" and f"the width is that of --encoder sd, got {args.encoder}",
        "kl_weight": args.codebook_size and "a codebook has no KL, its weight is --vq-weight",
        "vq_weight": not args.codebook_size and "there is no codebook, set --codebook-size",
        "r1_every": not args.r1 and "there is no penalty, set --r1",
        "eq_identity": not args.eq_vae and "there are no transforms, set --eq-vae",
    }
    return {name: reason for name, reason in found.items() if reason}


# ----------------------------------------------------------------------------
# what the flags add to a step


class Options:
    """Everything that the flags of this folder do in a training step.

    Tensors of a micro-batch belong to the rows of the global batch that `rows` names. Losses go into `parts`,
    by the name under which they are logged.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.terms = reconstruction_terms(args, device)
        self.weight = torch.tensor(args.disc_weight, device=device)
        self.lecam: regularisers.LeCam | None = None
        self.slots = self.table = self.boxes = self.factor = self.tau = None
        self.lecam_means: list[Tensor] = []

    def watch(self, model: nn.Module, ema: nn.Module | None, disc: nn.Module | None) -> None:
        """The networks, once they are made; ValueError if --eq-vae has no size that `disc` takes."""
        self.model, self.ema = model, ema
        if self.args.eq_vae:
            limits = (disc.stride, disc.min_size) if disc else ()
            self.sides = equivariance.sides(self.args.res, model.config.downsample_factor, *limits)
        if disc and self.args.lecam:
            self.lecam = regularisers.LeCam(disc.heads).to(self.device)

    # ---- whose turn it is

    def turns(self, step: int, train_disc: bool) -> tuple[bool, bool]:
        """(update the autoencoder, update the discriminator) in this step."""
        if not (self.args.alternate and train_disc):
            return True, train_disc
        return step % 2 == 0, step % 2 == 1

    def logged(self, done: int) -> bool:
        """Whether to log a step: alternating, one of each kind."""
        return done % self.args.log_every in (0, int(self.args.alternate))

    # ---- the autoencoder

    def begin(self, step: int, positions: tuple[int, int, int]) -> None:
        """Draws what a step needs, for a global batch of latents at positions (B, h, w)."""
        args = self.args
        if args.codebook_size:
            generator = seeded(args.seed, step, REVIVAL)
            slots = revival_slots(math.prod(positions), args.codebook_size, generator)
            self.slots, self.table = self.send(slots.view(positions)), 0
        if args.cutmix:
            boxes = torch.rand(positions[0], 4, generator=seeded(args.seed, step, CUTMIX))
            self.boxes = self.send(boxes)
        if args.se_weight:
            self.factor = equivariance.draw_factor(seeded_numpy(args.seed, step, EQUIVARIANCE))
        if args.eq_vae:
            self.tau = self.draw_tau(step, positions[0])
        self.lecam_means = []

    def draw_tau(self, step: int, batch: int) -> equivariance.Tau | None:
        """EQ-VAE's transform of a global batch; None is the identity."""
        key = self.args.seed, step, EQUIVARIANCE
        side = equivariance.draw_side(seeded_numpy(*key), self.args.eq_identity, self.sides)
        if side is None:
            return None
        quarters = self.send(equivariance.draw_quarters(seeded(*key), batch))
        return equivariance.Tau(side, quarters, self.model.config.downsample_factor)

    def send(self, drawn: Tensor) -> Tensor:
        """To the device, without waiting for it."""
        pinned = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return pinned.to(self.device, non_blocking=True)

    def micro_batch(self, step: int, rows: slice) -> None:
        """Seeds dropout, the one layer that draws by itself."""
        if self.args.dropout:
            torch.manual_seed(seeded(self.args.seed, step, DROPOUT + rows.start).initial_seed())

    def views(self, rows: slice) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """What the model is to decode instead of z: a function of z, or None."""
        if self.args.se_weight:
            return equivariance.Shrunk(self.factor)
        return self.tau and replace(self.tau, quarters=self.tau.quarters[rows])

    def target(self, x: Tensor, rows: slice) -> Tensor:
        """The images that the reconstructions are compared with."""
        return self.views(rows).image(x) if self.tau else x

    def reconstruction(self, parts: dict, x: Tensor, recon: Tensor, noise: Tensor | None) -> Tensor | int:
        """Weighted sum of the extra reconstruction terms."""
        total = 0
        for name, weight, term in self.terms:
            parts[name] = term(x, recon)
            total = total + weight * parts[name]
        if self.args.ldl_weight:
            with torch.no_grad():
                recon_ema, _ = self.ema(x, noise)
            parts["ldl"] = perceptual.ldl_loss(x, recon, recon_ema)
            total = total + self.args.ldl_weight * parts["ldl"]
        return total

    def scale_equivariance(
        self, parts: dict, terms: list[tuple], x: Tensor, others: list[Tensor]
    ) -> Tensor | int:  # fmt: skip
        """Weighted distance, in the given terms, of the downsampled latent's image to the downsampled x."""
        if not self.args.se_weight:
            return 0
        target = equivariance.shrink(x, self.factor)
        parts["se"] = sum(weight * term(target, others[0]) for _, weight, term in terms)
        return self.args.se_weight * parts["se"]

    def codebook(self, parts: dict, posterior: Quantized, rows: slice) -> Tensor:
        """Weighted loss of the codebook, which stands in for the KL."""
        parts["vq"] = vq_loss(posterior)
        self.table = self.table + self.model.quantizer.statistics(posterior, self.slots[rows])
        return self.args.vq_weight * parts["vq"]

    def disc_weight(self, rec: Tensor, adv: Tensor, recon: Tensor, features: Tensor) -> Tensor:
        """--disc-weight; with --adaptive-weight times the ratio of last-layer gradients."""
        if not self.args.adaptive_weight:
            return self.weight
        gradients = [last_layer_gradient(part, recon, features, self.model.decoder) for part in (rec, adv)]
        return self.weight * adaptive_weight(*map(distributed.mean, gradients))

    def would_be_weight(self, terms: list[tuple], x: Tensor, disc: nn.Module) -> float:
        """What --adaptive-weight would make of --disc-weight on images x, for the log (paper Fig. 7).

        With no gradient through the autoencoder it needs less memory than a step on as many images. A copy of
        the discriminator judges, since batch norm would move its running statistics.
        """
        with torch.no_grad():
            recon, _, features = self.model(x, with_features=True)
        recon.requires_grad_()
        rec = sum(weight * term(x, recon) for _, weight, term in terms)
        rec = rec + self.reconstruction({}, x, recon, None)
        adv = adv_loss(self.args.disc_loss, copy.deepcopy(disc).requires_grad_(False)(recon))
        gradients = [last_layer_gradient(part, recon, features, self.model.decoder) for part in (rec, adv)]
        return self.args.disc_weight * adaptive_weight(*gradients).item()

    # ---- the discriminator

    def penalties(
        self, parts: dict, disc: nn.Module, wrapped: nn.Module, step: int, rows: slice,
        x: Tensor, recon: Tensor, real: tuple[Tensor, ...], fake: tuple[Tensor, ...],
    ) -> Tensor | int:  # fmt: skip
        """Weighted sum of CutMix, LeCam and R1, given the logits; `wrapped` is `disc` in DDP."""
        args, total = self.args, 0
        if args.cutmix:
            mask = regularisers.cutmix_mask(self.boxes[rows], *x.shape[-2:])
            mixed = wrapped(torch.where(mask > 0, x.to(recon.dtype), recon))
            parts["cutmix"] = regularisers.cutmix_loss(mask, mixed[0], real[0], fake[0])
            total = total + args.cutmix * parts["cutmix"]
        if self.lecam:
            parts["lecam"] = self.lecam(real, fake)
            total = total + args.lecam * parts["lecam"]
            self.lecam_means.append(torch.stack(list(map(regularisers.head_means, (real, fake)))))
        # the last of every r1_every updates, so that steps which are logged have it too
        if args.r1 and (step // (1 + args.alternate) + 1) % args.r1_every == 0:
            parts["r1"] = regularisers.r1_loss(disc, x)                  # the bare one, see there
            total = total + args.r1 * args.r1_every * parts["r1"]
        return total

    # ---- after the updates

    def update(self, model_moves: bool, disc_moves: bool, failed: Tensor) -> dict[str, Tensor]:
        """LeCam's averages and the codebook, unless `failed` is 1; returns what the log shows of them."""
        if disc_moves and self.lecam:
            with undone_if(failed, self.lecam):
                self.lecam.update(*distributed.mean(torch.stack(self.lecam_means).mean(dim=0)))
        if model_moves and self.args.codebook_size and not self.args.freeze_encoder:
            with undone_if(failed, self.model.quantizer):
                return self.model.quantizer.update(distributed.sum_(self.table))
        return {}


@contextmanager
def undone_if(failed: Tensor, module: nn.Module) -> Iterator[None]:
    """Gives a module's parameters and buffers their old values back at the end, if `failed` is 1."""
    state = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
    before = [tensor.clone() for tensor in state]
    yield
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(torch.where(failed > 0, old, tensor))


def reconstruction_terms(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """(name, weight, function of (x, recon)) of VGG19 and identity; ValueError if they have no weights."""
    terms = []
    if args.vgg19_weight:
        vgg = distributed.from_main(lambda: perceptual.load_vgg19(args.vgg19_file))
        terms.append(("vgg19", args.vgg19_weight, perceptual.VGG19Loss(vgg).to(device)))
    if args.identity_weight:
        moco, md5 = distributed.from_main(lambda: perceptual.load_moco(args.moco_file))
        known = "the published 800 epochs" if md5 == perceptual.MOCO_MD5 else "not the published file"
        print0(f"moco: {args.moco_file}, md5 {md5}, {known}")
        terms.append(("identity", args.identity_weight, perceptual.IdentityLoss(moco).to(device)))
    return terms
