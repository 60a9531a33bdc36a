"""Run: python -m pytest tests/test_model.py. Oracles: FIGURES.md's integers, diffusers, scipy, PyWavelets."""

import re
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import pywt
import torch
from diffusers import AutoencoderKL
from scipy.signal import correlate2d
from torch import nn

from model import (
    Autoencoder,
    Decoder,
    LatentScaling,
    LiteVAEEncoder,
    ResBlock,
    SelfModulatedConv2d,
    count_macs,
    count_parameters,
)
from variants import sizes
from variants.build import build
from variants.config import AutoencoderConfig, scale_config

SCALES = ("S", "B", "M", "L")
GROUP = dict(decoder_norm="group", decoder_attention=True)
# 12 channels, not 8: 32 does not divide them, and groups of 3 channels make true group norms
TINY = dict(extractor_channels=12, extractor_mult=(1, 2), aggregator_channels=12, aggregator_mult=(1, 2),
            sd_channels=12, decoder_channels=12, decoder_blocks=1, latent_channels=5)  # fmt: skip
VARIANTS = {
    "litevae": {},
    "group": GROUP,
    "attention": dict(decoder_attention=True),
    "wavelet": dict(output="wavelet"),
    "conv1x1": dict(conv1x1=True),
    "sd": dict(encoder="sd", conv1x1=True, **GROUP),
    "open": dict(encoder="open-litevae", decoder="open-litevae", extractor_channels=16,
                 aggregator_channels=16),
}


def tiny(**options) -> Autoencoder:
    """A small model with random parameters, those that start at 0 or 1 too, so that no path is closed."""
    torch.manual_seed(0)
    net = build(AutoencoderConfig(**TINY | options))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def on_meta(module: Callable[..., nn.Module], **options) -> nn.Module:
    with torch.device("meta"):
        return module(AutoencoderConfig(**options))


# ------------------------------------------------------------------------------------------------------------
# exact counts (FIGURES.md 0, 1, 3), all on the meta device

LITEVAE = {  # parameters of the encoder at n_z 12 and 4, of one extractor, of the aggregator at n_z 12
    "S": (1_038_012, 1_035_692, 258_204, 263_400),
    "B": (6_755_260, 6_750_636, 1_686_220, 1_696_600),
    "M": (32_754_748, 32_750_124, 10_352_716, 1_696_600),
    "L": (41_431_612, 41_422_380, 10_352_716, 10_373_464),
}
PAPER = {"S": "1.03", "B": "6.75", "M": "32.75", "L": "41.42"}     # millions, Table 2a
LITEVAE_MACS = {  # at n_z 12: 128, 256, 512; at n_z 4: 256
    "S": (1_439_514_624, 5_758_058_496, 23_032_233_984, 5_755_699_200),
    "B": (9_459_367_936, 37_837_471_744, 151_349_886_976, 37_832_753_152),
    "M": (55_997_464_576, 223_989_858_304, 895_959_433_216, 223_985_139_712),
    "L": (58_216_218_624, 232_864_874_496, 931_459_497_984, 232_855_437_312),
}
SD = {  # by n_z: encoder, decoder, decoder without attention, 1x1 convs, all with 1x1 convs
    4: (34_163_592, 49_490_179, 48_438_531, 72 + 20, 83_653_863),
    8: (34_200_464, 49_508_611, 48_456_963, 272 + 72, 83_709_419),
    12: (34_237_336, 49_527_043, 48_475_395, 600 + 156, 83_765_135),
    16: (34_274_208, 49_545_475, 48_493_827, 1_056 + 272, 83_821_011),
}
SD_MACS = {  # at 256, by n_z: encoder, decoder, decoder without attention where FIGURES.md has it
    4: (136_361_017_344, 311_093_624_832, 308_946_141_184),
    8: (136_398_766_080, 311_112_499_200, None),
    12: (136_436_514_816, 311_131_373_568, 308_983_889_920),
    16: (136_474_263_552, 311_150_247_936, None),
}


