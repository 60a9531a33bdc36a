"""Run: python -m pytest tests/test_losses.py. Oracles: numbers by hand, scipy, PyWavelets, torch, lpips."""

import json
import math
import socket
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.distributions import Normal, kl_divergence

import losses
from runtime import weights
from variants import adaptive, regularisers
from variants.build import build
from variants.config import AutoencoderConfig

VECTORS = Path(__file__).parent / "known_answers.json"
IMAGE_TERMS = [losses.l1_loss, losses.l2_loss, losses.wavelet_loss, losses.gaussian_loss]


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """An image in [-1, 1] and a noisy copy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1
    return x, x + 0.2 * torch.randn(shape, generator=generator, dtype=dtype)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------
# reconstruction and regularisation


def test_l1_and_l2_by_hand():
    """Errors of 0.5 and 2: mean |d| = 1.25, mean d^2 = 2.125."""
    x, recon = torch.tensor([[1.0, -1.0]]).view(1, 1, 1, 2), torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2)
    assert losses.l1_loss(x, recon).item() == 1.25 and losses.l2_loss(x, recon).item() == 2.125


def test_kl_by_hand():
    """N(1, 1) costs 1/2, N(0, 4) costs (4 - 1 - log 4) / 2, and both are averaged over latent elements."""
    mean, logvar = torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(4)])
    expected = (0.5 + (3 - math.log(4)) / 2) / 2
    assert losses.kl_loss(mean, logvar).item() == pytest.approx(expected, rel=1e-6)
    assert losses.kl_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0.0


def test_kl_equals_torch_distributions():
    """For any diagonal Gaussian, torch's kl_divergence from N(0, 1), mean over elements."""
    mean, logvar = randn(2, 12, 4, 4), randn(2, 12, 4, 4).roll(1)
    expected = kl_divergence(Normal(mean.double(), (0.5 * logvar.double()).exp()), Normal(0.0, 1.0)).mean()
    assert losses.kl_loss(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-6)


def test_wavelet_by_hand():
    """x - recon = [[1, 2], [3, 5]] has details -2.5, -1.5, 0.5; halved; mean sqrt(d^2 + 1e-6)."""
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(1, 1, 2, 2)
    recon = torch.full_like(x, 0.0)
    expected = sum(math.sqrt(d * d + 1e-6) for d in (1.25, 0.75, 0.25)) / 3
    assert losses.wavelet_loss(x, recon).item() == pytest.approx(expected, rel=1e-6)
    assert losses.wavelet_loss(recon, x).item() == pytest.approx(expected, rel=1e-6)


