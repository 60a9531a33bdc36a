"""Run: python -m pytest tests/test_ablations.py. Oracles: FIGURES.md's integers, PyWavelets, NumPy."""

from dataclasses import asdict

import numpy as np
import pytest
import pywt
import torch
from torch import nn

import checkpoint
from losses import kl_loss
from model import Autoencoder, ResBlock, count_macs, count_parameters
from variants.ablations import AblatedEncoder, LearnedPool, NAFBlock, ViTAggregator, ViTBlock, WaveletEncoder
from variants.build import build
from variants.config import AutoencoderConfig, scale_config

TINY = dict(extractor_channels=8, extractor_mult=(1, 2), aggregator_channels=8, aggregator_mult=(1, 2),
            sd_channels=8, decoder_channels=8, decoder_blocks=1, latent_channels=5)  # fmt: skip
OPTIONS = {
    "shared": dict(shared_extractor=True),
    "last two": dict(first_level=2),
    "last": dict(first_level=3),
    "nafnet": dict(extractor="nafnet"),
    "vit": dict(aggregator="vit", resolution=32),
    "conv": dict(downsample="conv"),
    "dropout": dict(dropout=0.5),
    "db4": dict(wavelet="db4"),
    "db2 output": dict(wavelet="db2", output="wavelet"),
    "dwt": dict(encoder="dwt", latent_channels=12),
    "dwt2": dict(encoder="dwt2", latent_channels=48, wavelet="db2"),
    "codebook": dict(codebook_size=8),
    "all at once": dict(extractor="nafnet", shared_extractor=True, first_level=2, downsample="conv",
                        aggregator="vit", resolution=32, dropout=0.1, wavelet="db2", output="wavelet",
                        conv1x1=True, codebook_size=8, codebook_update="ema"),
}  # fmt: skip


def tiny(**options) -> Autoencoder:
    """A small model with random parameters, those that start at 0 or 1 too, so that no path is closed."""
    torch.manual_seed(0)
    net = build(AutoencoderConfig(**TINY | options))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def max_error(a: torch.Tensor, b) -> float:
    b = torch.as_tensor(b)
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def encoder(scale: str, **options) -> AblatedEncoder:
    with torch.device("meta"):
        return AblatedEncoder(scale_config(scale, **options))


# ------------------------------------------------------------------------------------------------------------
# counts

LEARNED = {  # FIGURES.md 1, "patchify k=f": at n_z 4 and 12
    "S": (1_038_596, 1_040_916),
    "B": (6_753_540, 6_758_164),
    "M": (32_753_028, 32_757_652),
    "L": (41_425_284, 41_434_516),
}


@pytest.mark.parametrize("scale", LEARNED)
def test_learned_downsampling_counts(scale):
    """FIGURES.md's count for each scale; for L at n_z 4 that is the 41.425 M of the paper's Table 3."""
    for nz, expected in zip((4, 12), LEARNED[scale], strict=True):
        assert count_parameters(encoder(scale, downsample="conv", latent_channels=nz)) == expected


def test_counts_of_fewer_extractors():
    """B less the extractors left out, to the last parameter (FIGURES.md 1: one has 1,686,220).

    Without level 1 the first convolution of the aggregator reads 12 channels less, and its MACs at 256 are
    those of levels 2, 3 and the aggregator.
    """
    assert count_parameters(encoder("B", shared_extractor=True)) == 6_755_260 - 2 * 1_686_220
    last_two = encoder("B", first_level=2)
    assert count_parameters(last_two) == 6_755_260 - 1_686_220 - 12 * 9 * 32
    assert count_macs(last_two, 1, 3, 256, 256) == pytest.approx((6.878 + 1.719 + 1.730) * 1e9, rel=5e-4)
    both = encoder("B", shared_extractor=True, first_level=2)
    assert count_parameters(both) == 6_755_260 - 2 * 1_686_220 - 12 * 9 * 32
    # the same work, with one network instead of three
    assert count_macs(encoder("B", shared_extractor=True), 1, 3, 256, 256) == 37_837_471_744