@pytest.mark.parametrize("scale", SCALES)
def test_litevae_encoder_parameters(scale):
    """The encoders of Table 2a, with parameter-free pooling, to the last parameter; so are their parts."""
    with torch.device("meta"):
        encoder = LiteVAEEncoder(scale_config(scale))
        encoder4 = LiteVAEEncoder(scale_config(scale, latent_channels=4))
    extractors = {count_parameters(extractor) for extractor in encoder.extractors}
    counted = (encoder, encoder4, encoder.extractors[0], encoder.aggregator)
    assert tuple(map(count_parameters, counted)) == LITEVAE[scale]
    assert len(encoder.extractors) == 3 and len(extractors) == 1
    if scale == "B":
        assert count_parameters(encoder4.aggregator) == 1_691_976        # the paper's 1.69 M


@pytest.mark.parametrize("scale", SCALES)
def test_litevae_encoder_macs(scale):
    """Multiply-accumulates at 128 and 512 for n_z 12 and at 256 for n_z 4; 256 for n_z 12 is in the table."""
    with torch.device("meta"):
        encoder = LiteVAEEncoder(scale_config(scale))
        encoder4 = LiteVAEEncoder(scale_config(scale, latent_channels=4))
    at128, _, at512, at256 = LITEVAE_MACS[scale]
    assert count_macs(encoder, 1, 3, 128, 128) == at128
    assert count_macs(encoder, 1, 3, 512, 512) == at512
    assert count_macs(encoder4, 1, 3, 256, 256) == at256


@pytest.mark.parametrize("nz", SD)
def test_sd_vae_counts(nz):
    """Encoder, decoder, 1x1 convolutions and whole SD-VAE: parameters, and MACs at 256."""
    whole = on_meta(build, latent_channels=nz, encoder="sd", conv1x1=True, **GROUP)
    plain = on_meta(Decoder, latent_channels=nz, decoder_norm="group")
    conv1x1 = count_parameters(whole.quant_conv) + count_parameters(whole.post_quant_conv)
    parts = [count_parameters(module) for module in (whole.encoder, whole.decoder, plain)]
    assert (*parts, conv1x1, count_parameters(whole)) == SD[nz]
    encoder, decoder, without_attention = SD_MACS[nz]
    assert count_macs(whole.encoder, 1, 3, 256, 256) == encoder
    assert count_macs(whole.decoder, 1, nz, 32, 32) == decoder
    if without_attention:
        assert count_macs(plain, 1, nz, 32, 32) == without_attention
    if nz == 4:
        assert count_macs(whole.encoder, 1, 3, 128, 128) == 33_888_927_744
        assert count_macs(whole.decoder, 1, 4, 16, 16) == 77_572_079_616


def test_smc_decoder_parameters():
    """No attention and no head norm by default; attention adds its 1,051,648 parameters."""
    assert count_parameters(on_meta(Decoder, latent_channels=4)) == 48_427_423
    assert count_parameters(on_meta(Decoder)) == 48_464_287
    assert count_parameters(on_meta(Decoder, decoder_attention=True)) == 48_464_287 + 1_051_648


def test_whole_litevae_parameters():
    """LiteVAE with the decoder of the paper's tables (group norm, attention), and its optional 1x1 convs."""
    for scale, total in zip(SCALES, (50_565_055, 56_282_303, 82_281_791, 90_958_655), strict=True):
        with torch.device("meta"):
            assert count_parameters(build(scale_config(scale, **GROUP))) == total
            assert count_parameters(build(scale_config(scale, conv1x1=True, **GROUP))) == total + 756


