"""LiteVAE: a wavelet encoder, a Gaussian posterior, and a decoder without normalisation layers.

LiteVAE (Sadat et al., NeurIPS 2024, arXiv 2405.14477) replaces the convolutional encoder of SD-VAE (Rombach
et al. 2022) by a Haar transform, one small UNet per wavelet level, and a UNet that aggregates them (Sec. 4.1,
App. F, G). Its decoder is SD-VAE's with self-modulated convolutions (Sec. 4.2, Eq. 3) in place of group
normalisation; decoder_norm="group" with attention is the decoder of the paper's other tables.

Departures are marked `# differs from the paper:`. Exact parameter counts: `python model.py`. The paper's
ablations and other systems build on this file from variants/.

Dimension key: B batch, C channels, H W pixels, Z latent channels, f = 2 ** levels, h w = H/f, W/f.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wavelets import FILTERS, dwt2, full_precision, idwt2

# ----------------------------------------------------------------------------
# configuration

# channel multiples of the decoder, finest first, by levels: LDM's kl-f4, -f8, -f16
PYRAMID_MULT = {2: (1, 2, 4), 3: (1, 2, 4, 4), 4: (1, 1, 2, 2, 4)}


@dataclass(frozen=True)
class LiteVAEConfig:
    """Everything that fixes an architecture. Plain values only: the configuration is part of a checkpoint."""

    in_channels: int = 3                       # of the image; 3 for RGB, 1 for grey
    latent_channels: int = 12                  # n_z; the paper's main tables use 12, SD-VAE 4
    levels: int = 3                            # wavelet levels; the downsample factor is f = 2 ** levels
    extractor_channels: int = 32               # C and multiples of each F_l, Table 2a (here: scale B)
    extractor_mult: tuple[int, ...] = (1, 2, 3)
    aggregator_channels: int = 32              # C and multiples of F_agg
    aggregator_mult: tuple[int, ...] = (1, 2, 3)
    wavelet: str = "haar"                      # of the encoder and of output="wavelet"; or db2 to db8
    decoder_channels: int = 128
    decoder_blocks: int = 3                    # ResBlocks per resolution of the decoder
    decoder_norm: str = "smc"                  # "smc" (Sec. 4.2, Table 4) or "group"
    decoder_attention: bool = False            # single-head attention in the middle of the decoder
    output: str = "image"                      # "image", or "wavelet": sub-bands at H/2, then an inverse DWT

    def __post_init__(self) -> None:
        check_choice("levels", self.levels, tuple(PYRAMID_MULT))
        check_choice("wavelet", self.wavelet, tuple(FILTERS))
        check_choice("decoder_norm", self.decoder_norm, ("smc", "group"))
        check_choice("output", self.output, ("image", "wavelet"))
        for name in ("in_channels", "latent_channels", "decoder_channels", "decoder_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def downsample_factor(self) -> int:
        return 2 ** self.levels

    @property
    def moment_channels(self) -> int:
        """Channels of the encoder's output: mean and log-variance."""
        return 2 * self.latent_channels

    @property
    def pyramid_mult(self) -> tuple[int, ...]:
        return PYRAMID_MULT[self.levels]


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


SCALES = {  # paper Table 2a: (extractor C, multiples, aggregator C, multiples)
    "S": (16, (1, 2, 2), 16, (1, 2, 2)),
    "B": (32, (1, 2, 3), 32, (1, 2, 3)),
    "M": (64, (1, 2, 4), 32, (1, 2, 3)),
    "L": (64, (1, 2, 4), 64, (1, 2, 4)),
}


def scale_fields(scale: str) -> dict:
    """The fields of a configuration that a paper scale, S, B, M or L, fixes."""
    check_choice("scale", scale, tuple(SCALES))
    names = ("extractor_channels", "extractor_mult", "aggregator_channels", "aggregator_mult")
    return dict(zip(names, SCALES[scale], strict=True))


def scale_config(scale: str, **options) -> LiteVAEConfig:
    """The configuration of a paper scale; options override any field."""
    return LiteVAEConfig(**scale_fields(scale) | options)


# ----------------------------------------------------------------------------
# blocks


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
        w, s = self.conv.weight.to(dtype), self.scales.to(dtype)
        energy = w.square().sum(dim=(2, 3))             # (C', C); first, so that what follows is small
        norm = (energy * s.square()).sum(dim=1, keepdim=True).add(1e-8).sqrt()
        return w * (self.gain.to(dtype) * s / norm)[:, :, None, None]

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
    self-modulated (paper Sec. 4.2).
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


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ----------------------------------------------------------------------------
# encoder


