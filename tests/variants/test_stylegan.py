"""Run: python -m pytest tests/test_stylegan.py. Oracles: FIGURES.md 5, scipy, numpy, numbers by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d
from torch import nn

from variants import stylegan
from variants.stylegan import Blur, EqualConv2d, ResidualBlock, StyleGANDiscriminator, minibatch_stddev

TAPS = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------------------
# layout


@pytest.mark.parametrize(
    "res, base, total",
    [(256, 32768, 28_864_129), (128, 32768, 28_389_121), (256, 16384, 24_001_089), (128, 16384, 23_882_369)],
)
def test_parameters(res, base, total):
    """The published counts of configuration F, at 256 and 128 and at half the width."""
    with torch.device("meta"):
        assert count(StyleGANDiscriminator(3, res, base)) == total


@pytest.mark.parametrize("res, macs", [(256, 46.532e9), (128, 31.487e9)])
def test_operations(res, macs):
    """Multiply-accumulates of the convolutions, blurs not counted, to the digits of FIGURES.md 5."""
    counted = []
    with torch.device("meta"):
        disc = StyleGANDiscriminator(3, res)
        for conv in disc.modules():
            if isinstance(conv, EqualConv2d):
                conv.register_forward_hook(
                    lambda conv, args, out: counted.append(out.numel() * conv.weight[0].numel()))
        disc(torch.empty(1, 3, res, res))
    assert sum(counted) == pytest.approx(macs, rel=2e-5)


@pytest.mark.parametrize("res", [8, 64, 128, 256])
def test_output(res):
    """One logit per image; the map in front of the last layers is 4 x 4 whatever the size."""
    torch.manual_seed(0)
    disc = StyleGANDiscriminator(3, res, base=256)
    maps = []
    disc.conv.register_forward_hook(lambda conv, args, out: maps.append(out.shape[-2:]))
    (logits,) = disc(randn(2, 3, res, res))
    assert logits.shape == (2, 1, 1, 1) and logits.isfinite().all() and maps == [(4, 4)]


def test_other_sizes_are_refused():
    """A side that is no power of two when it is built, and images of another size, are one clear line."""
    for res in (4, 96, 320):
        with pytest.raises(ValueError, match=f"takes squares of .* pixels, got {res}: choose another --res"):
            StyleGANDiscriminator(3, res)
    disc = StyleGANDiscriminator(3, 16, base=64)
    for size in ((32, 32), (16, 32), (8, 8)):
        with pytest.raises(ValueError, match=f"takes 16x16 pixels, got {size[0]}x{size[1]}: build it"):
            disc(torch.zeros(1, 3, *size))


# ------------------------------------------------------------------------------------------------------------
# layers


@pytest.mark.parametrize("padding, stride", [(2, 1), (1, 2)])
def test_blur_equals_scipy(padding, stride):
    """Taps 1, 3, 3, 1 along both axes over 64, zeros outside, then every second pixel where it halves."""
    x = randn(2, 3, 8, 6, dtype=torch.float64)
    out = Blur(padding, stride).double()(x).numpy()
    for image, blurred in zip(x.flatten(0, 1).numpy(), out.reshape(6, *out.shape[-2:]), strict=True):
        full = convolve2d(np.pad(image, padding), TAPS, mode="valid")
        np.testing.assert_allclose(blurred, full[::stride, ::stride], rtol=0, atol=1e-14)


def test_blur_keeps_the_mean():
    """A constant stays as it is away from the border, exactly, in bf16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        out = Blur(2).to(dtype)(torch.full((1, 2, 8, 8), 3.0, dtype=dtype))
        assert out.shape == (1, 2, 9, 9) and (out[..., 2:-2, 2:-2] == 3).all()


def test_equalised_learning_rate():
    """Weights N(0, 1) over sqrt(fan_in) = 3 sqrt 2: nine ones in two channels give 18 / 4.24, + bias."""
    conv = EqualConv2d(2, 1, 3)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.fill_(0.5)
    assert conv(torch.ones(1, 2, 3, 3)).item() == pytest.approx(18 / 18**0.5 + 0.5, rel=1e-6)
    torch.manual_seed(0)
    large = EqualConv2d(64, 256, 3)
    assert large.weight.std().item() == pytest.approx(1.0, rel=0.01) and not large.bias.any()
    out = large(randn(4, 64, 8, 8))
    assert out.std().item() == pytest.approx(1.0, rel=0.05)               # white noise keeps its scale


def test_adam_moves_all_layers_by_the_same_share():
    """One step of Adam at 0.01 moves the weights in use by 0.01 / sqrt(fan_in): 1% of their deviation."""
    torch.manual_seed(0)
    for channels, kernel in ((4, 1), (16, 3)):
        conv = EqualConv2d(channels, 8, kernel)
        scale = (channels * kernel**2) ** -0.5
        before = conv.weight.detach() * scale
        conv(randn(2, channels, 5, 5)).square().sum().backward()
        torch.optim.Adam(conv.parameters(), lr=0.01).step()
        moved = (conv.weight.detach() * scale - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * scale), rtol=1e-3, atol=0)


