"""A multi-level discriminator with self-attention, after GigaGAN (Kang et al. 2023, arXiv 2303.05511).

Each of six levels halves the map and scores it. The image itself also enters at each level, downscaled, so
every scale is scored at its own level and at all coarser ones. 14,772,238 parameters at width 32.
open-LiteVAE's network, with the same widths and depths, has 15,046,446 with the heads of all levels, and
14,388,452 with only the last head: the 14.38 M of its README.

What differs from open-LiteVAE's:
- 4x4 convolutions pad by 1, so maps halve exactly (theirs: 129, 65, 33, ... at 256 pixels);
- the images form a pyramid, as in GigaGAN; theirs accepts an image at any level, but only one per call;
- one head per level, with a mean each; theirs flattens all logits together, 74% of them from the first map;
- the spectral norm is the largest singular value; their heads divide by the Frobenius norm;
- no batch norm, which couples images and fails for a batch of 1 in the last head; leaky ReLU with gain
  sqrt 2 keeps the scale instead. The heads are written as what theirs compute, plain 1x1 convolutions;
- residual blocks of attention start as the identity; theirs halve their input.
What differs from GigaGAN: no text conditioning, hence no filter banks and no modulation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discriminators import SpectralConv2d
from variants.stylegan import leaky_relu
from wavelets import full_precision

HEADS = 4            # attention heads


def l2_attention(q: Tensor, v: Tensor) -> Tensor:
    """L2 self-attention with keys tied to queries; q and v (..., tokens, d) -> (..., tokens, d).

    Logits -||q_i - q_j||^2 / sqrt(d), in fp32 (Kim et al. 2021: its slope is bounded, that of dot-product
    attention is not). Uses plain operations, since R1 needs second derivatives and fused attention has none.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, v = full_precision(q), full_precision(v)
        # ||q_i||^2 is the same for every j, and softmax ignores it
        logits = 2 * q @ q.mT - q.square().sum(-1)[..., None, :]
        return (logits * q.shape[-1] ** -0.5).softmax(-1) @ v


class Attention(nn.Module):
    """x + projected l2_attention over its pixels, four heads: (B, C, H, W); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.query = nn.Conv2d(channels, channels, 1, bias=False)          # distances ignore a bias
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, v = (conv(h).flatten(2).unflatten(1, (HEADS, -1)).mT for conv in (self.query, self.value))
        h = l2_attention(q, v).mT.flatten(1, 2).unflatten(2, x.shape[-2:])
        return x + self.out(h)


class FeedForward(nn.Module):
    """x + a gated two-layer network (GEGLU, 4 C wide) at each pixel: (B, C, H, W); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.expand = nn.Conv2d(channels, 8 * channels, 1)
        self.out = zero_init(nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(self.norm(x)).chunk(2, dim=1)
        return x + self.out(value * F.gelu(gate))


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class Activation(nn.Module):
    """stylegan.leaky_relu as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x)


def build_level(in_channels: int, out_channels: int, attention: bool) -> nn.Sequential:
    """Three convolutions, then optionally a transformer of depth 2: (B, C, H, W) -> (B, C', H/2, W/2)."""
    layers = [SpectralConv2d(in_channels, out_channels, 4, stride=2), Activation()]
    for _ in range(2):
        layers += [SpectralConv2d(out_channels, out_channels, 3), Activation()]
    for _ in range(2 if attention else 0):
        layers += [Attention(out_channels), FeedForward(out_channels)]
    return nn.Sequential(*layers)


class Head(nn.Module):
    """One logit per pixel, from four 1x1 convolutions plus a linear skip: (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = []
        for _ in range(3):
            layers += [SpectralConv2d(channels, channels, 1), Activation()]
        self.layers = nn.Sequential(*layers, SpectralConv2d(channels, 1, 1))
        self.skip = SpectralConv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.skip(x)


class GigaGANDiscriminator(nn.Module):
    """Seven heads: (B, C, H, W) -> (B, 1, H/2, W/2), (B, 2, H/4, W/4), ..., (B, 6, H/64, W/64), (B, 6, 1, 1).

    Channel i of each head scores the image downscaled by 2^i, which enters at level i. H and W are multiples
    of 64. No layer mixes images.
    """

    stride = 64
    min_size = 64
    heads = 7
    WIDTHS = (1, 2, 4, 8, 8, 8)                                        # after each halving, times `width`
    ATTENTION = (False, False, False, True, True, False)               # at H/16 and H/32: 16 and 8 for 256

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        widths = [width * m for m in self.WIDTHS]
        before = [width, *widths[:-1]]
        self.from_rgb = nn.ModuleList(SpectralConv2d(in_channels, a, 3) for a in before)
        self.levels = nn.ModuleList(map(build_level, before, widths, self.ATTENTION))
        self.level_heads = nn.ModuleList(map(Head, widths))
        # maps 4x4 pixels of C channels to 2x2, which the last head reads as one pixel of 4 C channels
        self.quarter = SpectralConv2d(widths[-1], widths[-1], 2, stride=2)
        self.image_head = Head(4 * widths[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        B, logits, h = len(x), [], None
        for from_rgb, level, head in zip(self.from_rgb, self.levels, self.level_heads, strict=True):
            entering = leaky_relu(from_rgb(x))
            # all scales share the later layers but never mix: they are stacked along the batch
            h = level(entering if h is None else torch.cat([h, entering]))
            logits.append(head(h))
            x = F.avg_pool2d(x, 2)
        # at 256 pixels the map is already 4x4
        h = leaky_relu(self.quarter(F.adaptive_avg_pool2d(h, 4)))
        logits.append(self.image_head(h.flatten(1)[:, :, None, None]))
        return tuple(head.unflatten(0, (-1, B)).squeeze(2).transpose(0, 1) for head in logits)
