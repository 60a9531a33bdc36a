"""Run: python -m pytest tests/test_openlitevae.py. Oracles: counts, tensor names and answers of the original.

The known answers are those of the original on weights made by a formula from each tensor's name, so that a
wrong name gives wrong weights and a wrong layout gives a wrong answer.
"""

import hashlib
import math
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor, nn

import checkpoint
from model import Autoencoder, SelfModulatedConv2d, count_macs, count_parameters
from variants.build import build
from variants.config import AutoencoderConfig
from variants.foreign import load_open_litevae
from variants.sizes import PRESETS

OPEN = dict(encoder="open-litevae", decoder="open-litevae")
TINY = dict(extractor_channels=16, extractor_mult=(1, 2), aggregator_channels=16, aggregator_mult=(1, 2),
            sd_channels=8, decoder_channels=8, decoder_blocks=1, latent_channels=5)  # fmt: skip


def tiny(**options) -> Autoencoder:
    torch.manual_seed(0)
    return build(AutoencoderConfig(**TINY | OPEN | options))


def on_meta(config: AutoencoderConfig) -> Autoencoder:
    with torch.device("meta"):
        return build(config)


# ------------------------------------------------------------------------------------------------------------
# counts and names

ENCODERS = {  # parameters of the encoder, of one extractor, of the aggregator; MACs of the encoder at 256
    "s": (977_084, 243_356, 247_016, 5_427_757_056),
    "b": (6_623_036, 1_653_932, 1_661_240, 37_096_128_512),
    "m": (34_125_596, 10_821_452, 1_661_240, 233_950_281_728),
    "l": (41_154_172, 10_821_452, 8_689_816, 241_138_139_136),
}


@pytest.mark.parametrize("scale", ENCODERS)
def test_encoder_counts(scale):
    """Parameters of the encoder and its parts, and multiply-accumulates, to the last one."""
    encoder = on_meta(PRESETS[f"open-litevae-{scale}"]).encoder
    parts = [count_parameters(part) for part in (encoder, encoder.extractors[0], encoder.aggregator)]
    assert (*parts, count_macs(encoder, 1, 3, 256, 256)) == ENCODERS[scale]
    assert len(encoder.extractors) == 3


@pytest.mark.parametrize("channels, parameters", [(12, 53_332_642), (4, 53_295_778)])
def test_decoder_counts(channels, parameters):
    """Parameters at 12 and 4 latent channels, multiply-accumulates at 256 for 12, and 31 modulated convs."""
    decoder = on_meta(AutoencoderConfig(decoder="open-litevae", latent_channels=channels)).decoder
    assert count_parameters(decoder) == parameters
    assert sum(isinstance(module, SelfModulatedConv2d) for module in decoder.modules()) == 31
    if channels == 12:
        assert count_macs(decoder, 1, 12, 32, 32) == 323_479_404_544


def their_name(name: str) -> str:
    return name.replace("skip", "residual_conv" if name.startswith("encoder") else "nin_shortcut")


def test_names_and_shapes_are_the_published_ones():
    """The sorted lines "name [shape]" of a scale S checkpoint have the sha256 of the original's 714."""
    state = on_meta(PRESETS["open-litevae-s"]).state_dict()
    lines = sorted(f"{their_name(name)} {list(tensor.shape) or [1]}" for name, tensor in state.items())
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert len(lines) == 714
    assert sha256 == "c4e293e53bd48f42546b226ec14a599cd4832c63428a65ed58913d9114fe1d4d"


# ------------------------------------------------------------------------------------------------------------
# known answers


def u01(index: np.ndarray, seed: int) -> np.ndarray:
    """A hash of each index to [0, 1), all in 32 bits: the generator of the known answers."""
    with np.errstate(over="ignore"):
        h = index.astype(np.uint32) * np.uint32(2654435761) + np.uint32(seed * 2246822519 % 2**32)
        h ^= h >> np.uint32(15)
        h *= np.uint32(2246822519)
        h ^= h >> np.uint32(13)
        h *= np.uint32(3266489917)
        h ^= h >> np.uint32(16)
    return h / 2.0**32


