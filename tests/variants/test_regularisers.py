"""Run: python -m pytest tests/test_regularisers.py. Oracles: numbers by hand, finite differences."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import SMALL_DISCS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from discriminators import update_spectral_norm
from runtime import distributed
from variants.regularisers import LECAM_DECAY, LeCam, head_means, r1_loss
from variants.stylegan import StyleGANDiscriminator


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Quadratic(nn.Module):
    """Two heads: 1/2 sum a x^2 as one logit per image, and the map b x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return 0.5 * (self.a * x.square()).sum(dim=(1, 2, 3), keepdim=True), self.b * x


def perturbed(name: str) -> nn.Module:
    """A small discriminator in float64, away from where it starts: no layer is 0, no sigma exact."""
    torch.manual_seed(0)
    disc = SMALL_DISCS[name]().double()
    with torch.no_grad():
        for parameter in disc.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    update_spectral_norm(disc)
    return disc


# ------------------------------------------------------------------------------------------------------------
# R1


def test_r1_by_hand():
    """Of D = (1/2 sum a x^2 + mean b x) / 2 with a = 2, 3, b = 4 at x = 1, -1: grad (2, -1/2), 1/2 4.25.

    Halves of (a x + b / 2): ((2 + 2) / 2, (-3 + 2) / 2). A second image at 0 has (1, 1), 1/2 2; the mean.
    """
    disc, x = Quadratic(), torch.tensor([[1.0, -1.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    loss = r1_loss(disc, x)
    assert loss.item() == pytest.approx((4.25 + 2) / 4, rel=1e-6)
    loss.backward()
    # d/da of 1/2 sum ((a x + b / 2) / 2)^2 is x (a x + b / 2) / 4, d/db the sum of (a x + b / 2) / 8
    assert disc.a.grad.tolist() == pytest.approx([(1 * 4) / 4 / 2, (-1 * -1) / 4 / 2], rel=1e-6)
    assert disc.b.grad.item() == pytest.approx((4 - 1 + 2 + 2) / 8 / 2, rel=1e-6)
    assert x.grad is None and not x.requires_grad


def test_r1_is_a_mean_over_images():
    """The same batch twice leaves it as it is; doubling D multiplies it by 4."""
    disc, x = Quadratic(), randn(3, 1, 4, 2)
    once = r1_loss(disc, x).item()
    assert r1_loss(disc, torch.cat([x, x])).item() == pytest.approx(once, rel=1e-6)
    with torch.no_grad():
        disc.a *= 2
        disc.b *= 2
    assert r1_loss(disc, x).item() == pytest.approx(4 * once, rel=1e-6)


@pytest.mark.parametrize("name", SMALL_DISCS)
def test_r1_equals_finite_differences(name):
    """In float64: the value from differences of D in x, its gradient from differences in the parameters.

    The first along the gradient, the second along a random direction; steps of 1e-8 cross no ReLU's corner.
    """
    disc, x = perturbed(name), 0.5 * randn(2, 3, 64, 64, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = disc(x)
        return sum(head.flatten(1).mean(1) for head in logits).sum() / len(logits)

    leaf = x.clone().requires_grad_()
    logits = disc(leaf)
    (grad,) = torch.autograd.grad(sum(head.flatten(1).mean(1).sum() for head in logits) / len(logits), leaf)
    along = grad / grad.norm()
    slope = (score(x + 1e-6 * along) - score(x - 1e-6 * along)) / 2e-6
    loss = r1_loss(disc, x)
    assert loss.item() == pytest.approx(0.5 * slope.item() ** 2 / 2, rel=1e-5)           # two images

    loss.backward()
    parameters = list(disc.parameters())
    directions = [randn(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(parameters)]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(disc)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions, strict=True):
                p += sign * 1e-8 * d
        values.append(r1_loss(moved, x).item())
    assert abs(slope) > 1e-7
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(slope.item(), rel=1e-4)


@pytest.mark.parametrize("name", SMALL_DISCS)
def test_r1_reaches_the_weights(name):
    """Every convolution's weight has a finite gradient that is not 0; biases of the last layers have none."""
    disc = perturbed(name)
    r1_loss(disc, randn(2, 3, 64, 64, dtype=torch.float64)).backward()
    for key, parameter in disc.named_parameters():
        if parameter.ndim == 4:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_r1_is_fp32_under_autocast():
    """bf16 autocast, and images in bf16, change no bit of what D gives in fp32 for those images."""
    torch.manual_seed(0)
    disc, x = StyleGANDiscriminator(3, 16, base=64), randn(2, 3, 16, 16).bfloat16()
    expected = r1_loss(disc, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = r1_loss(disc, x)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def discriminator_gradients(disc: nn.Module, wrapped: nn.Module, x: Tensor) -> list[Tensor]:
    """As in training: adversarial terms through the wrapped net, R1 through the bare one, one backward."""
    (real,), (fake,) = wrapped(x), wrapped(0.5 * x)
    (F.softplus(-real).mean() + F.softplus(fake).mean() + 10 * r1_loss(disc, x)).backward()
    return [parameter.grad for parameter in disc.parameters()]


def small_stylegan() -> StyleGANDiscriminator:
    torch.manual_seed(0)
    return StyleGANDiscriminator(3, 16, base=64)


def worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes with one half of the images each."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init("cpu")
    disc, x = small_stylegan(), randn(8, 3, 16, 16).chunk(2)[rank]
    torch.save(discriminator_gradients(disc, DistributedDataParallel(disc), x), folder / f"{rank}.pt")
    distributed.cleanup()


def test_two_processes_share_the_gradient_of_r1(tmp_path):
    """With DDP both hold the gradient that one process has for all 8 images: R1's part is averaged, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, tmp_path), nprocs=2)
    disc = small_stylegan()
    expected = discriminator_gradients(disc, disc, randn(8, 3, 16, 16))
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------------------
# LeCam


def lecam(real: float, fake: float) -> LeCam:
    module = LeCam(1)
    module.update(torch.tensor([real]), torch.tensor([fake]))
    return module


def test_lecam_by_hand():
    """a_R = 1, a_F = -1: D(x) = 2, -3 are 3 above a_F and below it; D(recon) = 0, 4 1 under a_R and above.

    (9 + 0) / 2 + (1 + 0) / 2 = 5.
    """
    real, fake = torch.tensor([2.0, -3.0], requires_grad=True), torch.tensor([0.0, 4.0], requires_grad=True)
    loss = lecam(1.0, -1.0)((real,), (fake,))
    assert loss.item() == 5.0
    loss.backward()
    assert real.grad.tolist() == [3.0, 0.0] and fake.grad.tolist() == [-1.0, 0.0]    # it pulls them together


def test_lecam_averages_heads():
    """Each head has anchors of its own and is a mean over its logits; heads are averaged."""
    module = LeCam(2)
    module.update(torch.tensor([1.0, 10.0]), torch.tensor([-1.0, 5.0]))
    real, fake = torch.tensor([[2.0, -3.0], [7.0, 7.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert module(real, fake).item() == (5 + (7 - 5) ** 2 + 10**2) / 2


def test_lecam_average_is_plain_then_exponential():
    """After n < 1000 steps the mean of all, without a trace of the initial 0; later 0.999 a + 0.001 new."""
    module = LeCam(1)
    steps = randn(4, 2, 1)
    for i, (real, fake) in enumerate(steps):
        module.update(real, fake)
        torch.testing.assert_close(module.real, steps[: i + 1, 0].mean(0))
        torch.testing.assert_close(module.fake, steps[: i + 1, 1].mean(0))
    module.updates.fill_(5000)
    before = module.real.clone()
    module.update(torch.tensor([10.0]), torch.tensor([0.0]))
    torch.testing.assert_close(module.real, 0.999 * before + 0.001 * 10)
    assert LECAM_DECAY == 0.999


def test_lecam_goes_on_from_its_state():
    """State dict and back: the two averages and their count are all there is, and none of it trains."""
    module = lecam(1.0, -1.0)
    other = LeCam(1)
    other.load_state_dict(module.state_dict())
    for lecam_ in (module, other):
        lecam_.update(torch.tensor([3.0]), torch.tensor([0.0]))
    assert other.real.tolist() == module.real.tolist() == [2.0]
    assert set(module.state_dict()) == {"real", "fake", "updates"} and not list(module.parameters())


def test_lecam_is_fp32():
    """On bf16 logits the squares are fp32; head_means carries no gradient."""
    module, logits = lecam(1.003, -1.003), (randn(4, 1, 8, 8).bfloat16().requires_grad_(),)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, means = module(logits, logits), head_means(logits)
    t = logits[0].detach().double()
    a = 1.003
    expected = (t + a).clamp(min=0).square().mean() + (a - t).clamp(min=0).square().mean()
    assert loss.dtype == means.dtype == torch.float32 and not means.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert means.tolist() == pytest.approx([t.mean().item()], rel=1e-5)