class UNet(nn.Module):
    """The feature extractor and aggregator of App. G: an ADM-like UNet that never changes resolution.

    Two ResBlocks per width, each output kept as a skip; two in the middle; two per width on the way back, on
    concat(x, skip); a bare 3x3 head. No attention. The first convolution's output is not a skip (the paper's
    pseudocode stores it and never uses it). (B, C, h, w) -> (B, C', h, w). `block` makes the blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, mult: tuple[int, ...],
        block: Callable[[int, int], nn.Module] = ResBlock,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, []
        for m in mult:
            for _ in range(2):
                self.down.append(block(width, channels * m))
                width = channels * m
                skips.append(width)
        self.mid = nn.Sequential(block(width, width), block(width, width))
        for m in reversed(mult):
            for _ in range(2):
                self.up.append(block(width + skips.pop(), channels * m))
                width = channels * m
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.mid(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.conv_out(x)


class LiteVAEEncoder(nn.Module):
    """Haar cascade -> one UNet per level -> pooled to one size -> UNet (paper Sec. 4.1, App. F, G).

    x: (B, C, H, W) in [-1, 1] -> moments (B, 2Z, h, w). The bands of level l are divided by 2^l, which keeps
    every Haar band in [-1, 1].
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        self.wavelet, self.levels = config.wavelet, config.levels
        bands = 4 * config.in_channels
        self.extractors = nn.ModuleList(
            UNet(bands, bands, config.extractor_channels, config.extractor_mult) for _ in range(self.levels)
        )
        self.aggregator = UNet(
            self.levels * bands, config.moment_channels, config.aggregator_channels, config.aggregator_mult
        )

    def forward(self, x: Tensor) -> Tensor:
        features, low = [], x
        for level, extractor in enumerate(self.extractors, start=1):
            bands = dwt2(low, self.wavelet)                              # (B, 4C, H/2^l, W/2^l)
            low = bands[:, : x.shape[1]]
            feature = extractor((bands / 2**level).to(x.dtype))
            # differs from the paper: average pooling; App. G has a Downsample2D of unstated kind
            features.append(F.avg_pool2d(feature, 2 ** (self.levels - level)))
        return self.aggregator(torch.cat(features, dim=1))               # (B, 2Z, h, w)


# ----------------------------------------------------------------------------
# decoder