def formula_weight(name: str, shape: list[int]) -> Tensor:
    """Kaiming-uniform kernels, norms, scales and gains about 1, biases about 0; float32."""
    q = 2 * u01(np.arange(math.prod(shape)), zlib.crc32(name.encode())) - 1
    if len(shape) >= 2:
        q *= math.sqrt(6 / math.prod(shape[1:]))
    else:
        q = 1 + 0.1 * q if name.endswith(("norm1.weight", "norm2.weight", "scales", "gain")) else 0.05 * q
    return torch.from_numpy(q).float().reshape(shape)


def write_formula_checkpoint(path: Path, config: AutoencoderConfig) -> None:
    """A Lightning file under the real names, with what may stand beside the weights."""
    state = {}
    for name, tensor in on_meta(config).state_dict().items():
        key = their_name(name)
        state[key] = formula_weight(key, list(tensor.shape) or [1])
    state |= {"loss.discriminator.weight": torch.ones(2), "encoder_ema.conv_in": torch.ones(2)}
    torch.save({"state_dict": state, "global_step": 100_000, "epoch": 3}, path)


def pattern(side: int) -> Tensor:
    """The known answers' picture A, float64 (1, 3, side, side) in [-1, 1]."""
    y, x, c = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    picture = (4 * x + 3 * y + 40 * c + (x * x + 2 * y * y) // 16) % 256
    return torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def scale_s(tmp_path_factory) -> Autoencoder:
    """The whole of scale S, loaded from a file of 218 MB that does not stay, in float64."""
    path = tmp_path_factory.mktemp("open") / "last.ckpt"
    write_formula_checkpoint(path, PRESETS["open-litevae-s"])
    model, source = load_open_litevae(path)
    path.unlink()
    assert model.config == PRESETS["open-litevae-s"] and source["names"] == "open-LiteVAE"
    return model.double().requires_grad_(False)


def assert_close(tensor: Tensor, expected: list[float]) -> None:
    assert tensor.flatten().tolist() == pytest.approx(expected, rel=1e-7)


def test_random_numbers():
    """The generator gives the hashes that its description lists."""
    assert (u01(np.array([0, 1]), 0) * 2**32).tolist() == [0, 179721900]
    assert u01(np.array([12345]), 7) * 2**32 == 599265321


def test_encoder_s_known_answer(scale_s):
    """Moments of a 64x64 picture at scale S: shape, mean, deviation and eight values."""
    moments = scale_s.encoder(pattern(64))
    assert moments.shape == (1, 24, 8, 8)
    assert_close(torch.stack([moments.mean(), moments.std()]), [4.33705499, 156.42256511])
    assert_close(moments[0, :4, 0, 0], [40.16833474, 235.68159836, -92.93297942, 93.48052055])
    assert_close(moments[0, 20:24, 5, 6], [-40.64365336, 41.07234704, -38.80007398, -161.00091733])


def test_decoder_known_answer(scale_s):
    """The image of an 8x8 latent: shape, mean, deviation and six values."""
    z = torch.from_numpy(2 * u01(np.arange(12 * 64), 3) - 1).reshape(1, 12, 8, 8)
    image = scale_s.decoder(z)
    assert image.shape == (1, 3, 64, 64)
    assert_close(torch.stack([image.mean(), image.std()]), [1.62465166, 7.19703886])
    assert_close(image[0, :, 0, 0], [0.36699065, -0.23539872, -0.14134525])
    assert_close(image[0, :, 31, 32], [2.08363069, -4.14294491, -5.28248769])


def test_encoder_b_known_answer(tmp_path):
    """Scale B with four blocks and widths 32, 64, 96, behind a decoder of another width."""
    write_formula_checkpoint(tmp_path / "b.ckpt", AutoencoderConfig(
        **asdict(PRESETS["open-litevae-b"]) | dict(decoder_channels=4)))  # fmt: skip
    model, _ = load_open_litevae(tmp_path / "b.ckpt")
    assert model.config.decoder_channels == 4
    moments = model.double().requires_grad_(False).encoder(pattern(64))
    assert_close(torch.stack([moments.mean(), moments.std()]), [-21.54693852, 229.44174649])
    assert_close(moments[0, :4, 0, 0], [-38.49289762, 23.68816681, 108.75377349, 63.4147753])
    assert_close(moments[0, 20:24, 5, 6], [-113.89226366, -7.76648915, 125.95753678, -107.62921238])


# ------------------------------------------------------------------------------------------------------------
# behaviour


def test_bands_are_llvhd_and_unscaled():
    """Level l's extractor sees PyWavelets' cA, cV, cH, cD of the l-th level, as they are."""
    net, seen = tiny().double().requires_grad_(False), []
    for extractor in net.encoder.extractors:
        extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    low = torch.rand(1, 3, 32, 16, dtype=torch.float64) * 2 - 1
    net.encode(low)
    for bands in seen:
        low, (horizontal, vertical, diagonal) = pywt.dwt2(low, "haar")
        expected = np.concatenate([low, vertical, horizontal, diagonal], axis=1)
        assert bands.shape == expected.shape and np.abs(bands.numpy() - expected).max() < 1e-14
    assert len(seen) == 3


COMBINATIONS = [
    {}, dict(levels=2, in_channels=1), dict(levels=4, conv1x1=True),
    dict(extractor_blocks=1, aggregator_blocks=3), dict(encoder="litevae"), dict(encoder="sd"),
    dict(decoder="sd"), dict(decoder="sd", output="wavelet"),
    dict(decoder="sd", decoder_norm="group", decoder_attention=True),
]  # fmt: skip


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_trains_a_step_and_comes_back_from_a_checkpoint(options, tmp_path):
    """Each half goes with every other: all parameters get a gradient and move; load_model gives them back."""
    net = tiny(**options)
    f, channels = net.config.downsample_factor, net.config.in_channels
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)     # what starts at 0 closes a path
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    x = torch.rand(2, channels, 4 * f, 3 * f) * 2 - 1
    recon, posterior = net(x, torch.randn(2, 5, 4, 3))
    assert recon.shape == x.shape and posterior.mean.shape == (2, 5, 4, 3)
    (recon - x).square().mean().add(posterior.logvar.square().mean()).backward()
    torch.optim.Adam(net.parameters(), lr=1e-3).step()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        assert not torch.equal(parameter, before[name]), name
    state = dict(step=1, config=asdict(net.config), args={}, model=net.state_dict())
    checkpoint.save(tmp_path, state, keep=0)
    again, _ = checkpoint.load_model(tmp_path / "ckpt.pt")
    assert again.config == net.config
    assert torch.equal(again(x)[0], net.eval()(x)[0])


