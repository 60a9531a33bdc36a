"""Run: pytest tests/downstream/test_tiling.py. Tiled decodes equal whole ones; reach by hand and by NaN."""

import math

import pytest
import torch
from torch import Tensor, nn

from downstream import tiling
from downstream.tiling import decode_tiled, decode_tiles, encode_tiled, halo
from model import GROUP, Autoencoder
from variants.build import build
from variants.config import AutoencoderConfig, scale_config

SMALL = dict(extractor_channels=4, extractor_mult=(1,), aggregator_channels=4, aggregator_mult=(1,),
             latent_channels=3, decoder_channels=4)
OPEN = dict(encoder="open-litevae", decoder="open-litevae", latent_channels=3, decoder_channels=4)


def make(seed: int = 0, **options) -> Autoencoder:
    """A small autoencoder in eval mode whose every decoder weight matters; images have a scale of about 1."""
    torch.manual_seed(seed)
    model = build(AutoencoderConfig(**SMALL | options)).eval().requires_grad_(False)
    for conv in model.decoder.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    model.decoder.conv_out.weight.mul_(0.2)
    return model


def latent(model: Autoencoder, height: int, width: int, batch: int = 1) -> Tensor:
    weight = next(model.parameters())
    return torch.randn(batch, model.config.latent_channels, height, width, dtype=weight.dtype)


# ---- the reach ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, reach", [
    # LiteVAE, from the image back: conv_out and 3 blocks of 2 convolutions 7, upsampling's convolution 8,
    # halved 4; 4 + 6 + 1 = 11, halved 6; 6 + 6 + 1 = 13, halved 7; 7 + 6, middle 4, conv_in 1
    ({}, 18),
    (dict(decoder_blocks=1), 10),         # 3+1 -> 2, 2+2+1 -> 3, 3+2+1 -> 3, 3 + 2 + 4 + 1
    (dict(output="wavelet"), 18),         # 7 -> 0 + 7 + 1 -> 4 after the Haar blocks, and as above from there
    (dict(levels=2), 17),                 # 7 + 1 -> 4, 4 + 6 + 1 -> 6, 6 + 6 + 4 + 1
    (dict(levels=4, decoder_blocks=2), 14),      # 5+1 -> 3, +4+1 -> 4, +5 -> 5, +5 -> 5, 5 + 4 + 4 + 1
    (dict(conv1x1=True), 18),
    (OPEN | dict(extractor_channels=8, aggregator_channels=8), 20),   # one more convolution, one more block
])  # fmt: skip
def test_reach(options, reach):
    """By hand; and NaN in one latent pixel spoils the image to exactly that distance, in both directions."""
    model = make(**options)
    assert halo(model) == reach
    z, f = latent(model, 1, 2 * reach + 5), model.config.downsample_factor
    z[..., reach + 2] = math.nan
    spoilt = model.decode(z).isnan().any(dim=1).any(dim=1)[0].nonzero().flatten()
    low, high = reach + 2 - spoilt.min() / f, (spoilt.max() + 1) / f - (reach + 3)
    assert math.ceil(low) == math.ceil(high) == reach
    assert math.ceil(low) * f - low * f < f


def test_gradient_of_one_pixel():
    """Zero for latents beyond the reach, not zero at its edge: the first pixel of a block looks furthest."""
    model = make(levels=2, decoder_blocks=1).double()
    reach = halo(model)
    z = latent(model, 2 * reach + 5, 2 * reach + 5).requires_grad_()
    middle = reach + 2
    pixel = model.decode(z)[0, 0, 4 * middle, 4 * middle + 3]         # top right in its block
    touched = torch.autograd.grad(pixel, z)[0][0].abs().amax(dim=0) > 0
    rows, columns = touched.any(dim=1).nonzero().flatten(), touched.any(dim=0).nonzero().flatten()
    assert (rows.min(), columns.max()) == (middle - reach, middle + reach)
    assert rows.max() <= middle + reach and columns.min() >= middle - reach


@pytest.mark.parametrize("options, words", [
    (GROUP, "Attention and GroupNorm in this decoder"),
    (dict(decoder_norm="group"), "through GroupNorm in this decoder"),
    (dict(decoder_attention=True), "Attention and GroupNorm"),
    (dict(output="wavelet", wavelet="db2"), "inverse db2 transform joins opposite borders"),
])  # fmt: skip
def test_no_claim_of_exactness(options, words):
    """Statistics of the image, attention, and wavelets that wrap around: one line, from every function."""
    model = make(**options)
    z = latent(model, 4, 4)
    for call in (halo, lambda model: decode_tiled(model, z), lambda model: next(decode_tiles(model, z))):
        with pytest.raises(ValueError, match=words) as error:
            call(model)
        assert "\n" not in str(error.value) and "decode it whole" in str(error.value)