def test_table_prints_the_exact_integers():
    """`python model.py` prints parameters, MACs at 256 and latent shape of every preset, in full digits."""
    rows = {line.split()[0]: line.replace(",", "").split()[1:] for line in sizes.table().splitlines()[2:]}
    assert list(rows) == list(sizes.PRESETS)
    for scale in SCALES:
        encoder = LITEVAE[scale][0], LITEVAE_MACS[scale][1]
        expected = [encoder[0], 48_464_287, encoder[1], SD_MACS[12][2], "12x32x32", PAPER[scale], "-"]
        assert rows[f"litevae-{scale.lower()}"] == [str(value) for value in expected]
    sd = [*SD[4][:2], *SD_MACS[4][:2], "4x32x32", "34.16", "135.59"]
    assert rows["sd-vae"] == [str(value) for value in sd]
    assert rows["litevae-b-nz4"][:2] == ["6750636", "48427423"]
    assert rows["litevae-b-group"][1:4] == ["49527043", "37837471744", "311131373568"]
    assert rows["litevae-b-shared"][0] == str(6_750_636 - 2 * 1_686_220)
    assert rows["dwt2"] == ["0", rows["dwt2"][1], "0", rows["dwt2"][3], "48x32x32", "-", "-"]
    assert [rows[f"litevae-b-{f}"][4] for f in ("f4", "f16")] == ["12x64x64", "12x16x16"]


# ------------------------------------------------------------------------------------------------------------
# SD-VAE against diffusers


RENAMED = {
    "mid.0": "mid_block.resnets.0",
    "mid.1.norm": "mid_block.attentions.0.group_norm",
    "mid.1.proj": "mid_block.attentions.0.to_out.0",
    "mid.1": "mid_block.attentions.0",
    "mid.2": "mid_block.resnets.1",
    "skip": "conv_shortcut",
    "norm_out": "conv_norm_out",
}