def test_wavelet_ignores_what_blocks_share():
    """A 4 x 4 difference that is constant in each 2 x 2 block is all LL: only eps = 1e-3 is left."""
    blocks = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    loss = losses.wavelet_loss(blocks.view(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    assert loss.item() == pytest.approx(1e-3, rel=1e-6)


def test_wavelet_equals_pywavelets():
    """The details of PyWavelets' Haar transform of both images, subtracted, halved, Charbonnier, mean."""
    x, recon = pair(2, 3, 16, 12)
    details = np.stack(pywt.dwt2(x.double(), "haar")[1]) - np.stack(pywt.dwt2(recon.double(), "haar")[1])
    expected = np.sqrt((details / 2) ** 2 + 1e-3**2).mean()
    assert losses.wavelet_loss(x, recon).item() == pytest.approx(expected, rel=1e-6)


def test_blur_equals_scipy():
    """5 x 5 taps of sigma 1, and a border that reflects without repeating the edge (scipy's mirror)."""
    x, _ = pair(2, 3, 9, 12)
    sigma = (0, 0, 1, 1)
    expected = gaussian_filter(x.double().numpy(), sigma, mode="mirror", truncate=2)    # radius 2 sigma
    np.testing.assert_allclose(losses.gaussian_blur(x).numpy(), expected, rtol=0, atol=1e-6)


def test_gaussian_by_hand():
    """A lone error of 1 in 16 x 16 pixels leaves 1 - c^2 at its place and around it; c is the middle tap."""
    c = 1 / (1 + 2 * math.exp(-0.5) + 2 * math.exp(-2))
    x, recon = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    x[..., 8, 7] = 1.0
    assert losses.gaussian_loss(x, recon).item() == pytest.approx(2 * (1 - c * c) / 256, rel=1e-6)
    assert losses.gaussian_loss(x + 0.5, x).item() < 1e-7        # a shift in brightness is no detail


def test_gaussian_equals_scipy():
    """L1 between x - h(x) and recon - h(recon), each blurred by scipy."""
    details = [t.double().numpy() for t in pair(2, 3, 9, 12)]
    details = [t - gaussian_filter(t, (0, 0, 1, 1), mode="mirror", truncate=2) for t in details]
    expected = np.abs(details[0] - details[1]).mean()
    assert losses.gaussian_loss(*pair(2, 3, 9, 12)).item() == pytest.approx(expected, rel=1e-6)


def test_default_kl_weight_is_ldms():
    """LDM's 1e-6 on sums, at n_z 12 and f 8: a mean over 12 h w and means over 3 (8 h) (8 w)."""
    assert losses.DEFAULT_WEIGHTS["kl"] == pytest.approx(1e-6 * 12 / (3 * 64), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# what holds for every term


@pytest.mark.parametrize("term", IMAGE_TERMS)
def test_fault_01_image_terms_have_a_gradient_at_recon(term):
    """Non-zero and finite at (nearly) every pixel, and finite for identical images (PEERS.md A3 #1)."""
    x, recon = pair(2, 3, 16, 16)
    for target, nonzero in ((recon, 0.99), (x.clone(), 0.0)):
        target.requires_grad_()
        (grad,) = torch.autograd.grad(term(x, target), target)
        assert grad.isfinite().all() and (grad != 0).float().mean() >= nonzero


def test_kl_has_a_gradient():
    """Non-zero at every mean and log-variance."""
    mean, logvar = randn(2, 4, 4, 4).requires_grad_(), randn(2, 4, 4, 4).requires_grad_()
    losses.kl_loss(mean, logvar).backward()
    assert (mean.grad != 0).all() and (logvar.grad != 0).all() and logvar.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_adversarial_terms_have_a_gradient(kind):
    """The generator's reaches recon through the discriminator; the discriminator's has the right signs."""
    _, recon = pair(2, 3, 16, 16)
    recon.requires_grad_()
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 1, 3)
    losses.adv_loss(kind, (conv(recon),)).backward()
    assert recon.grad.isfinite().all() and (recon.grad != 0).all()
    real, fake = (0.1 * randn(2, 4, 4)).requires_grad_(), (0.1 * randn(2, 4, 4)).requires_grad_()
    losses.disc_loss(kind, (real,), (fake,)).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()       # descending raises D(x), lowers D(recon)
    fake.grad = None
    losses.adv_loss(kind, (fake,)).backward()
    assert (fake.grad < 0).all()                                 # the generator pulls the other way


@pytest.mark.parametrize("term", [*IMAGE_TERMS, losses.kl_loss])
def test_terms_are_means_over_the_batch(term):
    """The same batch twice leaves every term as it is."""
    x, recon = pair(2, 3, 16, 16)
    twice = term(torch.cat([x, x]), torch.cat([recon, recon]))
    assert twice.item() == pytest.approx(term(x, recon).item(), rel=1e-6)


@pytest.mark.parametrize("term", [*IMAGE_TERMS, losses.kl_loss])
def test_terms_are_means_over_pixels(term):
    """Tiling the image 2 x 2 leaves pixel terms, KL and wavelet as they are; the blur's border costs 5%."""
    x, recon = pair(2, 3, 16, 16)
    tiled = term(x.repeat(1, 1, 2, 2), recon.repeat(1, 1, 2, 2))
    tolerance = 0.05 if term is losses.gaussian_loss else 1e-6
    assert tiled.item() == pytest.approx(term(x, recon).item(), rel=tolerance)


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_adversarial_terms_are_means_over_logits(kind):
    """Repeating the logits of one head over batch and map changes nothing, nor does its map's size."""
    real, fake = randn(2, 1, 4, 4), randn(2, 1, 4, 4).flip(0)
    image = randn(2, 1, 1, 1)
    larger = [logits.repeat(3, 1, 2, 5) for logits in (real, fake)]
    once = losses.disc_loss(kind, (real, image), (fake, image))
    more = losses.disc_loss(kind, (larger[0], image), (larger[1], image))
    assert more.item() == pytest.approx(once.item(), rel=1e-6)
    once, more = losses.adv_loss(kind, (fake, image)), losses.adv_loss(kind, (larger[1], image))
    assert more.item() == pytest.approx(once.item(), rel=1e-6)


def every_term() -> list[torch.Tensor]:
    """All pure terms on bf16 predictions, as they come out of a network in autocast."""
    x, recon = pair(2, 3, 16, 16)
    recon = recon.bfloat16()
    logits = (recon[:, :1], recon[:, :1].mean(dim=(2, 3), keepdim=True))
    values = [term(x, recon) for term in IMAGE_TERMS] + [losses.kl_loss(recon, recon)]
    for kind in ("hinge", "logistic"):
        values += [losses.disc_loss(kind, logits, logits), losses.adv_loss(kind, logits)]
    mask = regularisers.cutmix_mask(torch.rand(2, 4, generator=torch.Generator().manual_seed(0)), 16, 16)
    return [*values, regularisers.cutmix_loss(mask, recon, 2 * recon, 3 * recon)]


def test_terms_are_fp32_under_autocast():
    """bf16 autocast changes no bit of any term: they all compute in fp32."""
    outside = every_term()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = every_term()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_bf16_images_are_widened_before_the_difference():
    """A term on bf16 images, one of them or both, is the term on the same images in fp32."""
    x, recon = pair(2, 3, 16, 16)
    for target in (x, x.bfloat16()):
        for term in IMAGE_TERMS:
            assert torch.equal(term(target, recon.bfloat16()), term(target.float(), recon.bfloat16().float()))


# ------------------------------------------------------------------------------------------------------------
# adversarial terms at known logits

REAL = (torch.tensor([2.0, 0.0]), torch.tensor([-1.0]))
FAKE = (torch.tensor([-2.0, 1.0]), torch.tensor([0.0]))


def test_fault_09_hinge_by_hand():
    """Pixel head (mean(0, 1) + mean(0, 2)) / 2 = 0.75, image head (2 + 1) / 2 = 1.5, and their mean; so G."""
    assert losses.disc_loss("hinge", REAL[:1], FAKE[:1]).item() == 0.75
    assert losses.disc_loss("hinge", REAL, FAKE).item() == (0.75 + 1.5) / 2
    assert losses.adv_loss("hinge", FAKE[:1]).item() == 0.5
    assert losses.adv_loss("hinge", FAKE).item() == (0.5 + 0.0) / 2


def test_fault_09_14_logistic_equals_cross_entropy():
    """Binary cross-entropy on logits, real towards 1 and fake towards 0, halved; G: fake towards 1."""
    bce = lambda logits, y: F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, y))  # noqa: E731
    heads = [0.5 * (bce(real, 1.0) + bce(fake, 0.0)) for real, fake in zip(REAL, FAKE, strict=True)]
    assert losses.disc_loss("logistic", REAL, FAKE).item() == pytest.approx(sum(heads).item() / 2, rel=1e-6)
    heads = [bce(fake, 1.0) for fake in FAKE]
    assert losses.adv_loss("logistic", FAKE).item() == pytest.approx(sum(heads).item() / 2, rel=1e-6)


