"""The paper's ablations: alternatives to single parts of LiteVAE.

Each is a field of variants.config.AutoencoderConfig, and they can be combined:

    encoder "dwt", "dwt2"     no learned encoder: the wavelet bands are the code (App. B)
    extractor "nafnet"        NAFNet blocks in the extractors' UNets (App. D.3)
    shared_extractor          one extractor for all levels (App. D.4)
    aggregator "vit"          a small transformer for one fixed resolution (App. D.5)
    first_level               leaves out the finer levels (App. D.6)
    downsample "conv"         learned downsampling of the extractors' outputs (App. G's Downsample2D)
    dropout                   in extractors and aggregator (App. G)

The paper gives no layout for D.3 and D.5; ours are marked. B batch, C channels, h w latent size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ResBlock, UNet
from variants.config import AutoencoderConfig
from wavelets import dwt2, wavedec2

# ----------------------------------------------------------------------------
# no learned encoder (App. B)


class WaveletEncoder(nn.Module):
    """Wavelet bands as the code, without parameters. x (B, C, H, W) -> moments (B, 2Z, h, w).

    details=False: the four bands of the last level L, Z = 4C (12 for RGB). details=True: also the three
    detail bands of level L - 1 by space-to-depth, Z = 16C (48 for RGB). Bands are divided by 2^level, like
    the inputs of LiteVAE's extractors, so Haar codes of images in [-1, 1] stay in [-1, 1].

    The code is deterministic: the log-variance is the lowest that Posterior allows (sigma = e^-15 = 3e-7), so
    a sample equals the mean for all purposes. The KL has no gradient; train with --kl-weight 0.
    """

    LOGVAR = -30.0

    def __init__(self, levels: int, wavelet: str, details: bool) -> None:
        super().__init__()
        self.levels, self.wavelet, self.details = levels, wavelet, details

    def forward(self, x: Tensor) -> Tensor:
        low, high, finer, *_ = wavedec2(x, self.levels, self.wavelet)
        code = torch.cat([low, high], dim=1) / 2**self.levels
        if self.details:
            finer = F.pixel_unshuffle(finer / 2 ** (self.levels - 1), 2)     # (B, 12C, h, w)
            code = torch.cat([code, finer], dim=1)
        return torch.cat([code, torch.full_like(code, self.LOGVAR)], dim=1).to(x.dtype)


# ----------------------------------------------------------------------------
# NAFNet extractor (App. D.3)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel, (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NAFBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022) in place of App. G's ResBlock. (B, C, h, w) -> (B, C', h, w).

    Two residual branches without activations: (norm, 1x1 to 2C, depthwise 3x3, gate, channel attention, 1x1)
    and (norm, 1x1 to 2C, gate, 1x1). The gate multiplies one half of the channels by the other. The attention
    multiplies each channel by a linear function of all channel means. Both branches start at 0.

    differs from the paper: the paper gives no layout. Ours keeps LiteVAE's UNet (widths, concatenated skips,
    no resampling) and replaces its blocks; a 1x1 convolution comes first where widths differ.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        C = out_channels
        self.skip = nn.Identity() if in_channels == C else nn.Conv2d(in_channels, C, 1)
        self.norm1, self.norm2 = LayerNorm2d(C, eps=1e-6), LayerNorm2d(C, eps=1e-6)
        self.expand1, self.expand2 = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(C, 2 * C, 1)
        self.depthwise = nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)
        self.attention = nn.Conv2d(C, C, 1)
        self.project1, self.project2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.scale1 = nn.Parameter(torch.zeros(C, 1, 1))
        self.scale2 = nn.Parameter(torch.zeros(C, 1, 1))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(x)
        h = gate(self.depthwise(self.expand1(self.norm1(x))))
        h = self.project1(h * self.attention(h.mean(dim=(2, 3), keepdim=True)))
        x = x + self.scale1 * F.dropout(h, self.dropout, self.training)
        h = self.project2(gate(self.expand2(self.norm2(x))))
        return x + self.scale2 * F.dropout(h, self.dropout, self.training)


def gate(x: Tensor) -> Tensor:
    """(B, 2C, h, w) -> (B, C, h, w)."""
    a, b = x.chunk(2, dim=1)
    return a * b


# ----------------------------------------------------------------------------
# downsampling of the extractors' outputs


class LearnedPool(nn.Conv2d):
    """`factor` x `factor` convolution with stride `factor`; starts as the average pooling that it replaces.

    The paper does not define its Downsample2D. Among the learned layers that give the 41.425 M parameters of
    Table 3, this one reads every pixel.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels, channels, factor, stride=factor)
        nn.init.zeros_(self.bias)
        eye = torch.eye(channels, device=self.weight.device)
        with torch.no_grad():
            self.weight.copy_(eye[:, :, None, None].expand_as(self.weight) / factor**2)


