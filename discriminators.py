"""PatchGAN (Isola et al. 2017, as in taming) and the U-Net discriminator (Schonfeld et al. 2020).

Every discriminator maps images (B, C, H, W) in [-1, 1] to a tuple of logit tensors, one per head, so the
losses treat all discriminators alike. `heads` is the number of heads. Image sides must be multiples of
`stride` and at least `min_size` pixels. DISCRIMINATORS, at the end, builds each discriminator from the
number of channels and the side of the training images.

What differs from the published networks. U-Net: one network serves every size. It has the published layout
for 256 pixels (stride 64), without the linear layer that the original builds and never uses. The image head
pools by 16 x mean instead of a sum, which is equal at 256 pixels and keeps the scale of the logit at other
sizes. The power iteration of the spectral norm runs in `update_spectral_norm` (once per discriminator step),
not in every forward pass. PatchGAN: nothing; batch norm statistics are computed per process.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------
# PatchGAN


class PatchGAN(nn.Module):
    """70x70 patch discriminator with batch norm: (B, C, H, W) -> ((B, 1, H/8 - 2, W/8 - 2),).

    Pass real and fake images in separate calls: each call uses its own batch statistics, on one process. The
    running statistics exist only to match the published layout; nothing reads them.
    """

    stride = 8
    min_size = 32
    heads = 1

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *self.block(width, 2 * width, stride=2),
            *self.block(2 * width, 4 * width, stride=2),
            *self.block(4 * width, 8 * width, stride=1),
            nn.Conv2d(8 * width, 1, 4, padding=1),
        )
        self.apply(self.init_weights)

    @staticmethod
    def block(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=False)
        return conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """As in taming: conv weights N(0, 0.02), batch norm weights N(1, 0.02), default conv biases."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layers(x),)


# ----------------------------------------------------------------------------
# U-Net discriminator


class SpectralConv2d(nn.Conv2d):
    """Convolution with weight W / sigma(W), where sigma is the largest singular value of W as (out, in k k).

    sigma = u' W v, and `power_iteration` updates u and v once. The forward pass changes no
    state, so it may run any number of times per step. The orthogonal initialisation makes sigma exact at the
    start. Odd kernel sizes keep H and W; a 4x4 kernel with stride 2 halves them.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2)
        nn.init.orthogonal_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", torch.zeros(self.weight[0].numel()))
        power_iteration([self])

    def forward(self, x: Tensor) -> Tensor:
        # elementwise, not u @ W @ v: autocast would round a matrix product to bf16
        sigma = (self.u[:, None] * self.weight.flatten(1) * self.v).sum()
        return F.conv2d(x, self.weight / sigma, self.bias, self.stride, self.padding)


@torch.no_grad()
def power_iteration(layers: list[SpectralConv2d]) -> None:
    """v <- W' u, then u <- W v, each scaled to unit length, in all layers at once as far as kernels allow."""
    matrices = [layer.weight.flatten(1) for layer in layers]
    us, vs = [layer.u for layer in layers], [layer.v for layer in layers]
    copy_units(vs, [matrix.mT @ u for matrix, u in zip(matrices, us, strict=True)])
    copy_units(us, [matrix @ v for matrix, v in zip(matrices, vs, strict=True)])


def copy_units(targets: list[Tensor], vectors: list[Tensor]) -> None:
    """Copies vectors of any lengths into `targets`, scaled to unit length."""
    norms = torch._foreach_norm(vectors)
    torch._foreach_clamp_min_(norms, 1e-12)
    torch._foreach_copy_(targets, torch._foreach_div(vectors, norms))


class DownBlock(nn.Module):
    """Residual block and pooling: (B, C, H, W) -> (B, C', H/2, W/2); the first block has no leading ReLU."""

    def __init__(self, in_channels: int, out_channels: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h))
        # pooling and a 1x1 convolution commute, so pooling first saves work and equals the published order
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


class UpBlock(nn.Module):
    """Residual block after nearest upsampling: (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(x), scale_factor=2.0))
        h = self.conv2(F.relu(h))
        return h + F.interpolate(self.skip(x), scale_factor=2.0)


class UNetDiscriminator(nn.Module):
    """Pixel-wise discriminator: (B, C, H, W) -> (pixel logits (B, 1, H, W), image logit (B, 1, 1, 1)).

    Raises ValueError unless H and W are multiples of 64. Widths 16, 32 and 64 are open-LiteVAE's S, M and L.
    """

    stride = 64
    min_size = 64
    heads = 2
    DOWN = (1, 2, 4, 8, 8, 16)          # widths after each halving, in units of `width`
    UP = (8, 8, 4, 2, 1, 1)             # widths after each doubling

    def __init__(self, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        down = [in_channels, *(width * m for m in self.DOWN)]
        self.down = nn.ModuleList(
            DownBlock(a, b, first=i == 0) for i, (a, b) in enumerate(pairwise(down))
        )
        self.image_head = SpectralConv2d(down[-1], 1, 1)
        self.up = nn.ModuleList()
        channels = down[-1]
        for m, skip in zip(self.UP, [*down[-2:0:-1], 0], strict=True):
            self.up.append(UpBlock(channels, width * m))
            channels = width * m + skip
        self.pixel_head = nn.Conv2d(channels, 1, 1)        # the one layer without spectral norm
        nn.init.orthogonal_(self.pixel_head.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        check_size(self, *x.shape[-2:])
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        bottleneck = skips.pop()                                               # (B, 16w, H/64, W/64)
        image = self.image_head(16 * F.relu(bottleneck).mean(dim=(2, 3), keepdim=True))
        x = self.up[0](bottleneck)
        for block in self.up[1:]:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.pixel_head(x), image


# ----------------------------------------------------------------------------
# presets and helpers for all discriminators

# name -> function of (channels, side) of the training images
DISCRIMINATORS = {
    "patch": lambda in_channels, res: PatchGAN(in_channels),
    "unet-s": lambda in_channels, res: UNetDiscriminator(in_channels, width=16),
    "unet-m": lambda in_channels, res: UNetDiscriminator(in_channels, width=32),
    "unet-l": lambda in_channels, res: UNetDiscriminator(in_channels, width=64),
}


def update_spectral_norm(disc: nn.Module) -> None:
    """Run one power iteration in every SpectralConv2d; it depends only on the weights, so ranks agree."""
    layers = [module for module in disc.modules() if isinstance(module, SpectralConv2d)]
    if layers:
        power_iteration(layers)


def check_size(disc: nn.Module, height: int, width: int) -> None:
    """Raise ValueError unless `disc` accepts images of this size."""
    if height % disc.stride or width % disc.stride or min(height, width) < disc.min_size:
        raise ValueError(
            f"{type(disc).__name__} takes multiples of {disc.stride} pixels, at least {disc.min_size}, "
            f"got {height}x{width}: choose another --res or another --disc"
        )