def test_chance():
    """A discriminator that says 0 to everything costs 1 with hinge and log 2 with logistic."""
    zeros = (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 1, 1))
    assert losses.disc_loss("hinge", zeros, zeros).item() == 1.0
    assert losses.disc_loss("logistic", zeros, zeros).item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses.adv_loss("hinge", zeros).item() == 0.0
    assert losses.adv_loss("logistic", zeros).item() == pytest.approx(math.log(2), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# CutMix


def test_cutmix_mask_by_hand():
    """lambda 0.75 is a box of half the side: 4 x 4 of 8 x 8 inside, 2 x 2 at a corner; the coin inverts."""
    box, corner = torch.zeros(8, 8), torch.zeros(8, 8)
    box[2:6, 2:6], corner[:2, 6:] = 1, 1
    rows = [[0.75, 0.5, 0.5, 0.9], [0.75, 0.0, 1.0, 0.9], [0.75, 0.5, 0.5, 0.1]]
    masks = regularisers.cutmix_mask(torch.tensor(rows), 8, 8)
    assert torch.equal(masks, torch.stack([box, corner, 1 - box])[:, None])
    wide = regularisers.cutmix_mask(torch.tensor(rows[:1]), 4, 8)      # both sides are halved
    assert wide.sum() == 2 * 4 and wide[0, 0, 1:3, 2:6].all()


def test_cutmix_mask_statistics():
    """Clipped boxes cover 1/2 - 1/5 + 1/48 of an image on average, and inverting half makes that 1/2.

    A side s = sqrt(t), t = 1 - lambda, keeps s - s^2 / 4 inside on average; E (s - s^2 / 4)^2 over t.
    """
    uniform = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    masks = regularisers.cutmix_mask(uniform, 24, 24)
    assert masks.shape == (4000, 1, 24, 24) and masks.unique().tolist() == [0.0, 1.0]
    inverted = uniform[:, 3] < 0.5
    boxes = torch.where(inverted[:, None, None, None], 1 - masks, masks)
    assert boxes.mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.012)      # 3 standard errors
    assert masks.mean().item() == pytest.approx(0.5, abs=0.016)
    # one rectangle each: the box is the outer product of the rows and the columns that it touches
    rows, columns = boxes.amax(dim=3, keepdim=True), boxes.amax(dim=2, keepdim=True)
    assert torch.equal(boxes, rows * columns)