class Decoder(nn.Module):
    """SD-VAE's decoder, group-normalised or self-modulated. z (B, Z, h, w) -> (B, C, H, W).

    decoder_norm="smc" without attention takes no statistic over the image anywhere, so its output at a pixel
    depends only on a neighbourhood of z. output="wavelet" stops one upsampling earlier, predicts the four
    wavelet bands of level 1 divided by 2, and inverts the transform (paper App. G).
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        norm, wavelet = config.decoder_norm, config.output == "wavelet"
        self.wavelet = config.wavelet if wavelet else None
        mult = config.pyramid_mult[::-1]                                 # coarsest first
        width = config.decoder_channels * mult[0]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        attention = [Attention(width)] if config.decoder_attention else []
        self.mid = nn.Sequential(ResBlock(width, width, norm), *attention, ResBlock(width, width, norm))
        layers = []
        for i, m in enumerate(mult):
            for _ in range(config.decoder_blocks):
                layers.append(ResBlock(width, config.decoder_channels * m, norm))
                width = config.decoder_channels * m
            if i < config.levels - wavelet:
                layers.append(Upsample(width))
        self.up = nn.Sequential(*layers)
        # differs from the paper: it does not say whether the SMC decoder keeps SD-VAE's group norm before the
        # last convolution; ours does not, because it would be the only statistic taken over the image
        self.norm_out = group_norm(width) if norm == "group" else nn.Identity()
        self.conv_out = nn.Conv2d(width, config.in_channels * (4 if wavelet else 1), 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """Everything before the last convolution."""
        return F.silu(self.norm_out(self.up(self.mid(self.conv_in(z)))))

    def head(self, features: Tensor) -> Tensor:
        """The last convolution and, for wavelet output, the inverse transform."""
        out = self.conv_out(features)
        return idwt2(2 * out, self.wavelet) if self.wavelet else out

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.features(z))


# ----------------------------------------------------------------------------
# initialisation


def init_encoder(encoder: nn.Module, latent_channels: int, unets=(UNet,), blocks=(ResBlock,)) -> None:
    """Starting values of an encoder whose aggregator ends in conv_out; `unets` and `blocks` are its parts."""
    for module in encoder.modules():
        if isinstance(module, unets):
            isometry(module.conv_in, module.conv_out)
        elif isinstance(module, blocks):
            isometry(module.skip)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    head = encoder.aggregator.conv_out
    isometry(head, outputs=latent_channels)
    nn.init.constant_(head.bias[latent_channels:], -6.0)


def init_smc_decoder(decoder: nn.Module, config: LiteVAEConfig, blocks=(ResBlock,)) -> None:
    isometry(decoder.conv_in, decoder.conv_out)
    if config.output == "wavelet":
        decoder.conv_out.weight.data /= 2                                # head() doubles its bands
    for module in decoder.modules():
        if isinstance(module, Upsample):
            isometry(module.conv)
        elif isinstance(module, blocks):
            isometry(module.skip)


def isometry(*convs: nn.Module, outputs: int | None = None) -> None:
    """Delta-orthogonal weights (Xiao et al. 2018): each pixel is rotated, none mixed with its neighbours.

    The variance per channel is kept. Channels from `outputs` on, if given, start at 0. Identities stay.
    """
    for conv in convs:
        if isinstance(conv, nn.Conv2d):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
            centre = conv.kernel_size[0] // 2
            tap = conv.weight.data[:outputs, :, centre, centre]          # (C', C)
            nn.init.orthogonal_(tap, gain=max(1.0, tap.shape[0] / tap.shape[1]) ** 0.5)


# ----------------------------------------------------------------------------
# the autoencoder


class Posterior(NamedTuple):
    """q(z|x), a diagonal Gaussian: mean and logvar (B, Z, h, w), fp32, logvar clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Posterior":
        """The posterior of an encoder's output (B, 2Z, h, w)."""
        mean, logvar = full_precision(moments).chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + sigma * noise, with noise ~ N(0, 1) of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class LatentScaling(NamedTuple):
    """The linear map between the decoder's latents and those that a diffusion model learns.

    The latter have mean 0 and standard deviation 1, over all elements or in each channel. Names and formulas
    are those of diffusers: z_model = (z - shift_factor) * scaling_factor. `encode` and `decode` of the
    autoencoder never scale.
    """

    shift: Tensor       # scalar, or (Z, 1, 1)
    factor: Tensor

    @classmethod
    def of(cls, latents: dict | None, per_channel: bool = False) -> "LatentScaling":
        """From the statistics that `latents.py stats` stores in a checkpoint, state["latents"].

        scaling_factor and shift_factor are used, or with per_channel latents_mean and latents_std. Raises
        ValueError if they are missing.
        """
        names = ("latents_mean", "latents_std") if per_channel else ("shift_factor", "scaling_factor")
        if latents is None or any(latents.get(name) is None for name in names):
            raise ValueError(f"no {' and '.join(names)} of the latents: compute them with latents.py stats")
        shift, factor = (torch.tensor(latents[name], dtype=torch.float32) for name in names)
        return cls(shift[:, None, None], 1 / factor[:, None, None]) if per_channel else cls(shift, factor)

    def scale(self, z: Tensor) -> Tensor:
        """Latents (..., Z, h, w) of the encoder -> those of the diffusion model."""
        return (z - self.shift.to(z.device)) * self.factor.to(z.device)

    def unscale(self, z: Tensor) -> Tensor:
        """Inverse of `scale`."""
        return z / self.factor.to(z.device) + self.shift.to(z.device)