def test_vit_count():
    """Ours is of the paper's 0.84 M class at its n_z 4 and 128 px; the formula for any n_z and side."""
    by_hand = lambda nz, side: (  # noqa: E731
        36 * 128 + 128 + side**2 * 128 + 4 * (12 * 128**2 + 13 * 128) + 9 * 128 * 2 * nz + 2 * nz)
    for nz, resolution in ((4, 128), (12, 128), (12, 256)):
        whole = encoder("B", latent_channels=nz, aggregator="vit", resolution=resolution)
        assert count_parameters(whole.aggregator) == by_hand(nz, resolution // 8)
    assert by_hand(4, 16) == 839_816 and f"{839_816 / 1e6:.2f}" == "0.84"


def test_nafnet_counts():
    """A block of width C has 7 C^2 + 33 C parameters and a 1x1 skip; B's extractor has 638,220 (ours)."""
    for width in (8, 96):
        assert count_parameters(NAFBlock(width, width)) == 7 * width**2 + 33 * width
        skip = 2 * width * width + width
        assert count_parameters(NAFBlock(2 * width, width)) == 7 * width**2 + 33 * width + skip
    whole = encoder("B", extractor="nafnet")
    assert [count_parameters(extractor) for extractor in whole.extractors] == [638_220] * 3
    assert count_parameters(whole) == 3 * 638_220 + 1_696_600
    assert not any(isinstance(module, NAFBlock) for module in whole.aggregator.modules())


# ------------------------------------------------------------------------------------------------------------
# no learned encoder


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kind", ["dwt", "dwt2"])
def test_wavelet_code_is_that_of_pywavelets(kind, levels, wavelet):
    """Bands of the last level over 2^L; with dwt2 also the details of the one before, in blocks of 2x2."""
    nz = 12 if kind == "dwt" else 48
    config = dict(encoder=kind, levels=levels, latent_channels=nz, wavelet=wavelet)
    net = build(AutoencoderConfig(**TINY | config))
    x = images(2, 3, 48, 64, dtype=torch.float64)
    low, high, finer, *_ = pywt.wavedec2(x.numpy(), wavelet, mode="periodization", level=levels)
    expected = [np.concatenate([low, *high], axis=1) / 2**levels]
    if kind == "dwt2":
        bands = np.concatenate(finer, axis=1) / 2 ** (levels - 1)
        corners = [bands[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        expected.append(np.stack(corners, axis=2).reshape(2, 36, *low.shape[2:]))
    posterior = net.encode(x)
    assert max_error(posterior.mean, np.concatenate(expected, axis=1)) < 1e-13
    assert count_parameters(net.encoder) == 0 and posterior.mean.shape[1] == nz


def test_wavelet_code_is_certain():
    """Sigma is 3e-7, so that a sample decodes as the mean does; the KL has no gradient; x has one."""
    net = tiny(encoder="dwt2", latent_channels=48).requires_grad_(False)
    x = images(1, 3, 16, 16).requires_grad_()
    posterior = net.encode(x)
    assert (posterior.logvar == -30).all()
    noise = torch.randn_like(posterior.mean)
    assert max_error(posterior.sample(noise), posterior.mean.detach()) < 2e-6
    assert max_error(net(x, noise)[0], net(x)[0]) < 1e-4
    assert not net.encode(x.detach()).logvar.requires_grad
    net.decode(posterior.mean).sum().backward()
    assert (x.grad != 0).any() and kl_loss(*net.encode(x.detach())).isfinite()


def test_haar_code_stays_in_range():
    """White, stripes and noise in [-1, 1] give codes in [-1, 1], which white reaches (FIGURES.md trap 2)."""
    code = WaveletEncoder(3, "haar", details=True)
    stripes = (-1.0) ** torch.arange(32)
    for x in (torch.ones(32, 32), stripes.expand(32, 32), stripes[:, None].expand(32, 32), images(32, 32)):
        moments = code(x.expand(1, 3, 32, 32))
        assert moments.shape == (1, 96, 4, 4) and moments[:, :48].abs().max() <= 1.0
    assert code(torch.ones(1, 3, 8, 8))[:, :3].eq(1).all()


# ------------------------------------------------------------------------------------------------------------
# the parts by hand


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    """Over the last axis, with the module's weights."""
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return scaled * norm.weight.numpy() + norm.bias.numpy()


def linear(x: np.ndarray, layer: nn.Module) -> np.ndarray:
    """A linear layer or a 1x1 convolution over the last axis."""
    return x @ layer.weight.flatten(1).numpy().T + layer.bias.numpy()


def random_module(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module = module.double().requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module


def test_nafblock_by_hand():
    """Both branches in NumPy, channels last: norm, expand, depthwise, gate, attention, project; then FFN."""
    block = random_module(NAFBlock(3, 4))
    x = images(2, 3, 5, 6, dtype=torch.float64)
    y = linear(x.permute(0, 2, 3, 1).numpy(), block.skip)                            # (B, h, w, 4)
    h = linear(layer_norm(y, block.norm1), block.expand1)
    padded, kernel = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))), block.depthwise.weight[:, 0].numpy()
    h = sum(padded[:, i : i + 5, j : j + 6] * kernel[:, i, j] for i in range(3) for j in range(3))
    h = h + block.depthwise.bias.numpy()
    h = h[..., :4] * h[..., 4:]
    h = linear(h * linear(h.mean(axis=(1, 2), keepdims=True), block.attention), block.project1)
    y = y + h * block.scale1.flatten().numpy()
    h = linear(layer_norm(y, block.norm2), block.expand2)
    y = y + linear(h[..., :4] * h[..., 4:], block.project2) * block.scale2.flatten().numpy()
    assert max_error(block(x).permute(0, 2, 3, 1), y) < 1e-13


def test_vit_block_by_hand():
    """Attention with four heads and the MLP in NumPy, one sample and head at a time."""
    block = random_module(ViTBlock(8, dropout=0.0))
    x = images(2, 6, 8, dtype=torch.float64)
    y = x.numpy().copy()
    for b in range(2):
        q, k, v = np.split(linear(layer_norm(y[b], block.norm1), block.qkv), 3, axis=-1)
        heads = []
        for head in range(4):
            part = slice(2 * head, 2 * head + 2)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(2))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
        y[b] += linear(np.concatenate(heads, axis=1), block.proj)
    h = torch.from_numpy(linear(layer_norm(y, block.norm2), block.fc1))
    gelu = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    assert max_error(block(x), y + linear(gelu.numpy(), block.fc2)) < 1e-13