def test_cutmix_loss_by_hand():
    """Mask 1, 0 takes D(x) = 2, then D(recon) = 3; D(mix) = 1, 5 misses by 1 and 2: mean square 2.5."""
    mask, mixed = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 5.0], requires_grad=True)
    real, fake = torch.tensor([2.0, 5.0], requires_grad=True), torch.tensor([7.0, 3.0], requires_grad=True)
    loss = regularisers.cutmix_loss(mask, mixed, real, fake)
    assert loss.item() == 2.5
    loss.backward()                                              # the target is not detached, as published
    assert mixed.grad.tolist() == [-1.0, 2.0]
    assert real.grad.tolist() == [1.0, 0.0] and fake.grad.tolist() == [0.0, -2.0]


# ------------------------------------------------------------------------------------------------------------
# adaptive weight


@pytest.mark.parametrize("output", ["image", "wavelet"])
@pytest.mark.parametrize("bf16", [False, True])
def test_last_layer_gradient_equals_autograd(output, bf16):
    """The rerun of the last layer gives what a backward through the model gives, and leaves no .grad."""
    torch.manual_seed(0)
    small = dict(extractor_channels=4, extractor_mult=(1,), aggregator_channels=4, aggregator_mult=(1,))
    net = build(AutoencoderConfig(decoder_channels=8, decoder_blocks=1, output=output, **small))
    x, _ = pair(2, 3, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        recon, _, features = net(x, with_features=True)
        loss = losses.l1_loss(x, recon) + losses.wavelet_loss(x, recon)
        grad = adaptive.last_layer_gradient(loss, recon, features, net.decoder)
    assert all(parameter.grad is None for parameter in net.parameters())
    loss.backward()                                              # the graph is still there
    expected = net.decoder.conv_out.weight.grad
    assert grad.shape == expected.shape and expected.norm() > 0.01
    assert (grad - expected).norm() < (1e-2 if bf16 else 1e-6) * expected.norm()


def test_adaptive_weight_by_hand():
    """Norms 5 and 0.5: 5 / 0.5001; a vanishing adversarial gradient stops at 1e4."""
    rec, adv = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, -0.4]])
    assert adaptive.adaptive_weight(rec, adv).item() == pytest.approx(5 / 0.5001, rel=1e-6)
    assert adaptive.adaptive_weight(rec, 0 * adv).item() == 1e4
    assert adaptive.adaptive_weight(0 * rec, adv).item() == 0.0


# ------------------------------------------------------------------------------------------------------------
# LPIPS, with weights by the formula of vectors.json


