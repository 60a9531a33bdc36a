"""LiteVAE: a wavelet encoder, the Stable Diffusion decoder, and what the paper compares them with.

LiteVAE (Sadat et al., NeurIPS 2024, arXiv 2405.14477) replaces the convolutional encoder of the KL-f8 VAE
by a Haar transform, one small UNet per wavelet level (Sec. 4.1, App. F, G) and one that aggregates them; its
decoder swaps group normalisation for self-modulated convolutions (Eq. 3). This file also holds the SD-VAE
encoder (Rombach et al. 2022), so that one class trains and measures both. The paper's other options are in
ablations.py, VQ-GAN's codebook in quantize.py, open-LiteVAE's two halves in openlitevae.py.

What differs from the paper is marked `# differs from the paper:`. Exact parameter counts: `python model.py`.

Dimension key: B batch, C channels, H W pixels, Z latent channels, f = 2 ** levels, h w = H/f, W/f.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ablations import LearnedPool, NAFBlock, ViTAggregator, WaveletEncoder, check_combinations
from blocks import Attention, Downsample, ResBlock, SelfModulatedConv2d, Upsample, group_norm
from openlitevae import OpenLiteVAEDecoder, OpenLiteVAEEncoder, PostNormBlock, check_options
from quantize import Quantized, VectorQuantizer
from wavelets import FILTERS, dwt2, full_precision, idwt2

# ----------------------------------------------------------------------------
# configuration

# channel multiples of the SD encoder and of every decoder, finest first, by levels: LDM's kl-f4, -f8, -f16
PYRAMID_MULT = {2: (1, 2, 4), 3: (1, 2, 4, 4), 4: (1, 1, 2, 2, 4)}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that fixes an architecture. Plain values only: it travels inside every checkpoint."""

    encoder: str = "litevae"                   # "litevae" (wavelets and UNets), "sd" (the KL-f8 pyramid),
                                               # "dwt" or "dwt2" (the wavelet bands themselves, App. B),
                                               # "open-litevae" (of openlitevae.py)
    in_channels: int = 3                       # of the image; 3 for RGB, 1 for grey
    latent_channels: int = 12                  # n_z; the paper's main tables use 12, SD-VAE 4
    levels: int = 3                            # wavelet levels; the downsample factor is f = 2 ** levels
    extractor_channels: int = 32               # C and multiples of each F_l, Table 2a (here: scale B)
    extractor_mult: tuple[int, ...] = (1, 2, 3)
    aggregator_channels: int = 32              # C and multiples of F_agg
    aggregator_mult: tuple[int, ...] = (1, 2, 3)
    extractor_blocks: int = 2                  # ResBlocks per width: 2 (App. G), 3 to 5 in open-LiteVAE
    aggregator_blocks: int = 2
    sd_channels: int = 128                     # width of the "sd" encoder
    decoder: str = "sd"                        # "sd" (Decoder, below) or "open-litevae"
    decoder_channels: int = 128
    decoder_blocks: int = 3                    # ResBlocks per resolution of the decoder
    decoder_norm: str = "smc"                  # "smc" (Sec. 4.3, Table 4) or "group"
    decoder_attention: bool = False            # single-head attention in the middle of the decoder
    output: str = "image"                      # "image", or "wavelet": sub-bands at H/2, then an inverse DWT
    conv1x1: bool = False                      # 1x1 convs around the latent; Table 17: they hurt
    wavelet: str = "haar"                      # of the encoder and of output="wavelet"; or db2 to db8
    extractor: str = "unet"                    # blocks of the extractors: "unet", or "nafnet" (D.3)
    shared_extractor: bool = False             # one extractor for all levels (D.4)
    first_level: int = 1                       # finer levels are left out; D.6, "the last two": 2
    downsample: str = "pool"                   # of the extractors' outputs: "pool", or "conv", learned
    aggregator: str = "unet"                   # "unet", or "vit" (D.5)
    resolution: int = 0                        # side of the images that a ViT is bound to, pixels
    dropout: float = 0.0                       # in the blocks of extractors and aggregator
    codebook_size: int = 0                     # entries of VQ-GAN's codebook; 0 is the Gaussian posterior
    codebook_update: str = "gradient"          # or "ema", a moving average of the encoder's outputs
    scale_factor: float = 1.0                  # diffusion latents are (z - shift_factor) * scale_factor
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        check_choice("encoder", self.encoder, ("litevae", "sd", "dwt", "dwt2", "open-litevae"))
        check_choice("decoder", self.decoder, ("sd", "open-litevae"))
        check_choice("decoder_norm", self.decoder_norm, ("smc", "group"))
        check_choice("output", self.output, ("image", "wavelet"))
        check_choice("levels", self.levels, tuple(PYRAMID_MULT))
        check_choice("wavelet", self.wavelet, tuple(FILTERS))
        check_choice("extractor", self.extractor, ("unet", "nafnet"))
        check_choice("first_level", self.first_level, tuple(range(1, self.levels + 1)))
        check_choice("downsample", self.downsample, ("pool", "conv"))
        check_choice("aggregator", self.aggregator, ("unet", "vit"))
        check_choice("codebook_update", self.codebook_update, ("gradient", "ema"))
        for name in ("in_channels", "latent_channels", "decoder_channels", "decoder_blocks", "sd_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_combinations(self)
        check_options(self)

    @property
    def downsample_factor(self) -> int:
        return 2 ** self.levels

    @property
    def moment_channels(self) -> int:
        """What the encoder gives: mean and log-variance, or with a codebook the code alone."""
        return self.latent_channels * (1 if self.codebook_size else 2)

    @property
    def pyramid_mult(self) -> tuple[int, ...]:
        return PYRAMID_MULT[self.levels]


SCALES = {  # paper Table 2a: (extractor C, multiples, aggregator C, multiples)
    "S": (16, (1, 2, 2), 16, (1, 2, 2)),
    "B": (32, (1, 2, 3), 32, (1, 2, 3)),
    "M": (64, (1, 2, 4), 32, (1, 2, 3)),
    "L": (64, (1, 2, 4), 64, (1, 2, 4)),
}


def scale_config(scale: str, **options) -> AutoencoderConfig:
    """The configuration of a paper scale, S, B, M or L; options override any field."""
    check_choice("scale", scale, tuple(SCALES))
    names = ("extractor_channels", "extractor_mult", "aggregator_channels", "aggregator_mult")
    return AutoencoderConfig(**dict(zip(names, SCALES[scale], strict=True)), **options)


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


# ----------------------------------------------------------------------------
# encoders


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

    x: (B, C, H, W) in [-1, 1] -> moments (B, 2Z, h, w). Level l sees its four bands divided by 2^l, which
    keeps every Haar band in [-1, 1].
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.wavelet = config.wavelet
        self.levels = range(config.first_level, config.levels + 1)
        bands, concat = 4 * config.in_channels, 4 * config.in_channels * len(self.levels)
        block = partial(NAFBlock if config.extractor == "nafnet" else ResBlock, dropout=config.dropout)
        self.extractors = nn.ModuleList(
            UNet(bands, bands, config.extractor_channels, config.extractor_mult, block)
            for _ in (self.levels[:1] if config.shared_extractor else self.levels)
        )
        # differs from the paper: average pooling; App. G has a Downsample2D of unstated kind
        pool = nn.AvgPool2d if config.downsample == "pool" else partial(LearnedPool, bands)
        factors = [2 ** (config.levels - level) for level in self.levels]
        self.pools = nn.ModuleList(pool(factor) if factor > 1 else nn.Identity() for factor in factors)
        self.aggregator = build_aggregator(config, concat)

    def forward(self, x: Tensor) -> Tensor:
        features, low = [], x
        for level in range(1, self.levels.stop):
            bands = dwt2(low, self.wavelet)                              # (B, 4C, H/2^l, W/2^l)
            low = bands[:, : x.shape[1]]
            if level in self.levels:
                index = level - self.levels.start
                extractor = self.extractors[index % len(self.extractors)]        # one of one if shared
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


class SDEncoder(nn.Module):
    """SD-VAE's encoder: 2 ResBlocks per resolution, mid attention. (B, C, H, W) -> (B, 2Z, h, w)."""

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


def build_encoder(config: AutoencoderConfig) -> nn.Module:
    """x (B, C, H, W) -> moments (B, 2Z, h, w), or (B, Z, h, w) with a codebook."""
    if config.encoder in ("dwt", "dwt2"):
        return WaveletEncoder(config.levels, config.wavelet, details=config.encoder == "dwt2")
    if config.encoder == "open-litevae":
        return OpenLiteVAEEncoder(config)
    return LiteVAEEncoder(config) if config.encoder == "litevae" else SDEncoder(config)


# ----------------------------------------------------------------------------
# decoder


class Decoder(nn.Module):
    """SD-VAE's decoder, group-normalised or self-modulated. z (B, Z, h, w) -> (B, C, H, W).

    decoder_norm="smc" without attention takes no statistic over the image anywhere, so its output at a pixel
    depends only on a neighbourhood of z. output="wavelet" stops one upsampling earlier, predicts the four
    wavelet bands of level 1 divided by 2, and inverts the transform (paper App. G).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
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


def build_decoder(config: AutoencoderConfig) -> nn.Module:
    """z (B, Z, h, w) -> (B, C, H, W), in two steps: features and head."""
    return Decoder(config) if config.decoder == "sd" else OpenLiteVAEDecoder(config)


# ----------------------------------------------------------------------------
# the autoencoder


class Posterior(NamedTuple):
    """q(z|x), a diagonal Gaussian: mean and logvar (B, Z, h, w), fp32, logvar clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + sigma * noise, with noise ~ N(0, 1) of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class Autoencoder(nn.Module):
    """Encoder, Gaussian posterior or codebook, decoder. Parameters are fp32; autocast is the caller's."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        nz, moments, conv1x1 = config.latent_channels, config.moment_channels, config.conv1x1
        self.encoder = build_encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if conv1x1 else nn.Identity()
        self.post_quant_conv = nn.Conv2d(nz, nz, 1) if conv1x1 else nn.Identity()
        self.decoder = build_decoder(config)
        self.quantizer = None
        if config.codebook_size:
            self.quantizer = VectorQuantizer(config.codebook_size, nz, config.codebook_update)
        init_weights(self)

    def encode(self, x: Tensor) -> Posterior | Quantized:
        """Posterior of images x (B, C, H, W) in [-1, 1]; ValueError unless H and W are multiples of f.

        With a ViT aggregator H and W are config.resolution, else ValueError. With a codebook the posterior's
        mean and all its samples are the nearest entries.
        """
        f = self.config.downsample_factor
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not divisible by {f}: "
                f"crop or resize it so that both sides are multiples of {f}"
            )
        side = self.config.resolution
        if side and x.shape[-2:] != (side, side):
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]}: this model has a ViT aggregator, which takes "
                f"{side}x{side} alone: crop or resize to that, or train with aggregator=unet"
            )
        moments = full_precision(self.quant_conv(self.encoder(x)))
        if self.quantizer is not None:
            return self.quantizer(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1] but not clamped, from latents z (B, Z, h, w)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Tensor | None = None, with_features: bool = False):
        """Reconstruct: (recon, posterior), in one call so that DistributedDataParallel sees all of it.

        noise (B, Z, h, w) ~ N(0, 1) samples the posterior; None decodes its mean. with_features adds the
        decoder's last features, from which losses.adaptive_weight takes the last layer's gradient.
        """
        posterior = self.encode(x)
        z = posterior.mean if noise is None else posterior.sample(noise)
        features = self.decoder.features(self.post_quant_conv(z.to(x.dtype)))
        recon = self.decoder.head(features)
        return (recon, posterior, features) if with_features else (recon, posterior)

    def fold_smc(self) -> "Autoencoder":
        """Replace self-modulated convolutions by plain ones of equal output, in place, for inference."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SelfModulatedConv2d):
                    setattr(module, name, child.fold())
        return self


# ----------------------------------------------------------------------------
# initialisation


def init_weights(model: Autoencoder) -> None:
    """Starting values of the LiteVAE encoder and of SMC decoders; all else keeps torch's, as LDM does.

        main path of each UNet: conv_in, 1x1 skips, conv_out         isometry (a ViT's: ablations.py)
        second conv of each UNet ResBlock                            0, as in ADM (a NAFBlock's: ablations.py)
        log-variance half of the encoder's last conv                 0, bias -6 (sigma 0.05)
        SMC decoder: conv_in, upsampling, 1x1 skips, conv_out        isometry
        SMC decoder: scales and gains                                1 (Eq. 3)

    differs from the paper: it states no initialisation. torch's default shrinks a signal by sqrt(3) in each
    of the two dozen convolutions between input and output. Where no norm restores it, brightness and colour
    start out below the noise, and training first has to amplify them (README, "Differences").
    """
    if isinstance(model.encoder, LiteVAEEncoder):
        for module in model.encoder.modules():
            if isinstance(module, (UNet, ViTAggregator)):
                isometry(module.conv_in, module.conv_out)
            elif isinstance(module, (ResBlock, NAFBlock)):
                isometry(module.skip)
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        head, nz = model.encoder.aggregator.conv_out, model.config.latent_channels
        isometry(head, outputs=nz)
        nn.init.constant_(head.bias[nz:], -6.0)
    if model.config.decoder_norm == "smc":
        isometry(model.decoder.conv_in, model.decoder.conv_out)
        if model.config.output == "wavelet":
            model.decoder.conv_out.weight.data /= 2                      # head() doubles its bands
        for module in model.decoder.modules():
            if isinstance(module, (ResBlock, PostNormBlock, Upsample)):
                isometry(module.conv if isinstance(module, Upsample) else module.skip)


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
# presets and the table that `python model.py` prints

GROUP = dict(decoder_norm="group", decoder_attention=True)     # the decoder of the paper's tables, SD-VAE's
SD_VAE = dict(encoder="sd", conv1x1=True, **GROUP)
OPEN = dict(encoder="open-litevae", decoder="open-litevae")
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
    "litevae-b-nafnet":   scale_config("B", extractor="nafnet", **GROUP),                        # D.3
    "litevae-b-shared":   scale_config("B", shared_extractor=True, latent_channels=4, **GROUP),  # D.4
    "litevae-b-vit":      scale_config("B", aggregator="vit", resolution=256, **GROUP),          # D.5
    "litevae-b-last2":    scale_config("B", first_level=2, latent_channels=4, **GROUP),          # D.6
    "litevae-l-conv":     scale_config("L", downsample="conv", latent_channels=4, **GROUP),      # Table 3
    "dwt":                AutoencoderConfig(encoder="dwt", **GROUP),                             # App. B
    "dwt2":               AutoencoderConfig(encoder="dwt2", latent_channels=48, **GROUP),
    "vae-nz12":           AutoencoderConfig(encoder="sd", **GROUP),
    "open-litevae-s":     scale_config("S", extractor_blocks=3, aggregator_blocks=3, **OPEN),
    "open-litevae-b":     scale_config("B", extractor_blocks=4, aggregator_blocks=4, **OPEN),
    "open-litevae-m":     scale_config("M", extractor_blocks=5, aggregator_blocks=4, **OPEN),
    "open-litevae-l":     scale_config("L", extractor_blocks=5, aggregator_blocks=4, **OPEN),
    "sd-vae":             AutoencoderConfig(latent_channels=4, **SD_VAE),
    "sd-kl-f4":           AutoencoderConfig(latent_channels=3, levels=2, **SD_VAE),
    "transfusion-f8d8":   AutoencoderConfig(latent_channels=8, **SD_VAE),
    "vq-f8":              AutoencoderConfig(latent_channels=4, codebook_size=16_384, **SD_VAE),
    "vq-f4":              AutoencoderConfig(latent_channels=3, levels=2, codebook_size=8_192, **SD_VAE),
    "demo":               scale_config("S", decoder_channels=16, decoder_blocks=1),
}
# fmt: on


