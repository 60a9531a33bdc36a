"""The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958; LiteVAE Table 10).

From RGB, one residual block per halving down to 4 x 4, the minibatch's standard deviation as one more
channel, a convolution and two fully connected layers: one logit per image. 28,864,129 parameters at 256
pixels, as published.

What differs from the published net: the groups of the minibatch standard deviation are consecutive images
and may differ in size (see `minibatch_stddev`); a fully connected layer is a convolution over the whole
map, which has the same weights. The regulariser that it was published with is `regularisers.r1_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelets import full_precision

MAX_WIDTH = 512
GROUP = 4            # images of the minibatch that share one standard deviation


def leaky_relu(x: Tensor) -> Tensor:
    """Slope 0.2, times sqrt 2, which restores the scale of what it halves."""
    return F.leaky_relu(x, 0.2) * 2**0.5


def minibatch_stddev(x: Tensor) -> Tensor:
    """Append how much the images of a group differ: (B, C, H, W) -> (B, C + 1, H, W).

    One number per group of up to 4 images, the same at each of their pixels: the mean over C, H, W of
    sqrt(var + 1e-8), var the biased variance over the images of the group; fp32.

    The batch is cut into the fewest groups of consecutive images that differ in size by 1 at most: 8 images
    make 4 + 4, 6 make 3 + 3, 1 has no variance. No process looks at another's images. Hence a process
    computes the same whether it runs alone or beside others with the same batch of its own, and 1 process
    with 8 images the same as 2 with 4, as long as the batches are multiples of 4.
    """
    # differs from the paper: it strides through the batch and takes multiples of the group only
    groups = full_precision(x).tensor_split(-(-len(x) // GROUP))
    spread = [(group.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(group)) for group in groups]
    extra = torch.cat(spread).to(x.dtype)[:, None, None, None]
    return torch.cat([x, extra.expand(-1, 1, *x.shape[-2:])], dim=1)


class Blur(nn.Module):
    """Low-pass filter with taps (1, 3, 3, 1) / 8 along both axes and zeros outside.

    (B, C, H, W) -> H + 2 padding - 3 rows and as many columns for W, every stride-th of them.
    """

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8                  # their products are exact in bf16, too
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1])


class EqualConv2d(nn.Module):
    """Convolution with an equalised learning rate: weights of N(0, 1), divided by sqrt(fan_in) in each pass.

    So Adam, whose steps do not depend on a gradient's scale, moves every layer by the same share of its size.
    Bias from 0, not scaled. k x k kernels, `padding` zeros on each side.
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
    """Two convolutions beside a linear skip, blurred before they halve: (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Sequential(Blur(padding=2), EqualConv2d(in_channels, out_channels, 3, stride=2))
        # the blur leaves every second pixel out, which the published 1x1 convolution would do
        skip = EqualConv2d(in_channels, out_channels, 1, bias=False)
        self.skip = nn.Sequential(Blur(padding=1, stride=2), skip)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.conv2(leaky_relu(self.conv1(x))))
        return (h + self.skip(x)) * 0.5**0.5


class StyleGANDiscriminator(nn.Module):
    """One logit per image: (B, C, res, res) -> ((B, 1, 1, 1),).

    The last layers see the whole image, so the depth follows from `res`, the side of the square images that
    this network takes and no others. ValueError unless it is a power of two, at least 8, and from `forward`
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