def u01(count: int, seed: int) -> np.ndarray:
    """hash32(i, seed) / 2^32 of vectors.json, i = 0 .. count - 1."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    h = h + np.uint64(seed * 2246822519 % 2**32) & mask
    h ^= h >> np.uint64(15)
    h = h * np.uint64(2246822519) & mask
    h ^= h >> np.uint64(13)
    h = h * np.uint64(3266489917) & mask
    return (h ^ h >> np.uint64(16)) / 2.0**32


def vgg16_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of VGG16's 13 convolutions, numbered as torchvision numbers its layers."""
    shapes, layer, channels = {}, 0, 3
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            shapes |= {f"{layer}.weight": (width, channels, 3, 3), f"{layer}.bias": (width,)}
            layer, channels = layer + 2, width                   # a ReLU follows each
        layer += 1                                               # and a pooling each stage
    return shapes


def formula_weights() -> dict[str, torch.Tensor]:
    """features.N.* by the rule 'fake_weight_networks' of vectors.json."""
    weights = {}
    for name, shape in vgg16_shapes().items():
        name = f"features.{name}"
        q = 2 * u01(math.prod(shape), zlib.crc32(name.encode())) - 1
        q *= 0.05 if len(shape) == 1 else math.sqrt(6 / math.prod(shape[1:]))
        weights[name] = torch.from_numpy(q.astype(np.float32)).view(shape)
    return weights