class Autoencoder(nn.Module):
    """Encoder, Gaussian posterior, decoder. Parameters are fp32; autocast is the caller's.

    variants/ overrides the methods that make the parts, `encode` and `features`.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.make_parts()
        self.init_weights()

    def make_parts(self) -> None:
        self.encoder = LiteVAEEncoder(self.config)
        self.decoder = Decoder(self.config)

    def init_weights(self) -> None:
        """Starting values of the encoder and of SMC decoders; group-normalised ones keep torch's, as in LDM.

            main path of each UNet: conv_in, 1x1 skips, conv_out         isometry
            second conv of each UNet ResBlock                            0, as in ADM
            log-variance half of the encoder's last conv                 0, bias -6 (sigma 0.05)
            SMC decoder: conv_in, upsampling, 1x1 skips, conv_out        isometry
            SMC decoder: scales and gains                                1 (Eq. 3)

        torch's default shrinks a signal by sqrt(3) in each of the two dozen convolutions between input and
        output. Where no norm restores it, brightness and colour start out below the noise, and training
        first has to amplify them (docs/differences.md).
        """
        # differs from the paper: it states no initialisation
        init_encoder(self.encoder, self.config.latent_channels)
        if self.config.decoder_norm == "smc":
            init_smc_decoder(self.decoder, self.config)

    def encode(self, x: Tensor) -> Posterior:
        """Posterior of images x (B, C, H, W) in [-1, 1]; ValueError unless H and W are multiples of f."""
        self.check_size(x)
        return Posterior.of(self.encoder(x))

    def check_size(self, x: Tensor) -> None:
        f = self.config.downsample_factor
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not divisible by {f}: "
                f"crop or resize it so that both sides are multiples of {f}"
            )

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1] but not clamped, from latents z (B, Z, h, w)."""
        return self.decoder.head(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """The decoder's last features, before its last convolution."""
        return self.decoder.features(z)

    def forward(
        self, x: Tensor, noise: Tensor | None = None, with_features: bool = False,
        views: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ):  # fmt: skip
        """Reconstruct: (recon, posterior), in one call so that DistributedDataParallel sees all of it.

        noise (B, Z, h, w) ~ N(0, 1) samples the posterior; None decodes its mean. with_features adds the
        decoder's last features, from which the gradient of its last layer can be computed alone. views, a
        function of z, gives the latents to decode instead of z: the first becomes recon, the images of any
        others follow at the end.
        """
        posterior = self.encode(x)
        z = posterior.mean if noise is None else posterior.sample(noise)
        z, *others = views(z) if views else (z,)
        features = self.features(z.to(x.dtype))
        recon = self.decoder.head(features)
        images = [self.decode(other.to(x.dtype)) for other in others]
        return (recon, posterior, features, *images) if with_features else (recon, posterior, *images)

    def fold_smc(self) -> "Autoencoder":
        """Replace self-modulated convolutions by plain ones of equal output, in place, for inference."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SelfModulatedConv2d):
                    setattr(module, name, child.fold())
        return self


# ----------------------------------------------------------------------------
# presets and the table that `python model.py` prints

GROUP = dict(decoder_norm="group", decoder_attention=True)     # the decoder of the paper's tables, SD-VAE's
# fmt: off
PRESETS = {
    "litevae-s":          scale_config("S"),
    "litevae-b":          scale_config("B"),
    "litevae-m":          scale_config("M"),
    "litevae-l":          scale_config("L"),
    "litevae-b-f4":       scale_config("B", levels=2),
    "litevae-b-f16":      scale_config("B", levels=4),
    "litevae-b-nz4":      scale_config("B", latent_channels=4),
    "litevae-b-wavelet":  scale_config("B", output="wavelet"),
    "litevae-b-group":    scale_config("B", **GROUP),
    "demo":               scale_config("S", decoder_channels=24, decoder_blocks=1),
}
# fmt: on
PUBLISHED = {  # 1e6 encoder parameters, Table 2a, counted at n_z 4; 1e9 MACs
    "litevae-s": ("1.03", "-"), "litevae-b": ("6.75", "-"), "litevae-m": ("32.75", "-"),
    "litevae-l": ("41.42", "-"), "litevae-b-nz4": ("6.75", "-"),
}  # fmt: skip


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input (module on "meta")."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(shape, device="meta"))
    return counter.get_total_flops() // 2


def table(
    presets: dict[str, LiteVAEConfig] = PRESETS, published: dict[str, tuple[str, str]] = PUBLISHED,
    build: Callable[[LiteVAEConfig], Autoencoder] = Autoencoder, res: int = 256,
) -> str:  # fmt: skip
    """One row per preset: exact parameters, MACs at res x res, the latent's shape, what was published."""
    counted = ("encoder params", "decoder params", "encoder MACs", "decoder MACs")
    rows = [("preset", *counted, "latent", "published M", "published G")]
    for name, config in presets.items():
        with torch.device("meta"):
            model = build(config)
        nz, side = config.latent_channels, res // config.downsample_factor
        counts = (
            count_parameters(model.encoder),
            count_parameters(model.decoder),
            count_macs(model.encoder, 1, config.in_channels, res, res),
            count_macs(model.decoder, 1, nz, side, side),
        )
        rows.append((name, *(f"{c:,}" for c in counts), f"{nz}x{side}x{side}", *published.get(name, "--")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"MACs at {res}x{res}, batch 1; FLOPs are twice that"]
    for name, *cells in rows:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