def test_vit_knows_positions():
    """Two positions exchanged in the input are not just exchanged in the output, because of the embedding."""
    vit = random_module(ViTAggregator(6, 4, channels=2, side=4, dropout=0.0))
    vit.conv_out = nn.Identity()
    x = images(1, 6, 4, 4, dtype=torch.float64)
    swapped = x.transpose(2, 3)
    assert max_error(vit(swapped).transpose(2, 3), vit(x)) > 0.01
    vit.position.zero_()
    assert max_error(vit(swapped).transpose(2, 3), vit(x)) < 1e-13


def test_learned_pool_starts_as_pooling():
    """Before training its output is that of average pooling; it reads every pixel of a block."""
    pool = LearnedPool(3, 4)
    x = images(2, 3, 8, 12).requires_grad_()
    assert max_error(pool(x), x.detach().unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-2, -1))) < 1e-6
    pool(x)[:, 1].sum().backward()
    assert x.grad[:, 1].ne(0).all() and not x.grad[:, [0, 2]].any()


def test_levels_that_are_used():
    """first_level=2 of 3: with the networks taken out, levels 2 and 3 of PyWavelets' cascade and no other."""
    net = AblatedEncoder(AutoencoderConfig(**TINY, first_level=2, wavelet="db2"))
    assert len(net.extractors) == 2
    net.extractors, net.aggregator = nn.ModuleList([nn.Identity(), nn.Identity()]), nn.Identity()
    x = images(2, 3, 32, 48, dtype=torch.float64)
    low, high3, high2, _ = pywt.wavedec2(x.numpy(), "db2", mode="periodization", level=3)
    low2 = pywt.wavedec2(x.numpy(), "db2", mode="periodization", level=2)[0]
    level2 = np.concatenate([low2, *high2], axis=1) / 4
    level2 = level2.reshape(2, 12, 4, 2, 6, 2).mean(axis=(3, 5))
    level3 = np.concatenate([low, *high3], axis=1) / 8
    assert max_error(net(x), np.concatenate([level2, level3], axis=1)) < 1e-13


