"""Run: python -m pytest tests/variants/test_equivariance.py. Oracles: Pillow, NumPy by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from linear import F_, LinearAutoencoder, keys, numpy_resize, resize_matrix, triangle
from PIL import Image
from torch import Tensor

import train
from discriminators import UNetDiscriminator
from runtime.randomness import seeded, seeded_numpy
from variants import equivariance
from variants.options import Options

SIDE = 64
FLAGS = ["--levels", "2", "--latent-channels", "2", "--in-channels", "1", "--res", str(SIDE)]
TERMS = [("l2", 1.0, lambda x, recon: (x - recon).square().mean())]


def images(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def options(model, *flags: str) -> Options:
    """The flags' part in a step of three images."""
    made = Options(train.parse_args([*FLAGS, *flags]), torch.device("cpu"))
    made.watch(model, None, None)
    return made


def begin(made: Options, until) -> None:
    """The first step whose draws satisfy `until`."""
    for step in range(100):
        made.begin(step, (3, SIDE // F_, SIDE // F_))
        if until(made):
            return
    raise AssertionError("no step of 100")


# ---- transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, kernel, pillow", [
    ("bilinear", triangle, Image.Resampling.BILINEAR), ("bicubic", keys, Image.Resampling.BICUBIC),
])  # fmt: skip
def test_resize(mode, kernel, pillow):
    """The textbook kernel in NumPy, and Pillow, which has 24 bits; the same side is the identity."""
    x = images(1)
    for side in (32, 16, 40, 52, 63):
        ours = equivariance.resize(x, side, mode)[0, 0].numpy()
        theirs = np.asarray(Image.fromarray(x[0, 0].float().numpy()).resize((side, side), pillow))
        assert abs(ours - numpy_resize(x.numpy(), side, side, kernel)).max() < 1e-12
        assert abs(ours - theirs).max() < 1e-5
    assert torch.equal(equivariance.resize(x, SIDE, mode), x)
    with torch.autocast("cpu", torch.bfloat16):
        half = equivariance.resize(x.bfloat16(), 32, mode)
    assert half.dtype == torch.float32 and half.equal(equivariance.resize(x.bfloat16().float(), 32, mode))


def test_turn():
    """np.rot90, row by row; turns of images and of latents agree on an autoencoder that takes means."""
    x, quarters = images(5), torch.tensor([3, 0, 1, 2, 1])
    turned = equivariance.turn(x, quarters)
    for row, original, k in zip(turned, x, quarters, strict=True):
        assert np.array_equal(row.numpy(), np.rot90(original.numpy(), int(k), (1, 2)))
    model = LinearAutoencoder(mean=True)
    expected = equivariance.turn(model.encode(x).mean, quarters)
    assert torch.allclose(model.encode(turned).mean, expected, atol=1e-12)


# ---- losses ------------------------------------------------------------------------------------------------


def hand_gradients(model, images: np.ndarray, turns, targets: np.ndarray, rows: np.ndarray) -> list:
    """Gradients of mean (target - D A turn(E x) A')^2 by E and by D, the chain rule written out in NumPy."""
    encode, decode = (part.weight.detach().numpy() for part in (model.encoder, model.decoder))
    h, side = SIDE // F_, targets.shape[-1] // F_
    d_encode, d_decode = np.zeros_like(encode[:, 0]), np.zeros_like(decode[:, 0])
    for x, k, target in zip(images, turns, targets, strict=True):
        z = rows @ np.rot90(model.numpy_encode(x[None]), k, (2, 3)) @ rows.T
        error = -2 * (target - model.numpy_decode(z)[0]) / targets.size
        error = error.reshape(side, F_, side, F_)
        d_decode += np.einsum("iujv,kij->kuv", error, z[0])
        d_z = rows.T @ np.einsum("iujv,kuv->kij", error, decode[:, 0]) @ rows
        d_z = np.rot90(d_z, -k, (1, 2))
        d_encode[: len(decode)] += np.einsum("kij,iujv->kuv", d_z, x.reshape(h, F_, h, F_))
    return [d_encode, d_decode]


