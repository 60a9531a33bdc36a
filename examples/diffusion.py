"""A latent diffusion model on LiteVAE's latents: a diffusion transformer trained by flow matching.

    python -m examples.diffusion CKPT CACHE --out DIR            # CACHE: from latents.py cache

The transformer is DiT with adaLN-zero (Peebles and Xie, arXiv 2212.09748, Sec. 3.2). It learns the velocity
of a straight path from data to noise (Lipman et al., 2210.02747; Liu et al., 2209.03003):

    x_t = (1 - t) x_0 + t eps,    velocity = eps - x_0,    t = 0: data, t = 1: noise

x_0 are latents with mean 0 and standard deviation 1 in each channel (`latents.py stats`). One process, on a
CPU or one GPU, bf16 autocast on CUDA; no resume and no guidance. DIR receives

    samples.png   pictures of samples from the averaged weights
    samples.pt    their latents, which `latents.py decode` reads
    dit.pt        step, configuration and averaged weights

B batch, Z latent channels, h w latent size, p patch size, N = hw / p^2 tokens, D width.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
from downstream import pictures
from downstream.cache import LatentDataset, weights_hash
from evaluation import metrics, report
from model import Autoencoder, LatentScaling, count_parameters
from runtime import cli, distributed
from runtime.distributed import print0
from runtime.failures import failures

# ----------------------------------------------------------------------------
# configuration and flags


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a transformer."""

    latent_shape: tuple[int, int, int]         # Z, h, w
    classes: int                               # 0: without labels
    patch: int                                 # p
    width: int                                 # D
    depth: int                                 # blocks
    heads: int                                 # of the attention

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}")
        if any(side % self.patch for side in self.latent_shape[1:]):
            raise ValueError(f"--patch {self.patch} does not divide latents of {self.latent_shape}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="autoencoder from train.py, with the statistics of latents.py stats")
    add("cache", metavar="CACHE", help="folder from latents.py cache, encoded by CKPT")
    add("--out", metavar="DIR", required=True, help="new folder for samples and weights")
    add("--patch", type=int, choices=(1, 2), default=2, help="side of a token, latents")
    add("--width", type=cli.positive, default=384, help="channels of a token; these defaults are DiT-S")
    add("--depth", type=cli.positive, default=12, help="blocks")
    add("--heads", type=cli.positive, default=6, help="of the attention")
    add("--steps", type=cli.positive, default=400_000, help="updates")
    add("--batch-size", type=cli.positive, default=256, help="latents per step")
    add("--lr", type=cli.amount, default=1e-4, help="of AdamW, constant, without weight decay")
    add("--ema-decay", type=cli.amount, default=0.9999, help="of the moving average of weights")
    add("--times", choices=("uniform", "logit-normal"), default="logit-normal",
        help="distribution of t in training; logit-normal favours the middle (Esser et al. 2024)")
    add("--samples", type=cli.positive, default=64, help="pictures in samples.png")
    add("--sample-steps", type=cli.positive, default=50, help="Euler steps of a sample")
    add("--save-every", type=cli.positive, default=10_000, help="steps; the last step always saves")
    add("--num-workers", type=cli.natural, default=data.default_workers(),
        help="loader processes; unless given, 4 or the number of cores if smaller")
    add("--seed", type=cli.natural, default=0, help="of weights, data order, noise and samples")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------
# flow matching


def flow(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity dx_t/dt, both (B, Z, h, w), of data x0, noise eps and times t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def draw_times(number: int, kind: str, generator: torch.Generator) -> Tensor:
    """t (number,) in [0, 1]: uniform, or the sigmoid of N(0, 1)."""
    draw = torch.rand if kind == "uniform" else torch.randn
    t = draw(number, generator=generator, device=generator.device)
    return t if kind == "uniform" else t.sigmoid()


@torch.no_grad()
def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """Solve dx/dt = velocity(x, t) from noise x (B, Z, h, w) at t = 1 to data at t = 0, in equal steps."""
    for i in range(steps, 0, -1):
        x = x - velocity(x, x.new_full((len(x),), i / steps)) / steps
    return x


# ----------------------------------------------------------------------------
# the transformer


def sinusoids(x: Tensor, width: int) -> Tensor:
    """Cosines and sines of x (N,) at width / 2 frequencies, from 1 down towards 1e-4 -> (N, width)."""
    half = width // 2
    angles = x[:, None] * torch.exp(-math.log(1e4) / half * torch.arange(half, device=x.device))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """Position embedding (N, D): one half of the channels for the row, the other for the column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sinusoids(axis.flatten(), channels // 2) for axis in (row, column)], dim=1)


def zero(linear: nn.Linear) -> nn.Linear:
    """Let a layer start with the output 0."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm over channels, then the condition's scale and shift (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero).

    x (B, N, D), condition (B, D) -> (B, N, D). The gates are 0 at the start: the block is the identity.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = zero(nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (3, B, heads, N, D')
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(norm(x, scale1, shift1))
        return x + gate2 * self.mlp(norm(x, scale2, shift2))


class DiT(nn.Module):
    """Velocity (B, Z, h, w), fp32, of x (B, Z, h, w) at times t (B,) for labels (B,); label -1: no class."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, D, p = config, config.width, config.patch
        Z, h, w = config.latent_shape
        self.patchify = nn.Conv2d(Z, D, p, stride=p)
        self.register_buffer("positions", grid_positions(h // p, w // p, D), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(config.classes + 1, D)                 # the last row: no class
        nn.init.normal_(self.label.weight, std=0.02)                     # as in ViT
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.modulation, self.head = zero(nn.Linear(D, 2 * D)), zero(nn.Linear(D, Z * p**2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rows = label % (self.config.classes + 1)
        # DiT's frequencies are for diffusion steps up to 1000
        condition = F.silu(self.time(sinusoids(1000 * t, 256)) + self.label(rows))
        patches = self.patchify(x)                                       # (B, D, h/p, w/p)
        x = patches.flatten(2).transpose(1, 2) + self.positions          # (B, N, D)
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(norm(x, *self.modulation(condition)[:, None].chunk(2, dim=-1)))
        x = x.transpose(1, 2).unflatten(2, patches.shape[2:])            # (B, Z p^2, h/p, w/p)
        return F.pixel_shuffle(x, self.config.patch).float()


# ----------------------------------------------------------------------------
# training and sampling


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def batches(dataset: LatentDataset, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (latents, labels) without end, in a new order in each epoch."""
    order = torch.Generator().manual_seed(dataset.seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=order, num_workers=num_workers,
                        persistent_workers=num_workers > 0)
    for epoch in count():
        dataset.set_epoch(epoch)
        yield from loader


def train(model: DiT, ema: DiT, dataset: LatentDataset, args: argparse.Namespace, device: torch.device
          ) -> Iterator[tuple[int, float]]:
    """Train model and its average ema; yield (step, mean loss since) when it is time to save.

    The loss is the mean squared error of the velocity, over all elements.
    """
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0)
    generator, losses = torch.Generator(device).manual_seed(args.seed), []
    stream = islice(batches(dataset, args.batch_size, args.num_workers), args.steps)
    for step, (x0, label) in enumerate(tqdm(stream, total=args.steps, dynamic_ncols=True), start=1):
        x0, label = x0.to(device), label.to(device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        t = draw_times(len(x0), args.times, generator)
        x, velocity = flow(x0, eps, t)
        with autocast(device):
            predicted = model(x, t, label)
        loss = F.mse_loss(predicted, velocity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update(ema, model, min(args.ema_decay, (1 + step) / (10 + step)))  # the random start is forgotten
        losses.append(loss.detach())
        if step % args.save_every == 0 or step == args.steps:
            yield step, torch.stack(losses).mean().item()
            losses.clear()


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def sample(model: DiT, labels: Tensor, steps: int, seed: int) -> Tensor:
    """Latents (B, Z, h, w), still scaled, for labels (B,); a function of the seed on the CPU."""
    noise = torch.randn(len(labels), *model.config.latent_shape,
                        generator=torch.Generator().manual_seed(seed))
    with autocast(labels.device):
        return euler(lambda x, t: model(x, t, labels), noise.to(labels.device), steps)


@torch.no_grad()
def decode(vae: Autoencoder, z: Tensor) -> Tensor:
    """Latents (B, Z, h, w) of the autoencoder -> images uint8 (B, C, H, W)."""
    return torch.cat([metrics.to_uint8(vae.decode(part)).cpu() for part in z.split(8)])


# ----------------------------------------------------------------------------


def set_up(args: argparse.Namespace) -> tuple[Autoencoder, LatentScaling, LatentDataset, DiTConfig]:
    """Open the inputs; ValueError if they do not fit, or --out exists."""
    if distributed.world_size() > 1:
        raise ValueError("this example runs in one process, without torchrun")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists: choose another --out")
    if args.ema_decay >= 1:
        raise ValueError(f"--ema-decay must be below 1, got {args.ema_decay}")
    vae, state = checkpoint.load_model(args.ckpt)
    scaling = LatentScaling.of(state.get("latents"), per_channel=True)
    dataset = LatentDataset(args.cache, args.seed, scaling)
    shape, channels = tuple(dataset.index["latent_shape"]), vae.config.latent_channels
    if shape[0] != channels:
        raise ValueError(f"{args.cache} has {shape[0]} latent channels and {args.ckpt} has {channels}: "
                         "name the checkpoint that encoded it")
    if weights_hash(vae) != dataset.index["weights_sha256"]:
        print0(f"note: {args.cache} was not encoded by the weights of {args.ckpt}; "
               "samples are right only if the encoder is the same")
    config = DiTConfig(shape, len(dataset.classes), args.patch, args.width, args.depth, args.heads)
    return vae.requires_grad_(False), scaling, dataset, config


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        device = distributed.init(args.device)
        vae, scaling, dataset, config = set_up(args)
        out = Path(args.out)
        out.mkdir(parents=True)
    torch.manual_seed(args.seed)
    vae, model = vae.to(device), DiT(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    print0(f"{len(dataset):,} images, {config.classes} classes, latents {config.latent_shape}; "
           f"{count_parameters(model):,} parameters")
    labels = torch.arange(args.samples, device=device) % max(1, config.classes)
    with failures("files already written are whole"):
        for step, loss in train(model, ema, dataset, args, device):
            z = scaling.unscale(sample(ema, labels, args.sample_steps, args.seed))
            images = decode(vae, z)
            pictures.write(out / "samples.png", report.grid(images.split(8)))
            pictures.write_latent(out / "samples.pt", z.cpu(), images.shape[-2:], "none")
            state = {"step": step, "config": asdict(config), "ema": ema.state_dict()}
            checkpoint.write(out / "dit.pt", state)
            print0(f"step {step}: loss {loss:.4f}, {len(images)} samples in {out / 'samples.png'}")


if __name__ == "__main__":
    main()