def test_folding_keeps_the_output():
    """Plain convolutions of equal output take the place of the modulated ones, in this decoder as in ours."""
    net = tiny().double().requires_grad_(False)
    z = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    expected = net.decode(z)
    assert (net.fold_smc().decode(z) - expected).abs().max() < 1e-12
    assert not any(isinstance(module, SelfModulatedConv2d) for module in net.modules())


def test_decoder_starts_at_the_size_of_its_input():
    """N(0, 1) latents come out with a deviation of order 1; torch's own initialisation leaves 0.03."""
    net = tiny(decoder_channels=32, latent_channels=12, decoder_blocks=3).requires_grad_(False)
    assert 0.5 < net.decode(torch.randn(2, 12, 8, 8)).std() < 2.5
    skip = net.decoder.up[1].block[0].skip.weight[:, :, 0, 0]            # (64, 128), orthonormal rows
    assert (skip @ skip.T - torch.eye(64)).abs().max() < 1e-5
    for module in net.decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    assert net.decode(torch.randn(2, 12, 8, 8)).std() < 0.1


@pytest.mark.parametrize("options, message", [
    (dict(decoder="vit"), "decoder must be one of sd, open-litevae, got 'vit'"),
    (dict(OPEN, extractor_channels=12), "needs widths that 8 divides, got .12, 24, 36, 32, 64, 96."),
    (dict(OPEN, aggregator_channels=4), "got .32, 64, 96, 4, 8, 12."),
    (dict(OPEN, aggregator_blocks=0), r"must be at least 1, got \(2, 0\)"),
    (dict(extractor_blocks=3), r"are 2 in litevae, got \(3, 2\)"),
    (dict(encoder="sd", aggregator_blocks=3), r"are 2 in sd, got \(2, 3\)"),
    (dict(OPEN, decoder_norm="group"), "it needs decoder_norm=smc, .* got group, False, image"),
    (dict(OPEN, decoder_attention=True), "got smc, True, image"),
    (dict(OPEN, output="wavelet"), "got smc, False, wavelet"),
])  # fmt: skip
def test_options_that_mean_nothing_here_are_refused(options, message):
    """Every field that the architecture cannot honour raises a ValueError with the value, none is dropped."""
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**options)
