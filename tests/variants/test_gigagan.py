"""Run: python -m pytest tests/test_gigagan.py. Oracles: torch's attention, scipy, counts by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.special import softmax
from torch import nn

from discriminators import SpectralConv2d, power_iteration
from variants.gigagan import Attention, FeedForward, GigaGANDiscriminator, Head, build_level, l2_attention


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small(in_channels: int = 3) -> GigaGANDiscriminator:
    """Width 4, with nothing left at 0."""
    torch.manual_seed(0)
    disc = GigaGANDiscriminator(in_channels, width=4)
    with torch.no_grad():
        for module in disc.modules():
            if isinstance(module, (Attention, FeedForward)):
                nn.init.normal_(module.out.weight, 0, 0.1)
    return disc.eval()


# ------------------------------------------------------------------------------------------------------------
# layout


def test_parameters():
    """14,772,238, beside open-LiteVAE's 15,046,446 (all heads) and 14,388,452 (the last head alone)."""
    with torch.device("meta"):
        disc = GigaGANDiscriminator()
    widths, before = (32, 64, 128, 256, 256, 256), (32, 32, 64, 128, 256, 256)
    assert [sum(p.numel() for p in conv.parameters()) for conv in disc.from_rgb] == [28 * a for a in before]
    convs = [16 * a * b + b + 2 * (9 * b * b + b) for a, b in zip(before, widths, strict=True)]
    # per layer of depth: two norms; query without bias, value, out; 8 C wide and back from 4 C
    transformer = 2 * (4 * 256 + 3 * 256**2 + 2 * 256 + 9 * 256 + 12 * 256**2)
    expected = [n + transformer * (i in (3, 4)) for i, n in enumerate(convs)]
    assert [sum(p.numel() for p in level.parameters()) for level in disc.levels] == expected
    heads = [3 * (c * c + c) + 2 * (c + 1) for c in (*widths, 1024)]
    assert [sum(p.numel() for p in h.parameters()) for h in (*disc.level_heads, disc.image_head)] == heads
    assert sum(p.numel() for p in disc.parameters()) == 14_772_238


@pytest.mark.parametrize("height, width", [(64, 64), (128, 128), (256, 256), (320, 192)])
def test_output_shapes(height, width):
    """Maps at H/2 to H/64 with 1 to 6 scales each, exact halves, and 6 judgements on the whole image."""
    logits = small()(randn(2, 3, height, width))
    maps = [(2, i + 1, height >> i + 1, width >> i + 1) for i in range(6)]
    assert [tuple(head.shape) for head in logits] == [*maps, (2, 6, 1, 1)]
    assert all(head.isfinite().all() for head in logits)