def test_leaky_relu_by_hand():
    """sqrt 2 times x, or 0.2 x below 0."""
    out = stylegan.leaky_relu(torch.tensor([-5.0, 0.0, 3.0]))
    assert out.tolist() == pytest.approx([-(2**0.5), 0.0, 3 * 2**0.5], rel=1e-6)


def test_block_equals_the_published_order():
    """conv, lrelu, blur, conv with stride 2, lrelu; beside it blur, 1x1 with stride 2; sum over sqrt 2."""
    torch.manual_seed(0)
    block = ResidualBlock(3, 5).double()
    x = randn(2, 3, 8, 12, dtype=torch.float64)

    def blurred(t: torch.Tensor, padding: int) -> torch.Tensor:
        maps = [convolve2d(np.pad(image, padding), TAPS, mode="valid") for image in t.flatten(0, 1).numpy()]
        return torch.from_numpy(np.stack(maps)).unflatten(0, t.shape[:2])

    with torch.no_grad():
        conv1, conv2, skip = block.conv1, block.conv2[1], block.skip[1]
        h = F.leaky_relu(F.conv2d(x, conv1.weight / 27**0.5, conv1.bias, padding=1), 0.2) * 2**0.5
        h = F.conv2d(blurred(h, 2), conv2.weight / 27**0.5, conv2.bias, stride=2)
        h = F.leaky_relu(h, 0.2) * 2**0.5
        straight = F.conv2d(blurred(x, 1), skip.weight / 3**0.5, stride=2)
        torch.testing.assert_close(block(x), (h + straight) / 2**0.5, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------
# minibatch standard deviation


def test_minibatch_stddev_by_hand():
    """Pixels 0, 2, 4, 6 in four images have variance 5, pixels 1, 1, 1, 1 none: mean of sqrt 5 and 1e-4."""
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 1.0]]).view(4, 1, 1, 2)
    out = minibatch_stddev(x)
    assert out.shape == (4, 2, 1, 2) and torch.equal(out[:, :1], x)
    assert out[:, 1].flatten().tolist() == pytest.approx([(5**0.5 + 1e-4) / 2] * 8, rel=1e-6)


@pytest.mark.parametrize("sizes", [[1], [2], [3], [4], [3, 2], [3, 3], [4, 3], [4, 4], [3, 3, 3]], ids=str)
def test_minibatch_stddev_equals_numpy(sizes):
    """Any batch: the fewest groups of at most 4 consecutive images, sizes as equal as can be."""
    x = randn(sum(sizes), 3, 2, 4)
    out, first = minibatch_stddev(x)[:, 3].numpy(), 0
    for size in sizes:
        group = x[first : first + size].double().numpy()
        expected = np.sqrt(group.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(out[first : first + size], expected, rtol=1e-6)
        first += size


def test_minibatch_stddev_does_not_know_of_processes():
    """2 processes with 4 images each compute what 1 with 8 does, bit by bit; so does the whole network."""
    torch.manual_seed(0)
    disc, x = StyleGANDiscriminator(3, 16, base=64), randn(8, 3, 16, 16)
    halves = torch.cat([disc(half)[0] for half in x.chunk(2)])
    assert torch.equal(minibatch_stddev(x), torch.cat([minibatch_stddev(half) for half in x.chunk(2)]))
    torch.testing.assert_close(disc(x)[0], halves, rtol=1e-5, atol=1e-6)


def test_minibatch_stddev_is_fp32():
    """On bf16 maps the statistic is rounded once, at the end; a single image has a finite gradient."""
    for x in randn(50, 4, 2, 1, 1).bfloat16():
        expected = x.double().var(0, unbiased=False).add(1e-8).sqrt().mean()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = minibatch_stddev(x)
        assert out.dtype == torch.bfloat16 and (out[:, -1] == expected.bfloat16()).all()
    lone = randn(1, 2, 4, 4).requires_grad_()
    minibatch_stddev(lone).sum().backward()
    assert lone.grad.isfinite().all()


def test_logit_sees_other_images_through_the_statistic_alone():
    """Another image in the group moves a logit; in another group it does not."""
    torch.manual_seed(0)
    disc, x = StyleGANDiscriminator(3, 16, base=64), randn(8, 3, 16, 16)
    other = torch.cat([x[:7], 3 * x[7:]])
    moved = (disc(x)[0] - disc(other)[0]).abs().flatten() > 1e-3
    assert moved.tolist() == [False] * 4 + [True] * 4


def test_checkpoint_holds_weights_alone():
    """The blur's taps are no part of the state: every entry is a parameter."""
    disc = StyleGANDiscriminator(3, 16, base=64)
    assert set(disc.state_dict()) == {name for name, _ in disc.named_parameters()}
