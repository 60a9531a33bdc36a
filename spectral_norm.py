"""The spectrally normalised convolution (Miyato et al. 2018) of the U-Net and GigaGAN discriminators.

What differs from torch's own: the power iteration runs when it is asked for, not in every forward pass, so
that a step may run the network any number of times and change no state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralConv2d(nn.Conv2d):
    """Convolution with weight W / sigma(W), sigma the largest singular value of W as a matrix (out, in k k).

    sigma = u' W v, where one power iteration per call of `power_iteration` tracks u and v; the forward pass
    changes no state, so it may run any number of times per step. Orthogonal init, so sigma starts exact.
    Kernels of odd size keep H and W, one of 4 with stride 2 halves them.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2)
        nn.init.orthogonal_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", torch.zeros(self.weight[0].numel()))
        self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        matrix = self.weight.flatten(1)
        self.v.copy_(F.normalize(matrix.mT @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        # elementwise, not u @ W @ v: autocast would round a matrix product to bf16
        sigma = (self.u[:, None] * self.weight.flatten(1) * self.v).sum()
        return F.conv2d(x, self.weight / sigma, self.bias, self.stride, self.padding)
