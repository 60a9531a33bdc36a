"""A linear autoencoder, and resampling as matrices, in NumPy and float64: oracles for equivariance."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Autoencoder, LiteVAEConfig

F_, Z = 4, 2    # pixels per latent position, latent channels


class LinearDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(Z, 1, F_, F_))

    def features(self, z: Tensor) -> Tensor:
        return z

    def head(self, features: Tensor) -> Tensor:
        return F.conv_transpose2d(features, self.weight, stride=F_)


class LinearAutoencoder(Autoencoder):
    """Each block of 4 x 4 grey pixels becomes two numbers and back, by two matrices; logvar is 0; float64.

    mean=True: the first number is the mean of the block, the second is 0, and the mean is what is decoded.
    """

    def __init__(self, seed: int = 0, mean: bool = False) -> None:
        super().__init__(LiteVAEConfig(in_channels=1, latent_channels=Z, levels=2))
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for weight, value in ((self.encoder.weight, 1 / F_**2), (self.decoder.weight, 1.0)):
            weight.data.normal_(0, 0.3, generator=generator)
            weight.data[Z:] = 0
            if mean:
                weight.data[:] = 0
                weight.data[0] = value

    def make_parts(self) -> None:
        self.encoder, self.decoder = nn.Conv2d(1, 2 * Z, F_, stride=F_, bias=False), LinearDecoder()

    def init_weights(self) -> None:
        pass

    def numpy_encode(self, x: np.ndarray) -> np.ndarray:
        B, _, H, W = x.shape
        blocks = x.reshape(B, H // F_, F_, W // F_, F_)
        return np.einsum("kuv,biujv->bkij", self.encoder.weight.detach().numpy()[:Z, 0], blocks)

    def numpy_decode(self, z: np.ndarray) -> np.ndarray:
        B, _, h, w = z.shape
        images = np.einsum("kuv,bkij->biujv", self.decoder.weight.detach().numpy()[:, 0], z)
        return images.reshape(B, 1, h * F_, w * F_)


def triangle(t: np.ndarray) -> np.ndarray:
    return np.maximum(1 - abs(t), 0)


def keys(t: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2."""
    t = abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def resize_matrix(side: int, smaller: int, kernel) -> np.ndarray:
    """(smaller, side): the kernel, widened by the factor and centred on each new pixel; rows sum to 1."""
    factor = side / smaller
    centres, pixels = (np.arange(smaller) + 0.5) * factor, np.arange(side) + 0.5
    rows = kernel((pixels - centres[:, None]) / factor)
    return rows / rows.sum(axis=1, keepdims=True)


def numpy_resize(x: np.ndarray, height: int, width: int, kernel=triangle) -> np.ndarray:
    rows, columns = resize_matrix(x.shape[2], height, kernel), resize_matrix(x.shape[3], width, kernel)
    return rows @ x @ columns.T
