"""The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958; LiteVAE Table 10).

A 1x1 convolution from RGB, one residual block per halving down to 4 x 4, the minibatch standard deviation as
an extra channel, a convolution and two fully connected layers, which give one logit per image. 28,864,129
parameters at 256 pixels, as published.

What differs from the published network: the groups of the minibatch standard deviation are consecutive
images and may differ in size (see `minibatch_stddev`); fully connected layers are convolutions over the whole
map, with the same weights. The network was published with the regulariser `regularisers.r1_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelets import full_precision

MAX_WIDTH = 512
GROUP = 4            # images of the minibatch that share one standard deviation


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2 and gain sqrt 2, which compensates for the halved signal power."""
    return F.leaky_relu(x, 0.2) * 2**0.5


def minibatch_stddev(x: Tensor) -> Tensor:
    """Append the spread within each group of images as a channel: (B, C, H, W) -> (B, C + 1, H, W).

    The channel is constant over a group of up to 4 images: the mean over C, H, W of sqrt(var + 1e-8), where
    var is the biased variance over the images of the group; fp32.

    The batch is split into the fewest groups of consecutive images, whose sizes differ by at most 1: 8 images
    make 4 + 4, 6 make 3 + 3, and a single image has variance 0. Groups never span processes. A process
    therefore computes the same result alone and next to others, and one process with 8 images the same as two
    with 4, as long as the batches are multiples of 4.
    """
    # differs from the paper: its groups stride through the batch, which must be a multiple of the group
    groups = full_precision(x).tensor_split(-(-len(x) // GROUP))
    spread = [(group.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(group)) for group in groups]
    extra = torch.cat(spread).to(x.dtype)[:, None, None, None]
    return torch.cat([x, extra.expand(-1, 1, *x.shape[-2:])], dim=1)


class Blur(nn.Module):
    """Low-pass filter with taps (1, 3, 3, 1) / 8 along both axes and zero padding.

    (B, C, H, W) -> H + 2 padding - 3 rows and W + 2 padding - 3 columns, of which every stride-th is kept.
    """

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8                  # products are exact in bf16, too
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1])


class EqualConv2d(nn.Module):
    """Convolution with an equalised learning rate: N(0, 1) weights, divided by sqrt(fan_in) in each pass.

    Adam's steps do not depend on the gradient's scale, so every layer moves by the same fraction of its size.
    The bias starts at 0 and is not scaled. Kernels are k x k, with `padding` zeros on each side.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0,
                 stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Two convolutions plus a linear skip, blurred before halving: (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Sequential(Blur(padding=2), EqualConv2d(in_channels, out_channels, 3, stride=2))
        # the blur skips every second pixel; in the published network the 1x1 convolution does
        skip = EqualConv2d(in_channels, out_channels, 1, bias=False)
        self.skip = nn.Sequential(Blur(padding=1, stride=2), skip)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.conv2(leaky_relu(self.conv1(x))))
        return (h + self.skip(x)) * 0.5**0.5


class StyleGANDiscriminator(nn.Module):
    """One logit per image: (B, C, res, res) -> ((B, 1, 1, 1),).

    The last layers see the whole image, so `res`, the side of the square images, determines the depth, and
    other sizes are rejected. Raises ValueError unless `res` is a power of two of at least 8, and in `forward`
    if the images have another size. The width at side r is base / r, at most 512.
    """

    heads = 1

    def __init__(self, in_channels: int = 3, res: int = 256, base: int = 32768) -> None:
        super().__init__()
        if res < 8 or res & (res - 1):
            raise ValueError(f"StyleGANDiscriminator takes squares of 8, 16, 32, 64, ... pixels, got {res}: "
                             "choose another --res or another --disc")
        self.stride = self.min_size = self.res = res
        sides = [res >> i for i in range(res.bit_length() - 2)]        # res, res / 2, ..., 4
        widths = [min(base // side, MAX_WIDTH) for side in sides]
        self.from_rgb = EqualConv2d(in_channels, widths[0], 1)
        self.blocks = nn.Sequential(*map(ResidualBlock, widths[:-1], widths[1:]))
        self.conv = EqualConv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.dense = EqualConv2d(widths[-1], widths[-1], 4)
        self.logit = EqualConv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[-2:] != (self.res, self.res):
            raise ValueError(f"this StyleGANDiscriminator takes {self.res}x{self.res} pixels, got "
                             f"{x.shape[-2]}x{x.shape[-1]}: build it for that --res")
        h = self.blocks(leaky_relu(self.from_rgb(x)))                  # (B, w, 4, 4)
        h = leaky_relu(self.conv(minibatch_stddev(h)))
        h = leaky_relu(self.dense(h))                                  # (B, w, 1, 1)
        return (self.logit(h),)