def formula_images() -> tuple[torch.Tensor, torch.Tensor]:
    """A and B(16, 1) of vectors.json, 64 x 64, as (1, 3, H, W) in [-1, 1]."""
    y, x, c = np.mgrid[:64, :64, :3]
    a = (4 * x + 3 * y + 40 * c + (x * x + 2 * y * y) // 16) % 256
    noise = (u01(a.size, 1) * 2**32).astype(np.int64) % 33 - 16
    b = np.clip(a + noise.reshape(a.shape), 0, 255)
    return tuple(torch.from_numpy(t / 127.5 - 1).permute(2, 0, 1)[None].float() for t in (a, b))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """A features-only file, 59 MB."""
    path = tmp_path_factory.mktemp("vgg") / "features.pth"
    torch.save(formula_weights(), path)
    return path


@pytest.fixture(scope="module")
def perceptual(vgg_file) -> losses.LPIPS:
    return losses.LPIPS(weights.load_vgg(str(vgg_file)))


def test_lpips_known_answer(perceptual):
    """The stored LPIPS (VGG, v0.1) of two formula images, to 1e-4; identical images are 0 apart."""
    known = json.loads(VECTORS.read_text())["fake_weight_networks"]["lpips"]["vgg"]
    bias = perceptual.lpips.net.slice1.get_submodule("0").bias
    assert bias[0].item() == pytest.approx(known["first weight value features.0.bias"], rel=1e-5)
    a, b = formula_images()
    (expected,) = (value for key, value in known.items() if key.startswith("lpips(A,B) 64x64"))
    assert perceptual(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert perceptual(a, a).item() == known["lpips(A,A)"] == 0.0


def test_lpips_equals_the_package(perceptual):
    """The package's own forward with the same weights gives the same number, averaged over images."""
    x, recon = pair(2, 3, 32, 48)
    expected = perceptual.lpips(x, recon).mean()
    assert perceptual(x, recon).item() == pytest.approx(expected.item(), rel=1e-5)
    twice = perceptual(torch.cat([x, x]), torch.cat([recon, recon]))
    assert twice.item() == pytest.approx(expected.item(), rel=1e-5)


def test_lpips_stays_frozen_in_eval_mode(perceptual):
    """parent.train() leaves it in eval mode (its dropout would make the loss random); nothing trains."""
    nn.ModuleList([perceptual]).train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    x, recon = pair(1, 3, 16, 16)
    assert torch.equal(perceptual(x, recon), perceptual(x, recon))


def test_fault_01_lpips_has_a_gradient_at_recon(perceptual):
    """At every pixel of recon, and finite too where a feature vector is dead (its length has no slope)."""
    x, recon = pair(2, 3, 16, 16)
    recon.requires_grad_()
    (grad,) = torch.autograd.grad(perceptual(x, recon), recon)
    assert grad.isfinite().all() and (grad != 0).all()
    layer = perceptual.lpips.net.slice5.get_submodule("28")
    bias = layer.bias.clone()
    try:
        layer.bias.fill_(-1e3)                                   # relu5_3 is 0 everywhere
        (grad,) = torch.autograd.grad(perceptual(x, recon), recon)
    finally:
        layer.bias.copy_(bias)
    assert grad.isfinite().all() and (grad != 0).all()


def test_lpips_takes_grey_images(perceptual):
    """One channel counts three times."""
    x, recon = pair(2, 1, 16, 16)
    expected = perceptual(x.repeat(1, 3, 1, 1), recon.repeat(1, 3, 1, 1))
    assert perceptual(x, recon).item() == pytest.approx(expected.item(), rel=1e-6)


def test_lpips_under_autocast(perceptual):
    """With VGG in bf16 the loss is fp32 and, for images that differ visibly, within 1% of the exact one."""
    x, recon = pair(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = perceptual(x, recon)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(perceptual(x, recon).item(), rel=0.01)


def test_lpips_with_weights_in_bf16(perceptual, vgg_file):
    """Under autocast, weights stored in bf16 give bit for bit what rounding them in each call gives."""
    stored = losses.LPIPS(weights.load_vgg(str(vgg_file)), torch.bfloat16)
    results = []
    for lpips in (perceptual, stored):
        x, recon = pair(1, 3, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = lpips(x, recon.requires_grad_())
        results += [loss.detach(), torch.autograd.grad(loss, recon)[0]]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("form", ["N.*", "features.N.* and classifier.N.*"])
def test_load_vgg_takes_other_layouts(form, vgg_file, tmp_path):
    """Bare layer numbers, and torchvision's whole file with its classifier, are the same features."""
    stored = torch.load(vgg_file, weights_only=True)
    expected = weights.load_vgg(str(vgg_file))
    assert {name: tuple(weight.shape) for name, weight in expected.items()} == vgg16_shapes()
    if form == "N.*":
        stored = {name.removeprefix("features."): weight for name, weight in stored.items()}
    else:
        stored |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    torch.save(stored, tmp_path / "other.pth")
    loaded = weights.load_vgg(str(tmp_path / "other.pth"))
    assert all(torch.equal(loaded[name], expected[name]) for name in vgg16_shapes())


# another network can have the right first layer, and a layer 28
VGG19 = {f"features.{i}.{kind}" for i in (0, 2, 5, 7, 10, 12, 14, 16, 19, 28) for kind in ("weight", "bias")}
BAD_FILES = {
    "missing": None,
    "garbage": b"<html>404</html>",
    "empty": b"",
    "other keys": {"model": {"encoder.weight": torch.zeros(2)}, "step": 3},
    "other shapes": {f"features.{name}": torch.zeros(1) for name in vgg16_shapes()},
    "VGG19": {name: torch.zeros(64, 3, 3, 3) for name in VGG19},
    "a tensor": torch.zeros(3),
    "numbered keys": {0: torch.zeros(3)},
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_vgg_files_are_one_clear_line(content, tmp_path):
    """A ValueError in one line that names the file, --vgg-file and --lpips-weight 0, before LPIPS exists."""
    path, content = tmp_path / "vgg.pth", BAD_FILES[content]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        weights.load_vgg(str(path))
    assert_one_line(error.value, path)


def assert_one_line(error: ValueError, path: Path) -> None:
    text = str(error)
    assert "\n" not in text
    assert all(words in text for words in (str(path), "--vgg-file", "--lpips-weight 0"))


def test_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    """Without network and cache: the same line with the hub's path, the timeout restored, no file left."""
    timeouts = []

    def fail(url: str, path: str, hash_prefix: str) -> None:
        assert hash_prefix == "397923af" and url.endswith("/vgg16-397923af.pth")
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no route\nto host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    before = socket.getdefaulttimeout()
    with pytest.raises(ValueError, match="no route to host") as error:
        weights.load_vgg(timeout=7.0)
    assert_one_line(error.value, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    assert timeouts == [7.0] and socket.getdefaulttimeout() == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_download_happens_once(vgg_file, tmp_path, monkeypatch):
    """What was fetched into the hub's cache is read from there the next time."""
    calls = []

    def fetch(url: str, path: str, hash_prefix: str) -> None:
        calls.append(url)
        Path(path).write_bytes(vgg_file.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first, second = weights.load_vgg(), weights.load_vgg()
    assert len(calls) == 1 and torch.equal(first["28.bias"], second["28.bias"])