def test_batch_of_one_and_no_image_sees_another():
    """In training mode, too, an image has the same logits alone as beside others."""
    disc, x = small().train(), randn(3, 3, 64, 64)
    for together, alone in zip(disc(x), disc(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_every_scale_enters_on_its_own():
    """Channel i of every head is what the image gives that is shrunk by 2^i and enters at level i alone."""
    disc, x = small(), randn(2, 3, 128, 64)
    logits = disc(x)
    for i in range(6):
        mean = x.unflatten(2, (-1, 2**i)).unflatten(4, (-1, 2**i)).mean(dim=(3, 5))   # of 2^i x 2^i pixels
        h = F.leaky_relu(disc.from_rgb[i](mean), 0.2) * 2**0.5
        for j in range(i, 6):
            h = disc.levels[j](h)
            torch.testing.assert_close(logits[j][:, i : i + 1], disc.level_heads[j](h), rtol=1e-4, atol=1e-5)
        assert logits[i].shape[1] == i + 1


def test_image_head_is_the_published_one_at_256():
    """There the last map is 4 x 4: a 2x2 convolution with stride 2 and its output flattened, no pooling."""
    disc = small()
    last = []
    disc.levels[5].register_forward_hook(lambda module, args, out: last.append(out))
    logits = disc(randn(1, 3, 256, 256))[-1]
    conv = disc.quarter
    sigma = torch.linalg.svdvals(conv.weight.flatten(1))[0]
    h = F.leaky_relu(F.conv2d(last[0], conv.weight / sigma, conv.bias, stride=2), 0.2) * 2**0.5
    expected = disc.image_head(h.reshape(6, 128, 1, 1))
    torch.testing.assert_close(logits.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5)


def test_head_by_hand():
    """Identity layers on the value 1: (sqrt 2)^3, and sqrt(1/2) per channel of two, beside the linear one."""
    head = Head(2)
    with torch.no_grad():
        for conv in [m for m in head.modules() if isinstance(m, SpectralConv2d)]:
            conv.bias.zero_()
            conv.weight.copy_(torch.eye(2)[: len(conv.weight), :, None, None])
            conv.u.copy_(torch.eye(len(conv.u))[0])
            power_iteration([conv])
    out = head(torch.ones(1, 2, 1, 1))
    assert out.item() == pytest.approx(2**1.5 + 1, rel=1e-6)


def test_every_conv_but_those_of_attention_is_spectral_normed():
    """6 entries, 6 x 3 in the levels, 7 x 5 in the heads and one before the last."""
    disc = small()
    assert sum(isinstance(m, SpectralConv2d) for m in disc.modules()) == 6 + 6 * 3 + 7 * 5 + 1
    plain = [name for name, m in disc.named_modules() if type(m) is nn.Conv2d]
    assert len(plain) == 2 * 2 * (3 + 2) and all(".query" in n or ".value" in n or ".out" in n or
                                                 ".expand" in n for n in plain)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in disc.modules())


# ------------------------------------------------------------------------------------------------------------
# attention


def test_l2_attention_equals_scipy():
    """softmax over j of -||q_i - q_j||^2 / sqrt(d), times v, by scipy's distances."""
    q, v = randn(2, 3, 7, 16, dtype=torch.float64), randn(2, 3, 7, 16, dtype=torch.float64).flip(2)
    out = l2_attention(q, v).numpy()
    for b, h in np.ndindex(2, 3):
        distance = cdist(q[b, h].numpy(), q[b, h].numpy(), "sqeuclidean")
        np.testing.assert_allclose(out[b, h], softmax(-distance / 4, axis=1) @ v[b, h].numpy(), atol=1e-13)


def test_l2_attention_equals_torchs_with_a_bias():
    """To softmax -|q_i - q_j|^2 is 2 q_i q_j - |q_j|^2: torch's attention, scale 2 / sqrt d, with a bias."""
    q, v = randn(2, 4, 9, 8), randn(2, 4, 9, 8).flip(2)
    bias = -(q.square().sum(-1) / 8**0.5)[..., None, :].expand(-1, -1, 9, -1)
    expected = F.scaled_dot_product_attention(q, q, v, attn_mask=bias, scale=2 / 8**0.5)
    torch.testing.assert_close(l2_attention(q, v), expected, rtol=1e-5, atol=1e-6)


def test_l2_attention_is_fp32_under_autocast():
    """bf16 autocast changes no bit."""
    q, v = randn(2, 4, 9, 8), randn(2, 4, 9, 8).flip(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = l2_attention(q, v)
    assert inside.dtype == torch.float32 and torch.equal(inside, l2_attention(q, v))


def test_attention_heads_and_pixels_by_hand():
    """The layer is one attention per quarter of the channels over the pixels, row by row, plus its input."""
    torch.manual_seed(0)
    layer = Attention(32).double()
    nn.init.normal_(layer.out.weight)
    x = randn(2, 32, 3, 5, dtype=torch.float64)
    h = F.group_norm(x, 32, eps=1e-5)
    pixels = h.permute(0, 2, 3, 1).reshape(2, 15, 32)
    q = pixels @ layer.query.weight[:, :, 0, 0].T
    v = pixels @ layer.value.weight[:, :, 0, 0].T + layer.value.bias
    mixed = torch.cat([l2_attention(a, b) for a, b in zip(q.split(8, 2), v.split(8, 2), strict=True)], dim=2)
    expected = mixed @ layer.out.weight[:, :, 0, 0].T + layer.out.bias
    torch.testing.assert_close(layer(x), x + expected.reshape(2, 3, 5, 32).permute(0, 3, 1, 2))


def test_feed_forward_by_hand():
    """GEGLU: the first 4 C channels times gelu of the other 4 C, back to C, plus the input."""
    torch.manual_seed(0)
    layer = FeedForward(32).double()
    nn.init.normal_(layer.out.weight)
    x = randn(1, 32, 2, 3, dtype=torch.float64)
    wide = F.conv2d(F.group_norm(x, 32), layer.expand.weight, layer.expand.bias)
    assert wide.shape[1] == 256
    expected = x + F.conv2d(wide[:, :128] * F.gelu(wide[:, 128:]), layer.out.weight, layer.out.bias)
    torch.testing.assert_close(layer(x), expected)


def test_transformers_start_as_the_identity():
    """A fresh level with attention computes what it computes without; theirs would have halved it."""
    torch.manual_seed(0)
    level = build_level(8, 32, attention=True)
    x = randn(1, 8, 16, 16)
    assert len(level) == 6 + 4
    torch.testing.assert_close(level(x), level[:6](x), rtol=0, atol=0)