# ---- decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(levels=2), dict(levels=2, output="wavelet")])
@pytest.mark.parametrize("height, width, tile", [
    (3, 5, 8), (32, 32, 8), (37, 30, 8), (30, 61, 16), (50, 7, 5), (1, 90, 20), (40, 40, 64),
])  # fmt: skip
def test_tiled_equals_whole(options, height, width, tile):
    """Within 1e-5 in fp32, for sides that are no multiples of the tile, strips, and tiles above the image."""
    model = make(decoder_blocks=1, **options)
    z = latent(model, height, width, batch=2)
    whole = model.decode(z)
    assert 0.3 < whole.std() < 3
    torch.testing.assert_close(decode_tiled(model, z, tile), whole, rtol=0, atol=1e-5)


def test_default_layout_equals_whole():
    """The layout of LiteVAE, f8 and three blocks, on a strip of 90 latents."""
    model = make()
    z = latent(model, 2, 90)
    torch.testing.assert_close(decode_tiled(model, z, 20), model.decode(z), rtol=0, atol=1e-5)


def test_halo_is_needed(monkeypatch):
    """In float64 tiles agree to 1e-12; with one latent pixel less they differ by more than 1e-5."""
    model = make(levels=2, decoder_blocks=1).double()
    z, reach = latent(model, 30, 41), halo(model)
    whole = model.decode(z)
    out = torch.empty_like(whole)
    assert (decode_tiled(model, z, 8, out) - whole).abs().max() < 1e-12
    monkeypatch.setattr(tiling, "halo", lambda _: reach - 1)
    assert (decode_tiled(model, z, 8, out) - whole).abs().max() > 1e-5


def test_memory_does_not_grow():
    """The largest tensor in the decoder has the window's size, whatever the image's."""
    model = make(levels=2, decoder_blocks=1)
    seen: list[int] = []
    for conv in model.decoder.modules():
        conv.register_forward_hook(lambda _, inputs, output: seen.append(output.numel()))
    largest = []
    for side in (44, 60):
        seen.clear()
        decode_tiled(model, latent(model, side, side), 8)
        largest.append(max(seen))
    window = 8 + 2 * halo(model)
    assert largest[0] == largest[1] == 8 * (4 * window) ** 2          # 8 channels leave the last upsampling


def test_out():
    """The caller's tensor is filled and returned, in its own dtype; a tile covers each pixel once."""
    model = make(levels=2, decoder_blocks=1)
    z = latent(model, 9, 7)
    out = torch.full((1, 3, 36, 28), math.nan, dtype=torch.float64)
    assert decode_tiled(model, z, 4, out) is out
    torch.testing.assert_close(out.float(), model.decode(z), rtol=0, atol=1e-5)
    covered = torch.zeros(36, 28)
    for rows, columns, pixels in decode_tiles(model, z, 4):
        covered[rows, columns] += 1
        assert pixels.shape[-2:] == covered[rows, columns].shape
    assert (covered == 1).all()
    with pytest.raises(ValueError, match=r"out is \(1, 3, 36, 36\), the image .* is \(1, 3, 36, 28\)$"):
        decode_tiled(model, z, 4, torch.empty(1, 3, 36, 36))
    with pytest.raises(ValueError, match="at least 1 latent pixel, got 0"):
        decode_tiled(model, z, 0)


# ---- encoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (40, 200), (136, 72)])
def test_tiled_encoding_of_local_encoder(height, width):
    """An encoder that sees 8 x 8 blocks (Haar bands, App. B) gives the same moments in tiles as whole."""
    model = build(AutoencoderConfig(encoder="dwt", decoder_channels=4, decoder_blocks=1)).eval()
    x = torch.rand(2, 3, height, width) * 2 - 1
    tiled, whole = encode_tiled(model, x, 64, 24), model.encode(x)
    torch.testing.assert_close(tuple(tiled), tuple(whole), rtol=0, atol=1e-5)


def test_tiled_encoding_is_approximate():
    """One tile is the whole; of several, each group norm sees another image, which moves latents a little."""
    torch.manual_seed(0)
    model = build(scale_config("S", decoder_channels=4, decoder_blocks=1)).eval()
    torch.nn.init.normal_(model.encoder.aggregator.conv_out.weight[:12], std=0.05)
    x = torch.rand(1, 3, 96, 96).mul(2).sub(1)
    with torch.no_grad():
        whole = model.encode(x).mean
    torch.testing.assert_close(encode_tiled(model, x, 96, 32).mean, whole, rtol=0, atol=1e-6)
    gap = (encode_tiled(model, x, 64, 32).mean - whole).square().mean().sqrt()
    assert 1e-4 < gap < 0.3 * whole.std()


@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 64), (60, 8), (64, 12)])
def test_wrong_tiles(tile, overlap):
    """Tiles and overlaps are multiples of f, the overlap above 0 and below the tile."""
    model = make()
    with pytest.raises(ValueError, match=f"multiples of 8 with 0 < overlap < tile, got {tile} and {overlap}"):
        encode_tiled(model, torch.zeros(1, 3, 128, 128), tile, overlap)
    with pytest.raises(ValueError, match="not divisible by 8"):
        encode_tiled(model, torch.zeros(1, 3, 100, 128), 64, 32)


def test_codebook_is_not_blended():
    """Blends of codebook entries are no entries."""
    model = make(codebook_size=4)
    with pytest.raises(ValueError, match="codebook"):
        encode_tiled(model, torch.zeros(1, 3, 128, 128), 64, 32)