def diffusers_key(name: str) -> str:
    """Our parameter name in diffusers' words; only `qkv` has no counterpart."""

    def block(match: re.Match) -> str:
        part, resnets = match[1], 2 if match[1] == "down" else 3
        level, slot = divmod(int(match[2]), resnets + 1)
        return f"{part}_blocks.{level}." + (f"resnets.{slot}" if slot < resnets else f"{part}samplers.0")

    name = re.sub(r"(down|up)\.(\d+)", block, name)
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def pair_with_diffusers(base: int, dtype: torch.dtype) -> tuple[Autoencoder, AutoencoderKL]:
    """The KL-f8 VAE twice, with the same random weights; norms get random weights too."""
    torch.manual_seed(0)
    peer = AutoencoderKL(
        block_out_channels=tuple(base * m for m in (1, 2, 4, 4)), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(dtype).requires_grad_(False)  # fmt: skip
    for parameter in peer.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    source = peer.state_dict()
    options = dict(sd_channels=base, decoder_channels=base, latent_channels=4)
    with torch.device("meta"):
        ours = build(AutoencoderConfig(encoder="sd", conv1x1=True, **options, **GROUP))
    weights = {}
    for name, parameter in ours.state_dict().items():
        keys = [diffusers_key(name)]
        if "qkv" in name:
            keys = [keys[0].replace("qkv", f"to_{letter}") for letter in "qkv"]
        weights[name] = torch.cat([source.pop(key) for key in keys]).reshape(parameter.shape)
    assert not source
    ours.load_state_dict(weights, assign=True)
    return ours.requires_grad_(False), peer


SMALL = pytest.param(32, torch.float64, 1e-13, id="small")
FULL_SIZE = pytest.param(128, torch.float32, 1e-5, id="full size")


@pytest.mark.parametrize("base, dtype, bound", [SMALL, FULL_SIZE])
def test_sd_vae_equals_diffusers(base, dtype, bound):
    """Same weights, same posterior and decoding, 1x1 convs included; small in float64, full size in fp32.

    Errors are relative: 1e-13 and 1e-5 of the norm of what is compared.
    """
    ours, peer = pair_with_diffusers(base, dtype)
    x = images(1, 3, 64, 48, dtype=dtype)
    (recon, posterior), expected = ours(x), peer.encode(x).latent_dist
    assert relative_error(posterior.mean, expected.mean) < bound
    assert relative_error(posterior.logvar, expected.logvar) < bound
    assert relative_error(recon, peer.decode(expected.mean).sample) < bound


# ------------------------------------------------------------------------------------------------------------
# self-modulated convolution (Eq. 3)


def smc_by_hand(x: np.ndarray, conv: SelfModulatedConv2d) -> np.ndarray:
    """Eq. 3 one sample and one filter at a time in float64, with scipy's correlation."""
    w, s = conv.conv.weight.detach().double().numpy(), conv.scales.detach().double().numpy()
    bias, gain = conv.conv.bias.detach().double().numpy(), conv.gain.item()
    out = np.empty((len(x), len(w), *x.shape[2:]))
    for b, j in np.ndindex(len(x), len(w)):
        filters = s[:, None, None] * w[j]
        filters = gain * filters / np.sqrt((filters**2).sum() + 1e-8)
        planes = [correlate2d(x[b, i], filters[i], mode="same") for i in range(len(filters))]
        out[b, j] = np.sum(planes, axis=0) + bias[j]
    return out


def random_smc(in_channels: int, out_channels: int) -> SelfModulatedConv2d:
    torch.manual_seed(0)
    conv = SelfModulatedConv2d(in_channels, out_channels)
    nn.init.normal_(conv.scales)
    nn.init.constant_(conv.gain, 1.7)
    return conv


def test_smc_equals_the_formula():
    """Eq. 3 by hand per sample in float64, with random scales of both signs and a gain."""
    conv = random_smc(3, 5).double()
    x = images(2, 3, 6, 7, dtype=torch.float64)
    assert max_error(conv(x), torch.from_numpy(smc_by_hand(x.numpy(), conv))) < 1e-14


def test_smc_block_equals_the_formula():
    """SiLU, SMC, SiLU, SMC, plus a 1x1 skip: no norm in between, nothing that depends on the batch."""
    torch.manual_seed(0)
    block = ResBlock(3, 4, norm="smc").double()
    x = images(2, 3, 6, 7, dtype=torch.float64)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    h = smc_by_hand(silu(smc_by_hand(silu(x.numpy()), block.conv1)), block.conv2)
    assert max_error(block(x), block.skip(x) + torch.from_numpy(h)) < 1e-14


def test_smc_filters_have_unit_norm_times_gain():
    """Each output filter has norm gain; how large the stored weight and scales are makes no difference."""
    conv = random_smc(8, 6).double()
    weight = conv.weight()
    norms = weight.flatten(1).norm(dim=1)
    assert max_error(norms, torch.full((6,), 1.7)) < 1e-6
    with torch.no_grad():
        conv.conv.weight *= 1000.0
        conv.scales *= 0.1
    assert max_error(conv.weight(), weight) < 1e-7


def test_smc_starts_with_unit_scales_and_gain():
    """Eq. 3's s and the gain are 1 at the start: C + 1 parameters more than the plain convolution."""
    conv = SelfModulatedConv2d(8, 6)
    assert torch.equal(conv.scales, torch.ones(8)) and conv.gain.item() == 1.0
    assert count_parameters(conv) - count_parameters(nn.Conv2d(8, 6, 3)) == 8 + 1


def test_smc_weight_is_fp32_under_autocast():
    """bf16 autocast changes no bit of the modulated weight; the convolution alone runs in bf16."""
    conv = random_smc(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight, out = conv.weight(), conv(images(1, 8, 5, 5))
    assert weight.dtype == torch.float32 and torch.equal(weight, conv.weight())
    assert out.dtype == torch.bfloat16
    exact = conv.weight()
    assert conv.bfloat16().weight().dtype == torch.float32
    assert max_error(conv.weight(), exact) < 1e-2       # what rounding the stored weight and scales costs


def test_fold_smc():
    """Folding leaves no self-modulated convolution, the same output to 1e-5, and plain parameters only."""
    net = tiny(conv1x1=True)
    for module in net.modules():
        if isinstance(module, SelfModulatedConv2d):
            nn.init.normal_(module.scales)
            nn.init.constant_(module.gain, 3.0)
    x = images(1, 3, 16, 24)
    recon, posterior = net(x)
    assert sum(isinstance(module, SelfModulatedConv2d) for module in net.modules()) == 12
    folded, _ = net.fold_smc()(x)
    assert folded.std() > 0.1 and max_error(folded, recon) < 1e-5
    assert not any(isinstance(module, SelfModulatedConv2d) for module in net.modules())
    assert not any("gain" in name or "scales" in name for name in net.state_dict())


# ------------------------------------------------------------------------------------------------------------
# the LiteVAE encoder


def test_level_inputs_are_scaled_haar_bands():
    """With the UNets taken out, the encoder is PyWavelets' cascade over 2^l, average-pooled to one size."""
    encoder = LiteVAEEncoder(AutoencoderConfig(**TINY))
    encoder.extractors = nn.ModuleList(nn.Identity() for _ in range(3))
    encoder.aggregator = nn.Identity()
    x = images(2, 3, 32, 24, dtype=torch.float64)
    low, expected = x.numpy(), []
    for level in (1, 2, 3):
        low, details = pywt.dwt2(low, "haar")
        bands = np.concatenate([low, *details], axis=1) / 2**level
        pool = 2 ** (3 - level)
        expected.append(bands.reshape(2, 12, 4, pool, 3, pool).mean(axis=(3, 5)))
    assert max_error(encoder(x), torch.from_numpy(np.concatenate(expected, axis=1))) < 1e-14


def test_level_inputs_stay_in_range():
    """Images in [-1, 1] give bands in [-1, 1] at every level, and extremes are reached, so 2^l is tight."""
    encoder = LiteVAEEncoder(AutoencoderConfig(**TINY))
    seen = []
    for extractor in encoder.extractors:
        extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    with torch.no_grad():
        for sign in (torch.ones(32, 32), (-1.0) ** x, (-1.0) ** y, (-1.0) ** (x + y), images(32, 32).sign()):
            encoder(sign.expand(1, 3, 32, 32))
    assert len(seen) == 15 and max(seen) <= 1.0
    assert seen[:3] == [1.0, 1.0, 1.0]                  # white, at levels 1, 2, 3
    assert seen[3] == seen[6] == seen[9] == 1.0         # the three kinds of stripe, at level 1


def test_unet_widths_and_skips():
    """App. G's widths for B, and each block on the way up sees the output of its mirror image as a skip."""
    config = scale_config("B", levels=2)
    unet = LiteVAEEncoder(config).extractors[0]
    widths = lambda blocks: [(b.conv1.in_channels, b.conv1.out_channels) for b in blocks]  # noqa: E731
    assert widths(unet.down) == [(32, 32), (32, 32), (32, 64), (64, 64), (64, 96), (96, 96)]
    assert widths(unet.mid) == [(96, 96), (96, 96)]
    assert widths(unet.up) == [(192, 96), (192, 96), (160, 64), (128, 64), (96, 32), (64, 32)]
    skips, inputs = [], []
    for down, up in zip(unet.down, unet.up, strict=True):
        down.register_forward_hook(lambda module, args, out: skips.append(out))
        up.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        unet(images(1, 12, 4, 4))
    for skip, entering in zip(reversed(skips), inputs, strict=True):
        assert torch.equal(entering[:, -skip.shape[1] :], skip)


# ------------------------------------------------------------------------------------------------------------
# the decoder


def reach(**options) -> tuple[torch.Tensor, torch.Tensor]:
    """Which output pixels, and which in the far corner, change with the latent at the top left corner."""
    torch.manual_seed(0)
    decoder = Decoder(AutoencoderConfig(decoder_channels=4, **options)).requires_grad_(False)
    z = torch.randn(1, 12, 32, 32)
    moved = z.clone()
    moved[..., 0, 0] += 10.0
    changed = (decoder(z) != decoder(moved)).any(dim=1)[0]
    return changed, changed[-8:, -8:]


def test_default_decoder_is_local():
    """The default decoder has no statistic over the image: beyond 17.25 latents nothing changes, bit by bit.

    Radius in latents: 11 convolutions at h, 7 at 2h, 7 at 4h, 8 at 8h.
    """
    changed, far = reach()
    assert changed[:64, :64].all() and not far.any()
    rows, columns = changed.any(dim=1).nonzero().max(), changed.any(dim=0).nonzero().max()
    assert 64 < max(rows, columns) <= 8 * (1 + 17.25)


@pytest.mark.parametrize("options", [dict(decoder_norm="group"), dict(decoder_attention=True)])
def test_other_decoders_are_not_local(options):
    """A group norm or an attention anywhere fails that check, so the check can fail."""
    _, far = reach(**options)
    assert far.any()


def test_wavelet_output_inverts_doubled_bands():
    """output="wavelet" predicts 4C bands at H/2; the image is PyWavelets' inverse of twice those."""
    net = tiny(output="wavelet").double()
    outputs = []
    net.decoder.conv_out.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        recon = net.decode(torch.randn(2, 5, 3, 2, dtype=torch.float64))
    assert outputs[0].shape == (2, 12, 12, 8) and recon.shape == (2, 3, 24, 16)
    low, *details = np.split(2 * outputs[0].numpy(), 4, axis=1)
    assert max_error(recon, torch.from_numpy(pywt.idwt2((low, tuple(details)), "haar"))) < 1e-14


# ------------------------------------------------------------------------------------------------------------
# the autoencoder


@pytest.mark.parametrize("encoder", ["litevae", "sd"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_shapes(levels, channels, encoder):
    """f = 4, 8, 16 for grey, RGB and four channels, not square; latents are (B, Z, H/f, W/f)."""
    net = tiny(encoder=encoder, levels=levels, in_channels=channels).requires_grad_(False)
    f = net.config.downsample_factor
    assert f == 2**levels
    x = images(2, channels, 48, 32)
    recon, posterior = net(x)
    assert recon.shape == x.shape
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 48 // f, 32 // f)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_encode_sample_decode(variant):
    """One call gives reconstruction and posterior: of the mean, or of mean + sigma * noise, decoded."""
    net = tiny(**VARIANTS[variant]).double().requires_grad_(False)
    x = images(2, 3, 16, 24, dtype=torch.float64)
    mean, logvar = net.encode(x)
    recon, posterior, features = net(x, with_features=True)
    assert torch.equal(posterior.mean, mean) and torch.equal(posterior.logvar, logvar)
    assert torch.equal(recon, net.decode(mean)) and torch.equal(recon, net.decoder.head(features))
    noise = torch.randn_like(mean)
    sampled, _ = net(x, noise)
    assert max_error(sampled, net.decode(mean + logvar.exp().sqrt() * noise)) < 1e-13
    assert max_error(sampled, recon) > 1e-3


def test_logvar_is_clamped():
    """Whatever the encoder says, logvar is in [-30, 20] (FIGURES.md trap 16); the mean is left alone."""
    net = tiny(conv1x1=True).requires_grad_(False)
    for bias, logvar in ((1e3, 20.0), (-1e3, -30.0)):
        net.quant_conv.bias.fill_(bias)
        posterior = net.encode(images(1, 3, 8, 16))
        assert (posterior.logvar == logvar).all() and (posterior.mean.abs() > 900).all()


def test_latent_scaling():
    """diffusers' formulas by hand, and what was scaled comes back, for images and for batches."""
    latents = dict(scaling_factor=0.5, shift_factor=3.0, latents_mean=[1.0, 2.0], latents_std=[4.0, 0.5])
    z = torch.tensor([5.0, 4.0]).view(2, 1, 1).expand(3, 2, 2, 2)
    for per_channel, expected in ((False, [1.0, 0.5]), (True, [1.0, 4.0])):
        scaling = LatentScaling.of(latents, per_channel)
        scaled = scaling.scale(z)
        assert torch.equal(scaled, torch.tensor(expected).view(2, 1, 1).expand(3, 2, 2, 2))
        assert torch.equal(scaling.scale(z[0]), scaled[0]) and torch.equal(scaling.unscale(scaled), z)
    for given, per_channel in ((None, False), ({"scaling_factor": 1.0, "shift_factor": 0.0}, True)):
        with pytest.raises(ValueError, match="no .* of the latents: compute them with latents.py stats"):
            LatentScaling.of(given, per_channel)


@pytest.mark.parametrize("per_channel", [False, True])
def test_scaled_latents_decode_to_the_same_image(per_channel):
    """encode, scale, unscale, decode equals encode, decode within 1e-6."""
    model, x = tiny().eval(), images(2, 3, 32, 32)
    scaling = LatentScaling.of(dict(scaling_factor=1.7, shift_factor=-0.3, latents_mean=[0.1, 0.2, -1, 0, 2],
                                    latents_std=[0.3, 1.5, 0.7, 1, 2]), per_channel)
    with torch.no_grad():
        z = model.encode(x).mean
        plain, scaled = model.decode(z), model.decode(scaling.unscale(scaling.scale(z)))
    assert z.std() > 0.1 and not torch.equal(scaling.scale(z), z)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("levels, size", [(3, (16, 20)), (3, (12, 16)), (2, (16, 18)), (4, (24, 16))])
def test_indivisible_sizes_are_refused(levels, size):
    """A side that f does not divide raises a ValueError with the size and f, for either encoder."""
    message = rf"image size {size[0]}x{size[1]} is not divisible by {2**levels}: .*multiples of {2**levels}$"
    for encoder in ("litevae", "sd"):
        with pytest.raises(ValueError, match=message):
            tiny(encoder=encoder, levels=levels)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_and_the_image_get_a_gradient(variant):
    """Reconstruction and posterior reach all parameters, and the image, through the wavelets (A3 #10)."""
    net = tiny(**VARIANTS[variant])
    x = images(2, 3, 32, 16).requires_grad_()
    recon, posterior = net(x, torch.randn(2, 5, 4, 2))
    (recon.square().mean() + posterior.mean.square().mean() + posterior.logvar.square().mean()).backward()
    assert (x.grad != 0).all() and x.grad.isfinite().all()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("encoder", ["litevae", "sd"])
def test_image_gradient_passes_gradcheck(encoder):
    """The derivative of the latent mean by the image, in float64, equals finite differences."""
    net = tiny(encoder=encoder, levels=2, latent_channels=1).double().requires_grad_(False)
    x = images(1, 3, 8, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net.encode(x).mean, x, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last_gives_the_same_numbers(variant):
    """Memory format changes neither reconstruction nor posterior."""
    net = tiny(**VARIANTS[variant]).double().requires_grad_(False)
    x = images(2, 3, 16, 24, dtype=torch.float64)
    recon, posterior = net(x)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert max_error(last[0], recon) < 1e-13 and max_error(last[1].mean, posterior.mean) < 1e-13


# ------------------------------------------------------------------------------------------------------------
# precision


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_autocast_is_close_and_keeps_fp32_parameters(variant):
    """Within 4% of fp32 (0.4% in each of 50 layers); parameters, gradients and the posterior stay fp32."""
    net = tiny(**VARIANTS[variant])
    x = images(2, 3, 16, 24)
    exact, exact_posterior = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recon, posterior = net(x)
    recon.float().square().mean().backward()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert 1e-3 < relative_error(recon, exact) < 0.04
    assert relative_error(posterior.mean, exact_posterior.mean) < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.006), (torch.bfloat16, 0.06)])
def test_half_precision_models_run(dtype, bound, variant):
    """model.half() and model.bfloat16() reconstruct within 0.6% and 6% of fp32; the posterior is fp32."""
    net = tiny(**VARIANTS[variant]).requires_grad_(False)
    x = images(2, 3, 16, 24)
    exact, _ = net(x)
    recon, posterior = net.to(dtype)(x.to(dtype))
    assert posterior.mean.dtype == torch.float32
    assert relative_error(recon, exact) < bound


# ------------------------------------------------------------------------------------------------------------
# initialisation


def test_unets_start_as_linear_maps():
    """Second convolutions start at 0: the first mean is a linear function of the image; sigma is 0.05."""
    torch.manual_seed(0)
    net = build(scale_config("S", decoder_channels=8)).double().requires_grad_(False)
    x, y = images(2, 1, 3, 32, 32, dtype=torch.float64)
    (a, logvar), (b, _), (mixed, _) = net.encode(x), net.encode(y), net.encode(0.7 * x - 0.4 * y)
    assert max_error(mixed, 0.7 * a - 0.4 * b) < 1e-15 and a.std() > 0.02
    assert max_error(logvar, torch.full_like(logvar, -6.0)) < 0.05


def test_smc_decoder_starts_at_the_size_of_its_input():
    """N(0, 1) latents come out with a deviation of order 1, where torch's own initialisation leaves 0.025."""
    torch.manual_seed(0)
    net = build(scale_config("S", decoder_channels=32)).requires_grad_(False)
    assert 0.5 < net.decode(torch.randn(2, 12, 8, 8)).std() < 2.0


def test_torchs_initialisation():
    """Every convolution is uniform within 1 / sqrt(inputs), torch's default, and not as in ours."""
    torch.manual_seed(0)
    net = build(AutoencoderConfig(**TINY, initialisation="torch"))
    torch.manual_seed(0)
    ours = build(AutoencoderConfig(**TINY))
    first = ours.encoder.extractors[0].conv_in.weight
    assert not torch.equal(net.encoder.extractors[0].conv_in.weight, first)
    for module in filter(lambda module: isinstance(module, nn.Conv2d), net.modules()):
        bound = module.weight[0].numel() ** -0.5                   # kaiming_uniform_ with a = sqrt(5)
        assert bound * 0.8 < module.weight.abs().max() <= bound



# ------------------------------------------------------------------------------------------------------------
# configuration


def test_scales_are_table_2a():
    """Channels and multiples of S, B, M, L; options override any field."""
    fields = ("extractor_channels", "extractor_mult", "aggregator_channels", "aggregator_mult")
    table = {scale: tuple(getattr(scale_config(scale), name) for name in fields) for scale in SCALES}
    assert table == {
        "S": (16, (1, 2, 2), 16, (1, 2, 2)),
        "B": (32, (1, 2, 3), 32, (1, 2, 3)),
        "M": (64, (1, 2, 4), 32, (1, 2, 3)),
        "L": (64, (1, 2, 4), 64, (1, 2, 4)),
    }
    assert scale_config("B") == AutoencoderConfig()
    assert scale_config("S", latent_channels=4).latent_channels == 4


@pytest.mark.parametrize("name", sizes.PRESETS)
def test_config_survives_a_checkpoint(name, tmp_path):
    """asdict gives plain values that weights_only loading takes and that rebuild an equal config."""
    config = sizes.PRESETS[name]
    torch.save(asdict(config), tmp_path / "config.pt")
    assert AutoencoderConfig(**torch.load(tmp_path / "config.pt", weights_only=True)) == config


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AutoencoderConfig(encoder="vit"), "encoder must be .* litevae, sd, dwt, .*, got 'vit'"),
        (lambda: AutoencoderConfig(decoder_norm="batch"), "decoder_norm must be .* smc, group, got 'batch'"),
        (lambda: AutoencoderConfig(output="bands"), "output must be one of image, wavelet, got 'bands'"),
        (lambda: AutoencoderConfig(levels=1), "levels must be one of 2, 3, 4, got 1"),
        (lambda: AutoencoderConfig(in_channels=0), "in_channels must be at least 1, got 0"),
        (lambda: AutoencoderConfig(latent_channels=0), "latent_channels must be at least 1, got 0"),
        (lambda: AutoencoderConfig(decoder_channels=-4), "decoder_channels must be at least 1, got -4"),
        (lambda: AutoencoderConfig(decoder_blocks=0), "decoder_blocks must be at least 1, got 0"),
        (lambda: AutoencoderConfig(sd_channels=0), "sd_channels must be at least 1, got 0"),
        (lambda: scale_config("XL"), "scale must be one of S, B, M, L, got 'XL'"),
    ],
)
def test_bad_config_names_the_value(call, message):
    """Whatever a user can get wrong raises a ValueError with the field, the choices and the value."""
    with pytest.raises(ValueError, match=message):
        call()