# as published: millions of parameters and 1e9 MACs, encoder or encoder/decoder. LiteVAE's Tables 2a and 3
# count at n_z 4; open-LiteVAE's README, of S and B without group norms. Both say FLOPs and mean MACs
PUBLISHED = {
    "litevae-s": ("1.03", "-"), "litevae-b": ("6.75", "-"), "litevae-m": ("32.75", "-"),
    "litevae-l": ("41.42", "-"), "litevae-b-nz4": ("6.75", "-"), "litevae-l-conv": ("41.425", "-"),
    "sd-vae": ("34.16", "135.59"),
    "open-litevae-s": ("0.97/53.33", "5.5/324"), "open-litevae-b": ("6.60/53.33", "37.4/324"),
    "open-litevae-m": ("34.00/53.33", "234.9/324"), "open-litevae-l": ("41.15/53.33", "242.1/324"),
}  # fmt: skip


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input (module on "meta")."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(shape, device="meta"))
    return counter.get_total_flops() // 2


def table(res: int = 256) -> str:
    """One row per preset: exact parameters, MACs at res x res, the latent's shape, what was published."""
    counted = ("encoder params", "decoder params", "encoder MACs", "decoder MACs")
    rows = [("preset", *counted, "latent", "published M", "published G")]
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Autoencoder(config)
        nz, side = config.latent_channels, res // config.downsample_factor
        counts = (
            count_parameters(model.encoder),
            count_parameters(model.decoder),
            count_macs(model.encoder, 1, config.in_channels, res, res),
            count_macs(model.decoder, 1, nz, side, side),
        )
        published = PUBLISHED.get(name, ("-", "-"))
        rows.append((name, *(f"{c:,}" for c in counts), f"{nz}x{side}x{side}", *published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"MACs at {res}x{res}, batch 1; FLOPs are twice that"]
    for name, *cells in rows:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
