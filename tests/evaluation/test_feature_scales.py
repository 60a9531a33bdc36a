"""Run: python -m pytest tests/test_feature_scales.py. Scales worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import equal

from evaluation.feature_scales import feature_norms, feature_scales, part_steps, table
from model import Autoencoder
from variants.build import build
from variants.config import AutoencoderConfig, scale_config


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small(**options) -> Autoencoder:
    torch.manual_seed(0)
    return build(scale_config("S", decoder_channels=8, decoder_blocks=1, **options))


def test_rows(images):
    """One per layer in order; features and gradients are those of the layer; the model stays as it was."""
    model = small()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rows = {row.name: row for row in feature_scales(model, images)}
    assert list(rows) == ["conv_in", "mid.0", "mid.1", *(f"up.{i}" for i in range(7)), "conv_out"]
    recon, posterior = model(images)
    first = model.decoder.conv_in(posterior.mean)
    assert rows["conv_in"].feature == pytest.approx(first.square().mean().sqrt().item(), rel=1e-5)
    assert rows["conv_out"].gradient == 1.0 and rows["conv_out"].branch is None
    assert equal(model.state_dict(), before) and all(p.grad is None for p in model.parameters())
    assert len(table(list(rows.values())).splitlines()) == 1 + len(rows)


def test_branch_and_largest(images):
    """A branch whose gain is 0 has ratio 0; among C channels of which one is not 0 the largest is sqrt(C)."""
    model = small()
    model.decoder.mid[0].conv2.gain.data.zero_()
    model.decoder.mid[0].conv2.conv.bias.data.zero_()
    model.decoder.conv_in.weight.data[1:] = 0
    rows = {row.name: row for row in feature_scales(model, images)}
    assert rows["mid.0"].branch == 0 and rows["mid.1"].branch > 0
    assert rows["conv_in"].largest == pytest.approx(32**0.5, rel=1e-5)


def test_step_of_the_last_layer(images):
    """By hand: conv_out's step moves each pixel by lr times the sum of its features and signs."""
    model = small()
    model.zero_grad()
    recon, posterior = model(images)
    features = model.decoder.features(posterior.mean)
    (images - recon).abs().mean().backward()
    conv = model.decoder.conv_out
    with torch.no_grad():
        moved = F.conv2d(features, conv.weight.grad.sign(), conv.bias.grad.sign(), padding=1)
        expected = (1e-3 * moved).square().mean().sqrt() / recon.square().mean().sqrt()
    last = feature_scales(model, images, lr=1e-3)[-1]
    assert last.step == last.scaled == pytest.approx(expected.item(), rel=1e-4)


def test_step_of_a_part(images):
    """The decoder's step moves the image further than its last layer's alone; scaling shortens it."""
    model = small()
    step, scaled = part_steps(model, images, "decoder")
    assert step > feature_scales(model, images)[-1].step and 0 < scaled < step


def test_blocks_of_other_decoders(images):
    """open-LiteVAE's blocks are rows with a branch, too."""
    torch.manual_seed(0)
    config = AutoencoderConfig(decoder="open-litevae", decoder_channels=8, decoder_blocks=1)
    rows = {row.name: row for row in feature_scales(build(config), images)}
    assert len(rows) == 2 + 3 + 4 + 3 and rows["mid.0"].branch > 0


def test_feature_norms(images):
    """By hand at the first layer: rms over channels, its maximum over its median, the first image's map."""
    model = small()
    result = feature_norms(model, images)
    assert result["layer"] == [row.name for row in feature_scales(model, images)]
    first = model.decoder.conv_in(model.encode(images).mean).square().mean(dim=1).sqrt()
    assert torch.allclose(result["pictures"][0], first[0]) and first[0].shape == (4, 4)
    ratios = [norms.max() / norms.median() for norms in first]
    assert result["peak"][0] == pytest.approx((sum(ratios) / 2).item(), rel=1e-5)
    assert result["pictures"][-1].shape == (32, 32) and all(peak >= 1 for peak in result["peak"])
    assert not any(module._forward_hooks for module in model.modules())