def test_shared_extractor_sees_every_level():
    """One network, called once per level, with the inputs that three would see."""
    net, seen = tiny(shared_extractor=True).requires_grad_(False), []
    assert len(net.encoder.extractors) == 1
    net.encoder.extractors[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.encode(images(1, 3, 32, 32))
    assert [tuple(bands.shape) for bands in seen] == [(1, 12, 16, 16), (1, 12, 8, 8), (1, 12, 4, 4)]


@pytest.mark.parametrize("options", [{}, dict(extractor="nafnet"), dict(aggregator="vit", resolution=32)])
def test_dropout(options):
    """In training it changes the code, a function of torch's seed; in evaluation it is not there."""
    plain, net = tiny(**options), tiny(dropout=0.5, **options)
    net.load_state_dict(plain.state_dict())
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain.encode(x).mean
        draws = [torch.manual_seed(seed) and net.encode(x).mean for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1]) and max_error(draws[0], draws[2]) > 1e-3
        assert torch.equal(net.eval().encode(x).mean, expected)


def test_dropout_rate_in_a_block():
    """A quarter of what enters the second convolution is 0, the rest 4/3 as large: its mean stays."""
    block = ResBlock(4, 4, dropout=0.25)
    block.conv2, block.skip = nn.Identity(), nn.Conv2d(4, 4, 1).requires_grad_(False)
    nn.init.zeros_(block.skip.weight)
    nn.init.zeros_(block.skip.bias)
    x = images(4, 4, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped, whole = block(x), block.eval()(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] * 4 / 3, rtol=1e-5)


def test_wavelet_output_follows_the_wavelet():
    """output="wavelet" inverts the same wavelet: PyWavelets' inverse of twice the last layer's bands."""
    net, outputs = tiny(wavelet="db2", output="wavelet").double().requires_grad_(False), []
    net.decoder.conv_out.register_forward_hook(lambda module, args, out: outputs.append(out))
    recon = net.decode(images(1, 5, 4, 3, dtype=torch.float64))
    low, *details = np.split(2 * outputs[0].numpy(), 4, axis=1)
    assert max_error(recon, pywt.idwt2((low, tuple(details)), "db2", mode="periodization")) < 1e-13


# ------------------------------------------------------------------------------------------------------------
# every option in the autoencoder


@pytest.mark.parametrize("name", OPTIONS)
def test_option_changes_the_model(name):
    """Parameters or the code differ from the default's, and shapes are right."""
    x, default, net = images(2, 3, 32, 32), tiny(), tiny(**OPTIONS[name])
    with torch.no_grad():
        recon, posterior = net(x)
        torch.manual_seed(0)
        code = default.encode(x).mean
    same_size = [p.shape for p in net.parameters()] == [p.shape for p in default.parameters()]
    assert not same_size or max_error(posterior.mean, code) > 1e-3
    assert recon.shape == x.shape and posterior.mean.shape == (2, net.config.latent_channels, 4, 4)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_gets_a_gradient(name):
    """Each one that is trained, through reconstruction and posterior."""
    net = tiny(**OPTIONS[name])
    x = images(2, 3, 32, 32).requires_grad_()
    recon, posterior = net(x, torch.randn(2, net.config.latent_channels, 4, 4))
    sum(part.square().mean() for part in (recon, *posterior) if part.is_floating_point()).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key
        else:
            assert key == "quantizer.codebook"


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoint_round_trip(name, tmp_path):
    """load_model rebuilds the network from the file alone, to the bit; a default model is told apart."""
    net = tiny(**OPTIONS[name]).eval()
    state = dict(step=1, config=asdict(net.config), args={}, model=net.state_dict(), ema=None)
    checkpoint.save(tmp_path, state, keep=0)
    rebuilt, loaded = checkpoint.load_model(tmp_path / "ckpt.pt")
    x = images(1, 3, 32, 32)
    assert rebuilt.config == net.config and torch.equal(rebuilt(x)[0], net(x)[0])
    with pytest.raises(ValueError, match="the flags ask for"):
        checkpoint.check_config(loaded, AutoencoderConfig(**TINY), "ckpt.pt")


@pytest.mark.parametrize("name", OPTIONS)
def test_bf16(name):
    """Under autocast the posterior is fp32, and where no entry is chosen anew, within 5% of fp32's."""
    net = tiny(**OPTIONS[name]).eval().requires_grad_(False)
    x = images(2, 3, 32, 32)
    exact = net.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = net(x)[1].mean
    assert mean.dtype == torch.float32
    if not net.config.codebook_size:
        assert ((mean - exact.mean).norm() / exact.mean.norm()).item() < 0.05