# ----------------------------------------------------------------------------
# ViT aggregator (App. D.5)


class ViTAggregator(nn.Module):
    """Transformer over the h x w positions of the concatenated features. (B, C, h, w) -> (B, C', h, w).

    1x1 convolution to 4 * channels, learned position embedding, four pre-norm blocks with four heads, and a
    plain 3x3 head like the UNet's. The embedding fixes h = w = side; Autoencoder.encode rejects other sizes.

    differs from the paper: the paper gives 0.84 M parameters (1.69 M for the UNet) but no layout. Ours has
    839,816 for scale B at n_z 4 and 128 x 128 images (side 16).
    """

    DEPTH = 4

    def __init__(self, in_channels: int, out_channels: int, channels: int, side: int, dropout: float) -> None:
        super().__init__()
        width = 4 * channels
        self.conv_in = nn.Conv2d(in_channels, width, 1)
        self.position = nn.Parameter(torch.empty(side * side, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, dropout) for _ in range(self.DEPTH)))
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.trunc_normal_(self.position, std=0.02)                   # as in ViT

    def forward(self, x: Tensor) -> Tensor:
        B, _, h, w = x.shape
        assert h * w == len(self.position), (h, w, len(self.position))
        tokens = self.conv_in(x).flatten(2).transpose(1, 2)              # (B, hw, width)
        tokens = self.blocks(tokens + self.position)
        return self.conv_out(tokens.transpose(1, 2).reshape(B, -1, h, w))


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both branches start at 0. (B, N, C) -> (B, N, C)."""

    HEADS = 4

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout
        for layer in (self.proj, self.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attend(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))), self.dropout, self.training)

    def attend(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.HEADS, C // self.HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv)                       # (B, heads, N, C / heads)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


# ----------------------------------------------------------------------------
# the encoder with replaced parts


class AblatedEncoder(nn.Module):
    """model.LiteVAEEncoder with parts replaced as configured. (B, C, H, W) -> (B, 2Z, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.wavelet = config.wavelet
        self.levels = range(config.first_level, config.levels + 1)
        bands = 4 * config.in_channels
        block = partial(NAFBlock if config.extractor == "nafnet" else ResBlock, dropout=config.dropout)
        self.extractors = nn.ModuleList(
            UNet(bands, bands, config.extractor_channels, config.extractor_mult, block)
            for _ in (self.levels[:1] if config.shared_extractor else self.levels)
        )
        pool = nn.AvgPool2d if config.downsample == "pool" else partial(LearnedPool, bands)
        factors = [2 ** (config.levels - level) for level in self.levels]
        self.pools = nn.ModuleList(pool(factor) if factor > 1 else nn.Identity() for factor in factors)
        self.aggregator = build_aggregator(config, bands * len(self.levels))

    def forward(self, x: Tensor) -> Tensor:
        features, low = [], x
        for level in range(1, self.levels.stop):
            bands = dwt2(low, self.wavelet)                              # (B, 4C, H/2^l, W/2^l)
            low = bands[:, : x.shape[1]]
            if level in self.levels:
                index = level - self.levels.start
                extractor = self.extractors[index % len(self.extractors)]        # always 0 if shared
                features.append(self.pools[index](extractor((bands / 2**level).to(x.dtype))))
        return self.aggregator(torch.cat(features, dim=1))               # (B, 2Z, h, w)


def build_aggregator(config: AutoencoderConfig, in_channels: int) -> nn.Module:
    """F_agg: (B, in_channels, h, w) -> moments (B, 2Z, h, w), or (B, Z, h, w) with a codebook."""
    moments, channels = config.moment_channels, config.aggregator_channels
    if config.aggregator == "vit":
        side = config.resolution // config.downsample_factor
        return ViTAggregator(in_channels, moments, channels, side, config.dropout)
    block = partial(ResBlock, dropout=config.dropout)
    return UNet(in_channels, moments, channels, config.aggregator_mult, block)