@pytest.mark.parametrize("factor", [2, 4])
def test_scale_equivariance_by_hand(factor):
    """Loss and gradients on a linear autoencoder: plain term + 0.25 mean (A x A' - D A (E x) A')^2."""
    model, x = LinearAutoencoder(seed=2), images()
    extra = options(model, "--se-weight", "0.25")
    begin(extra, lambda made: made.factor == factor)
    recon, _, _, *others = model(x, None, True, extra.views(slice(0, 3)))
    assert extra.target(x, slice(0, 3)) is x and len(others) == 1
    parts = {}
    loss = TERMS[0][2](x, recon) + extra.scale_equivariance(parts, TERMS, x, others)
    loss.backward()

    a = x.numpy()
    plain, rows = np.eye(SIDE // F_), resize_matrix(SIDE // F_, SIDE // F_ // factor, triangle)
    target = numpy_resize(a, SIDE // factor, SIDE // factor)
    whole, z = model.numpy_decode(model.numpy_encode(a)), model.numpy_encode(a)
    se = ((target - model.numpy_decode(rows @ z @ rows.T)) ** 2).mean()
    assert parts["se"].item() == pytest.approx(se, rel=1e-12)
    assert loss.item() == pytest.approx(((a - whole) ** 2).mean() + 0.25 * se, rel=1e-12)
    hands = [hand_gradients(model, a, (0, 0, 0), a, plain), hand_gradients(model, a, (0, 0, 0), target, rows)]
    for weight, one, two in zip((model.encoder.weight, model.decoder.weight), *hands, strict=True):
        assert abs(weight.grad[:, 0].numpy() - (one + 0.25 * two)).max() < 1e-12 and abs(two).max() > 1e-3


def test_eq_vae_by_hand():
    """mean (tau x - D tau E x)^2 and its gradients, with turns of each image and Keys' cubic kernel."""
    model, x = LinearAutoencoder(seed=3), images()
    extra = options(model, "--eq-vae", "--eq-identity", "0")
    begin(extra, lambda made: made.tau.side == 40 and len(set(made.tau.quarters.tolist())) > 1)
    target = extra.target(x, slice(0, 3))
    recon, _, _, *others = model(x, None, True, extra.views(slice(0, 3)))
    assert others == [] and recon.shape[-1] == 40
    loss = TERMS[0][2](target, recon)
    loss.backward()

    quarters, a = extra.tau.quarters.tolist(), x.numpy()
    turned = np.stack([np.rot90(image, k, (1, 2)) for image, k in zip(a, quarters, strict=True)])
    wanted = numpy_resize(turned, 40, 40, keys)
    assert abs(target.numpy() - wanted).max() < 1e-12
    rows = resize_matrix(SIDE // F_, 40 // F_, keys)
    z = np.stack([np.rot90(one, k, (1, 2)) for one, k in zip(model.numpy_encode(a), quarters, strict=True)])
    decoded = model.numpy_decode(rows @ z @ rows.T)
    assert loss.item() == pytest.approx(((wanted - decoded) ** 2).mean(), rel=1e-12)

    hands = hand_gradients(model, a, quarters, wanted, rows)
    for weight, expected in zip((model.encoder.weight, model.decoder.weight), hands, strict=True):
        assert abs(weight.grad[:, 0].numpy() - expected).max() < 1e-12 and abs(expected).max() > 1e-3


def test_the_identity_gives_the_plain_loss():
    """No turn and the full side; and a step in which p is below --eq-identity has no transform at all."""
    model, x = LinearAutoencoder(seed=4), images()
    tau = equivariance.Tau(SIDE, torch.zeros(3, dtype=torch.int64), F_)
    plain, *_ = model(x)
    moved, *_ = model(x, None, False, tau)
    assert torch.equal(tau.image(x), x) and torch.equal(moved, plain)
    extra = options(model, "--eq-vae")
    begin(extra, lambda made: made.tau is None)
    assert extra.views(slice(0, 3)) is None and extra.target(x, slice(0, 3)) is x
    whole, *_ = model(x, None, False, equivariance.Shrunk(1))
    assert torch.equal(whole, plain)


# ---- draws -------------------------------------------------------------------------------------------------


def test_draws():
    """p of identities; scales uniform in (1/4, 1), to the nearest side; 1, 2 or 3 quarters; 2 or 4."""
    allowed, found = equivariance.sides(128, 8), Counter()
    for step in range(8000):
        found[equivariance.draw_side(seeded_numpy(0, step, 0), 0.4, allowed)] += 1
    assert allowed == range(32, 129, 8) and set(found) == {None, *allowed}
    share = 8 / 96                                          # of the range of scales: each side has 8 pixels
    wide = {side: share / (2 if side in (32, 128) else 1) for side in allowed}
    for side, expected in {None: 0.4, **{side: 0.6 * width for side, width in wide.items()}}.items():
        sigma = (8000 * expected * (1 - expected)) ** 0.5
        assert abs(found[side] - 8000 * expected) < 4 * sigma, side
    quarters = Counter(equivariance.draw_quarters(seeded(0, 0, 0), 3000).tolist())
    factors = Counter(equivariance.draw_factor(seeded_numpy(0, step, 0)) for step in range(3000))
    assert set(quarters) == {1, 2, 3} and all(abs(n - 1000) < 110 for n in quarters.values())
    assert set(factors) == {2, 4} and abs(factors[2] - 1500) < 110


def test_rows_of_the_batch():
    """The turns of a micro-batch are those of its rows, whatever the micro-batch."""
    extra = options(LinearAutoencoder(), "--eq-vae", "--eq-identity", "0")
    extra.begin(7, (6, SIDE // F_, SIDE // F_))
    whole = extra.views(slice(0, 6)).quarters.tolist()
    pairs = [extra.views(slice(start, start + 2)) for start in (0, 2, 4)]
    assert sum((pair.quarters.tolist() for pair in pairs), []) == whole and len(set(whole)) > 1
    assert {pair.side for pair in pairs} == {extra.tau.side}


@pytest.mark.parametrize("res, f, stride, least, expected", [
    (128, 8, 1, 1, range(32, 129, 8)),
    (64, 8, 1, 1, range(16, 65, 8)),                        # LPIPS takes no less than 16
    (256, 8, 64, 64, range(64, 257, 64)),                   # the U-Net discriminator
    (64, 4, 8, 32, range(32, 65, 8)),                       # PatchGAN
    (128, 16, 1, 1, range(32, 129, 16)),
    (32, 16, 1, 1, range(16, 33, 16)),
])  # fmt: skip
def test_sides(res, f, stride, least, expected):
    assert equivariance.sides(res, f, stride, least) == expected


def test_sizes_that_cannot_be_scaled():
    """Each is one line with the value received."""
    with pytest.raises(ValueError, match="below --res 64 there is no side that the latents and the disc"):
        equivariance.sides(64, 8, UNetDiscriminator.stride, UNetDiscriminator.min_size)
    for res, f in ((72, 8), (32, 8), (96, 16)):
        with pytest.raises(ValueError, match=f"at least 64, got {res}"):
            equivariance.check_resolution(res, f)
    for res, f in ((64, 8), (64, 16), (96, 8), (96, 4)):
        equivariance.check_resolution(res, f)