@pytest.mark.parametrize("options", [dict(extractor="nafnet"), dict(aggregator="vit", resolution=32),
                                     dict(downsample="conv", shared_extractor=True), dict(wavelet="db2")])
def test_starts_as_a_linear_map(options):
    """As the default: the branches start at 0, so the first mean is linear in the image, and sigma 0.05."""
    torch.manual_seed(0)
    net = build(AutoencoderConfig(**TINY | options)).double().requires_grad_(False)
    x, y = images(2, 1, 3, 32, 32, dtype=torch.float64)
    (a, logvar), (b, _), (mixed, _) = net.encode(x), net.encode(y), net.encode(0.7 * x + 0.3 * y)
    assert max_error(mixed, 0.7 * a + 0.3 * b) < 1e-13 and a.std() > 0.01
    assert max_error(logvar, torch.full_like(logvar, -6.0)) < 0.05


# ------------------------------------------------------------------------------------------------------------
# mistakes


def test_vit_takes_one_size():
    """Any other size is refused with both sizes; a plain aggregator takes it."""
    with pytest.raises(ValueError, match="image size 32x48: this model has a ViT aggregator, .* only 32x32"):
        tiny(aggregator="vit", resolution=32)(torch.zeros(1, 3, 32, 48))
    assert tiny()(torch.zeros(1, 3, 32, 48))[0].shape == (1, 3, 32, 48)


@pytest.mark.parametrize("options, message", [
    (dict(extractor="resnet"), "extractor must be one of unet, nafnet, got 'resnet'"),
    (dict(aggregator="mlp"), "aggregator must be one of unet, vit, got 'mlp'"),
    (dict(downsample="max"), "downsample must be one of pool, conv, got 'max'"),
    (dict(wavelet="db1"), "wavelet must be one of haar, db2, .*, db8, got 'db1'"),
    (dict(first_level=4), "first_level must be one of 1, 2, 3, got 4"),
    (dict(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
    (dict(codebook_size=1), "codebook_size must be 0 .no codebook. or at least 2, got 1"),
    (dict(codebook_size=-8), "codebook_size must be .*, got -8"),
    (dict(codebook_size=8, codebook_update="adam"), "codebook_update must be one of gradient, ema, got"),
    (dict(codebook_update="ema"), "codebook_update=ema needs a codebook: set codebook_size"),
    (dict(aggregator="vit"), "got aggregator=vit and resolution=0"),
    (dict(resolution=128), "got aggregator=unet and resolution=128"),
    (dict(aggregator="vit", resolution=100), "resolution must be a multiple of 8, got 100"),
    (dict(encoder="dwt"), "encoder=dwt gives 12 latent channels for 3 .*, got latent_channels=5: set it to"),
    (dict(encoder="dwt2", in_channels=1), "encoder=dwt2 gives 16 latent channels for 1 of the image"),
    (dict(encoder="dwt", latent_channels=12, conv1x1=True), "conv1x1 belongs to a learned encoder, got enc"),
    (dict(encoder="dwt", latent_channels=12, codebook_size=8), "codebook_size belongs to a learned encoder"),
    (dict(encoder="sd", wavelet="db2"), "wavelet=db2 has nothing to act on: encoder=sd and output=image"),
    (dict(first_level=3, downsample="conv"), "downsample=conv has nothing to act on: first_level=3"),
    (dict(first_level=3, shared_extractor=True), "shared_extractor has nothing to act on: first_level=3"),
    (dict(encoder="sd", extractor="nafnet"), "extractor=nafnet needs encoder=litevae, got sd"),
    (dict(encoder="sd", shared_extractor=True), "shared_extractor=True needs encoder=litevae, got sd"),
    (dict(encoder="sd", first_level=2), "first_level=2 needs encoder=litevae, got sd"),
    (dict(encoder="sd", downsample="conv"), "downsample=conv needs encoder=litevae, got sd"),
    (dict(encoder="sd", dropout=0.1), "dropout=0.1 needs encoder=litevae, got sd"),
    (dict(encoder="dwt", aggregator="vit", resolution=32), "aggregator=vit needs encoder=litevae, got dwt"),
])  # fmt: skip
def test_wrong_options(options, message):
    """What is out of range or has no meaning together is one ValueError with what was given."""
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**TINY | options)
