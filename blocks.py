"""The leaf modules that encoders and decoders are made of: norms, convolutions, blocks, resampling.

ResBlock, Attention, Downsample and Upsample are SD-VAE's (Rombach et al. 2022), SelfModulatedConv2d is
LiteVAE's (Eq. 3). Nothing here reads a configuration. B batch, C channels, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """SD-VAE's GroupNorm (32 groups, eps 1e-6); widths 32 does not divide (scale S) get gcd(32, C) groups."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class SelfModulatedConv2d(nn.Module):
    """3x3 convolution whose filters are scaled per input channel and normalised to unit length (Eq. 3).

    w'_ijk = s_i w_ijk / sqrt(sum_{i,k} (s_i w_ijk)^2 + eps) * gain, with learned s (one per input channel)
    and a learned scalar gain, both 1 at the start. Nothing depends on the data, so the weight is modulated
    once, in fp32, and one ordinary convolution follows. (B, C, H, W) -> (B, C', H, W).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(()))

    def weight(self) -> Tensor:
        """Modulated filters (C', C, 3, 3), fp32 or wider: autocast leaves elementwise operations alone."""
        dtype = torch.promote_types(self.conv.weight.dtype, torch.float32)
        w = self.conv.weight.to(dtype) * self.scales.to(dtype)[:, None, None]
        norm = w.square().sum(dim=(1, 2, 3), keepdim=True).add(1e-8).sqrt()
        return w * (self.gain.to(dtype) / norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight().to(self.conv.weight.dtype), self.conv.bias, padding=1)

    def fold(self) -> nn.Conv2d:
        """An ordinary convolution with the same output."""
        with torch.no_grad():
            self.conv.weight.copy_(self.weight())
        return self.conv


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv, plus skip (1x1 where widths differ).

    (B, C, H, W) -> (B, C', H, W). With norm="smc" there is no normalisation layer: both convolutions are
    self-modulated (paper Sec. 4.3).
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: str = "group", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        smc = norm == "smc"
        self.norm1 = nn.Identity() if smc else group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, smc)
        self.norm2 = nn.Identity() if smc else group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, smc)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return self.skip(x) + self.conv2(h)


def conv3x3(in_channels: int, out_channels: int, smc: bool = False) -> nn.Module:
    if smc:
        return SelfModulatedConv2d(in_channels, out_channels)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class Attention(nn.Module):
    """Single-head self-attention over all positions with a residual, as in SD-VAE's middle block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, 1, C, H * W).transpose(-1, -2)   # (B, 3, 1 head, HW, C)
        out = F.scaled_dot_product_attention(*qkv.unbind(1))                     # (B, 1, HW, C)
        return x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded right and below only, as in SD-VAE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
