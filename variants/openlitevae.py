"""open-LiteVAE's encoder and decoder, for loading its public checkpoints (foreign.load_open_litevae).

open-LiteVAE is an independent implementation of LiteVAE that predates the paper's pseudocode. This file was
written from a description of its layout, tensor names and outputs; its code is under the AGPL and was not
read. Modules are named as in its checkpoints. What differs from LiteVAE (model.py):

    bands       LL, HL, LH, HH (its V, H, D), not divided by 2^l
    ResBlock    twice convolution, norm and SiLU, then the skip is added; 8 groups, eps 1e-5
    UNet        1x1 convolutions outside the ResBlocks change the width; a 1x1 head
    decoder     the same ResBlock, self-modulated; 3 in the middle; a self-modulated convolution near the end

B batch, C channels, H W pixels, Z latent channels, h w = H/f, W/f.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Upsample, conv3x3
from variants.config import OPEN_GROUPS, AutoencoderConfig
from wavelets import dwt2

# ----------------------------------------------------------------------------
# the block of both halves


class PostNormBlock(nn.Module):
    """conv, norm, SiLU, conv, norm, SiLU, plus skip (1x1 where widths differ). (B, C, H, W) -> (B, C', H, W).

    With smc, both convolutions are self-modulated and there is no norm.
    """

    def __init__(self, in_channels: int, out_channels: int, smc: bool = False) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, smc)
        self.norm1 = nn.Identity() if smc else nn.GroupNorm(OPEN_GROUPS, out_channels, eps=1e-5)
        self.conv2 = conv3x3(out_channels, out_channels, smc)
        self.norm2 = nn.Identity() if smc else nn.GroupNorm(OPEN_GROUPS, out_channels, eps=1e-5)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        h = F.silu(self.norm2(self.conv2(h)))
        return self.skip(x) + h


# ----------------------------------------------------------------------------
# encoder


class OpenUNet(nn.Module):
    """open-LiteVAE's extractor and aggregator: `blocks` ResBlocks per width, all at one resolution.

    The output of each ResBlock on the way down is the skip of one ResBlock on the way up, which receives
    concat(x, skip). Only the middle uses the last width. (B, C, h, w) -> (B, C', h, w).
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, mult: tuple[int, ...], blocks: int
    ) -> None:
        super().__init__()
        widths = [channels * m for m in mult]
        self.init_conv = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for width, wider in pairwise(widths):
            down = [PostNormBlock(width, width) for _ in range(blocks)]
            self.down_blocks.append(nn.ModuleList([*down, nn.Conv2d(width, wider, 1)]))
        self.mid_block = nn.Sequential(*(PostNormBlock(widths[-1], widths[-1]) for _ in range(blocks)))
        for wider, width in pairwise(reversed(widths)):
            up = [PostNormBlock(2 * width, width) for _ in range(blocks)]
            self.up_blocks.append(nn.ModuleList([nn.Conv2d(wider, width, 1), *up]))
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.init_conv(x), []
        for *blocks, widen in self.down_blocks:
            for block in blocks:
                x = block(x)
                skips.append(x)
            x = widen(x)
        x = self.mid_block(x)
        for narrow, *blocks in self.up_blocks:
            x = narrow(x)
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1))
        return self.conv_out(x)


class OpenLiteVAEEncoder(nn.Module):
    """Haar cascade -> one UNet per level -> pooled to one size -> UNet.

    x: (B, C, H, W) in [-1, 1] -> moments (B, 2Z, h, w). The bands of level l have values of up to 2^l.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        bands, moments = 4 * config.in_channels, config.moment_channels
        extractor = config.extractor_channels, config.extractor_mult, config.extractor_blocks
        aggregator = config.aggregator_channels, config.aggregator_mult, config.aggregator_blocks
        self.extractors = nn.ModuleList(OpenUNet(bands, bands, *extractor) for _ in range(config.levels))
        self.aggregator = OpenUNet(config.levels * bands, moments, *aggregator)

    def forward(self, x: Tensor) -> Tensor:
        features, low = [], x
        for level, extractor in enumerate(self.extractors, start=1):
            low, lh, hl, hh = dwt2(low).chunk(4, dim=1)                  # each (B, C, H/2^l, W/2^l)
            feature = extractor(torch.cat([low, hl, lh, hh], dim=1).to(x.dtype))
            features.append(F.avg_pool2d(feature, 2 ** (len(self.extractors) - level)))
        return self.aggregator(torch.cat(features, dim=1))               # (B, 2Z, h, w)


# ----------------------------------------------------------------------------
# decoder


class Level(nn.Module):
    """The ResBlocks of one decoder resolution, and the upsampling to the next finer one."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + blocks * [out_channels]
        self.block = nn.Sequential(*(PostNormBlock(*pair, smc=True) for pair in pairwise(widths)))
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class OpenLiteVAEDecoder(nn.Module):
    """Self-modulated throughout, no attention, no norm. z (B, Z, h, w) -> (B, C, H, W).

    Levels are numbered from the image: up[0] is the finest and runs last.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.decoder_channels * m for m in config.pyramid_mult]          # finest first
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(*(PostNormBlock(widths[-1], widths[-1], smc=True) for _ in range(3)))
        self.up = nn.ModuleList(
            Level(coarser, width, config.decoder_blocks, upsample=level > 0)
            for level, (width, coarser) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.conv_norm = conv3x3(widths[0], widths[0], smc=True)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """Everything before the last convolution."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.silu(self.conv_norm(x))

    def head(self, features: Tensor) -> Tensor:
        """The last convolution."""
        return self.conv_out(features)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.features(z))
