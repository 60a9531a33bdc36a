"""LiteVAE: a wavelet encoder, the Stable Diffusion decoder, and what the paper compares them with.

LiteVAE (Sadat et al., NeurIPS 2024, arXiv 2405.14477) replaces the convolutional encoder of the KL-f8 VAE
by a Haar transform, one small UNet per wavelet level (Sec. 4.1, App. F, G) and one that aggregates them; its
decoder swaps group normalisation for self-modulated convolutions (Eq. 3). This file also holds the SD-VAE
encoder (Rombach et al. 2022), so that one class trains and measures both.

What differs from the paper is marked `# differs from the paper:`. Exact parameter counts: `python model.py`.

Dimension key: B batch, C channels, H W pixels, Z latent channels, f = 2 ** levels, h w = H/f, W/f.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blocks import Attention, Downsample, ResBlock, SelfModulatedConv2d, Upsample, group_norm
from wavelets import dwt2, full_precision, idwt2

# ----------------------------------------------------------------------------
# configuration

# channel multiples of the SD encoder and of every decoder, finest first, by levels: LDM's kl-f4, -f8, -f16
PYRAMID_MULT = {2: (1, 2, 4), 3: (1, 2, 4, 4), 4: (1, 1, 2, 2, 4)}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that fixes an architecture. Plain values only: it travels inside every checkpoint."""

    encoder: str = "litevae"                   # "litevae" (wavelets and UNets) or "sd" (the KL-f8 pyramid)
    in_channels: int = 3                       # of the image; 3 for RGB, 1 for grey
    latent_channels: int = 12                  # n_z; the paper's main tables use 12, SD-VAE 4
    levels: int = 3                            # wavelet levels; the downsample factor is f = 2 ** levels
    extractor_channels: int = 32               # C and multiples of each F_l, Table 2a (here: scale B)
    extractor_mult: tuple[int, ...] = (1, 2, 3)
    aggregator_channels: int = 32              # C and multiples of F_agg
    aggregator_mult: tuple[int, ...] = (1, 2, 3)
    sd_channels: int = 128                     # width of the "sd" encoder
    decoder_channels: int = 128
    decoder_blocks: int = 3                    # ResBlocks per resolution of the decoder
    decoder_norm: str = "smc"                  # "smc" (Sec. 4.3, Table 4) or "group"
    decoder_attention: bool = False            # single-head attention in the middle of the decoder
    output: str = "image"                      # "image", or "wavelet": sub-bands at H/2, then an inverse DWT
    conv1x1: bool = False                      # 1x1 convs around the latent; Table 17: they hurt
    scale_factor: float = 1.0                  # diffusion latents are (z - shift_factor) * scale_factor
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        check_choice("encoder", self.encoder, ("litevae", "sd"))
        check_choice("decoder_norm", self.decoder_norm, ("smc", "group"))
        check_choice("output", self.output, ("image", "wavelet"))
        check_choice("levels", self.levels, tuple(PYRAMID_MULT))
        for name in ("in_channels", "latent_channels", "decoder_channels", "decoder_blocks", "sd_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def downsample_factor(self) -> int:
        return 2 ** self.levels

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
    pseudocode stores it and never uses it). (B, C, h, w) -> (B, C', h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, mult: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, []
        for m in mult:
            for _ in range(2):
                self.down.append(ResBlock(width, channels * m))
                width = channels * m
                skips.append(width)
        self.mid = nn.Sequential(ResBlock(width, width), ResBlock(width, width))
        for m in reversed(mult):
            for _ in range(2):
                self.up.append(ResBlock(width + skips.pop(), channels * m))
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
    keeps every band in [-1, 1].
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        bands, moments = 4 * config.in_channels, 2 * config.latent_channels
        self.extractors = nn.ModuleList(
            UNet(bands, bands, config.extractor_channels, config.extractor_mult) for _ in range(config.levels)
        )
        concat = config.levels * bands
        self.aggregator = UNet(concat, moments, config.aggregator_channels, config.aggregator_mult)

    def forward(self, x: Tensor) -> Tensor:
        features, low = [], x
        for level, extractor in enumerate(self.extractors, start=1):
            bands = dwt2(low)                                            # (B, 4C, H/2^l, W/2^l)
            low = bands[:, : x.shape[1]]
            feature = extractor((bands / 2**level).to(x.dtype))
            # differs from the paper: average pooling; App. G has a Downsample2D of unstated kind
            features.append(F.avg_pool2d(feature, 2 ** (len(self.extractors) - level)))
        return self.aggregator(torch.cat(features, dim=1))               # (B, 2Z, h, w)


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
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


# ----------------------------------------------------------------------------
# decoder


class Decoder(nn.Module):
    """SD-VAE's decoder, group-normalised or self-modulated. z (B, Z, h, w) -> (B, C, H, W).

    decoder_norm="smc" without attention takes no statistic over the image anywhere, so its output at a pixel
    depends only on a neighbourhood of z. output="wavelet" stops one upsampling earlier, predicts the four
    Haar bands of level 1 divided by 2, and inverts the transform (paper App. G).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        norm, wavelet = config.decoder_norm, config.output == "wavelet"
        self.wavelet = wavelet
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
        return idwt2(2 * out) if self.wavelet else out

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.features(z))


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
    """Encoder, Gaussian posterior, decoder. Parameters are fp32; autocast is the caller's choice."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        nz, conv1x1 = config.latent_channels, config.conv1x1
        self.encoder = LiteVAEEncoder(config) if config.encoder == "litevae" else SDEncoder(config)
        self.quant_conv = nn.Conv2d(2 * nz, 2 * nz, 1) if conv1x1 else nn.Identity()
        self.post_quant_conv = nn.Conv2d(nz, nz, 1) if conv1x1 else nn.Identity()
        self.decoder = Decoder(config)
        init_weights(self)

    def encode(self, x: Tensor) -> Posterior:
        """Posterior of images x (B, C, H, W) in [-1, 1]; ValueError unless H and W are multiples of f."""
        f = self.config.downsample_factor
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not divisible by {f}: "
                f"crop or resize it so that both sides are multiples of {f}"
            )
        mean, logvar = full_precision(self.quant_conv(self.encoder(x))).chunk(2, dim=1)
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
    """Starting values of the LiteVAE encoder and of the SMC decoder; all else keeps torch's, as LDM does.

        main path of each UNet: conv_in, 1x1 skips, conv_out         isometry
        second conv of each UNet ResBlock                            0, as in ADM
        log-variance half of the encoder's last conv                 0, bias -6 (sigma 0.05)
        SMC decoder: conv_in, upsampling, 1x1 skips, conv_out        isometry
        SMC decoder: scales and gains                                1 (Eq. 3)

    differs from the paper: it states no initialisation. torch's default shrinks a signal by sqrt(3) in each
    of the two dozen convolutions between input and output. Where no norm restores it, brightness and colour
    start out below the noise, and training first has to amplify them (README, "Differences").
    """
    if isinstance(model.encoder, LiteVAEEncoder):
        for unet in (*model.encoder.extractors, model.encoder.aggregator):
            isometry(unet.conv_in, unet.conv_out)
            for block in (*unet.down, *unet.mid, *unet.up):
                isometry(block.skip)
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(block.conv2.bias)
        head, nz = model.encoder.aggregator.conv_out, model.config.latent_channels
        isometry(head, outputs=nz)
        nn.init.constant_(head.bias[nz:], -6.0)
    if model.config.decoder_norm == "smc":
        isometry(model.decoder.conv_in, model.decoder.conv_out)
        if model.decoder.wavelet:
            model.decoder.conv_out.weight.data /= 2                      # head() doubles its bands
        for module in model.decoder.modules():
            if isinstance(module, (ResBlock, Upsample)):
                isometry(module.skip if isinstance(module, ResBlock) else module.conv)


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
    "litevae-b-group":    scale_config("B", decoder_norm="group", decoder_attention=True),
    "sd-vae":             AutoencoderConfig(encoder="sd", latent_channels=4, conv1x1=True,
                                            decoder_norm="group", decoder_attention=True),
}
# fmt: on


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input (module on "meta")."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(shape, device="meta"))
    return counter.get_total_flops() // 2


def table(res: int = 256) -> str:
    """One row per preset: exact parameters, MACs at res x res, and the latent's shape."""
    rows = [("preset", "encoder params", "decoder params", "encoder MACs", "decoder MACs", "latent")]
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
        rows.append((name, *(f"{c:,}" for c in counts), f"{nz}x{side}x{side}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"MACs at {res}x{res}, batch 1; FLOPs are twice that"]
    for name, *cells in rows:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
