"""SD-VAE's encoder (Rombach et al. 2022), which LiteVAE replaces, with its 1x1 convolutions left to build.py.

Equal to diffusers' AutoencoderKL (tests/variants/test_sdvae.py). B batch, C channels, H W pixels, Z latent
channels, h w = H/f, W/f.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model import Attention, ResBlock, group_norm
from variants.config import AutoencoderConfig


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded right and below only, as in SD-VAE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SDEncoder(nn.Module):
    """Two ResBlocks per resolution, attention in the middle. (B, C, H, W) -> moments (B, 2Z, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.sd_channels
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        layers = []
        for i, m in enumerate(config.pyramid_mult):
            for _ in range(2):
                layers.append(ResBlock(width, config.sd_channels * m))
                width = config.sd_channels * m
            if i < config.levels:
                layers.append(Downsample(width))
        self.down = nn.Sequential(*layers)
        self.mid = nn.Sequential(ResBlock(width, width), Attention(width), ResBlock(width, width))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, config.moment_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))
