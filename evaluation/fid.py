"""Reconstruction FID, computed in a single pass over image pairs without image files, with exact sums.

The network is the 2015 Inception in pytorch-fid's port, loaded through the clean-fid package. Implementations
differ only in how they resize an image to 299 x 299 and scale its range (PREPARE), so one network serves all
conventions. The distance between Gaussians is that of Heusel et al. 2017; means and covariances are over
images, as usual.

Two details differ from other implementations. The trace term is a nuclear norm, which stays exact if the
covariances are singular; a matrix root of their product does not. Features are rounded to multiples of 2^-21,
which is below fp32 noise, so their float64 sums are exact: neither the order of the images nor the number of
processes changes a single bit.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cleanfid import inception_pytorch
from torch import Tensor, nn

from runtime import distributed

SIDE = 299            # side of Inception's input
GRID = 2.0**21        # features are rounded to multiples of 1 / GRID
COARSE = 2.0**11      # their high parts are multiples of 1 / COARSE
SETS = ("real", "recon")
CHUNKS = 10           # number of jackknife chunks
T_QUANTILE = 2.2622   # 97.5% point of Student's t with CHUNKS - 1 degrees of freedom


# ------------------------------------------------------------------------------------------------------------
# images -> network input: uint8 (B, 1 or 3, H, W) -> float32 (B, 3, 299, 299)


def prepare_pytorch(images: Tensor) -> Tensor:
    """pytorch-fid and clean-fid's legacy_pytorch: bilinear with half-pixel centres, 2 x / 255 - 1."""
    x = F.interpolate(rgb(images), (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x / 255 - 1


def prepare_clean(images: Tensor) -> Tensor:
    """clean-fid's clean mode: antialiased bicubic like PIL's on floats, (x - 128) / 128."""
    x = F.interpolate(rgb(images), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (x.clamp(0, 255) - 128) / 128


def prepare_tf(images: Tensor) -> Tensor:
    """torch-fidelity, TensorFlow 1, ADM: bilinear with the first sample at pixel 0, (x - 128) / 128."""
    x = rgb(images)
    for dim in (-2, -1):
        size = x.shape[dim]
        position = torch.arange(SIDE, device=x.device) * (size / SIDE)
        low = position.floor().long()
        high = (low + 1).clamp(max=size - 1)
        share = (position - low).view(-1, *[1] * (-1 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return (x - 128) / 128


def rgb(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


PREPARE: dict[str, Callable[[Tensor], Tensor]] = {
    "pytorch": prepare_pytorch, "clean": prepare_clean, "tf": prepare_tf,
}


# ------------------------------------------------------------------------------------------------------------
# network input -> features


class Inception(nn.Module):
    """clean-fid's InceptionV3 with the given weights: (B, 3, 299, 299) -> (B, 2048), frozen, eval mode.

    Raises ValueError if the weights belong to another network.
    """

    dims = 2048

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        # clean-fid's constructor would download its weights in every process and unpickle them unchecked;
        # give it the tensors that weights.py has loaded safely and hashed
        load = inception_pytorch.load_state_dict_from_url
        inception_pytorch.load_state_dict_from_url = lambda *_, **__: state
        try:
            self.net = inception_pytorch.InceptionV3([3], resize_input=False, normalize_input=False)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"these are not the weights of FID's Inception ({reason})") from error
        finally:
            inception_pytorch.load_state_dict_from_url = load
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0].flatten(1)


def to_grid(features: Tensor) -> Tensor:
    """fp32 features -> float64, rounded to multiples of 2^-21 (a change of at most 2.4e-7)."""
    return (features.double() * GRID).round() / GRID


# ------------------------------------------------------------------------------------------------------------
# features -> mean and covariance


class Moments:
    """Count, sum and outer products of rows in float64, kept per chunk so that a chunk can be left out.

    Each row is split into x = high + low, where high is a multiple of 2^-11, and its outer product into two
    parts: high high^T and the rest, x low^T + low high^T. If x is on the grid, |x| < 32 and there are fewer
    than 2^16 rows, each part is an integer below 2^53 times a fixed step, so every sum is exact. Otherwise
    the sums have ordinary float64 accuracy.
    """

    def __init__(self, dims: int, chunks: int, device: torch.device) -> None:
        zeros = dict(dtype=torch.float64, device=device)
        self.n = torch.zeros(chunks, **zeros)
        self.sum = torch.zeros(chunks, dims, **zeros)
        self.outer = torch.zeros(2, chunks, dims, dims, **zeros)

    def add(self, rows: Tensor, chunk: Tensor) -> None:
        """rows: (B, dims) in float64; chunk: (B,), the chunk number of each row."""
        high = (rows * COARSE).round() / COARSE
        low = rows - high
        for c in chunk.unique().tolist():
            mine = chunk == c
            x, upper, lower = rows[mine], high[mine], low[mine]
            self.n[c] += len(x)
            self.sum[c] += x.sum(dim=0)
            self.outer[0, c] += upper.T @ upper
            self.outer[1, c] += x.T @ lower + lower.T @ upper

    def reduce(self) -> None:
        """Sums over all processes, in place."""
        for part in (self.n, self.sum, self.outer):
            distributed.sum_(part)

    def gaussian(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean (dims,) and covariance (dims, dims), normalised by n - 1, of all chunks except `without`."""
        kept = [c for c in range(len(self.n)) if c != without]
        n = self.n[kept].sum()
        mean = self.sum[kept].sum(dim=0) / n
        outer = self.outer[0, kept].sum(dim=0) + self.outer[1, kept].sum(dim=0)
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr cov_a + tr cov_b - 2 |cov_a^1/2 cov_b^1/2|_*, in float64 (Heusel et al. 2017).

    The nuclear norm equals tr (cov_a cov_b)^1/2. It is invariant to the outer eigenvector rotations, so the
    roots are computed without them. The distance is 0 for equal arguments of any rank.
    """
    (values_a, vectors_a), (values_b, vectors_b) = torch.linalg.eigh(cov_a), torch.linalg.eigh(cov_b)
    roots_a, roots_b = values_a.clamp(min=0).sqrt(), values_b.clamp(min=0).sqrt()
    product = roots_a[:, None] * (vectors_a.T @ vectors_b) * roots_b
    trace = torch.linalg.svdvals(product).sum()
    difference = (mean_a - mean_b).square().sum()
    return (difference + cov_a.trace() + cov_b.trace() - 2 * trace).item()


# ------------------------------------------------------------------------------------------------------------
# the metric


class RFID:
    """Collects image pairs batch by batch and computes the distance in each convention.

    net: (B, 3, 299, 299) -> (B, net.dims), run in fp32. chunk_of: the chunk of each image (see `chunks`). At
    2048 dimensions and two conventions, 10 chunks take 2.7 GB and a single chunk takes .3 GB. With mps, which
    has no float64, the sums are on the CPU.
    """

    def __init__(self, net: nn.Module, conventions: Sequence[str], chunk_of: Tensor, device: torch.device
                 ) -> None:
        self.net, self.conventions = net, conventions
        self.home = torch.device("cpu") if device.type == "mps" else device
        self.chunk_of, self.chunks = chunk_of, int(chunk_of.max()) + 1
        self.moments = {(convention, name): Moments(net.dims, self.chunks, self.home)
                        for convention in conventions for name in SETS}

    @torch.no_grad()
    def add(self, real: Tensor, recon: Tensor, numbers: Tensor) -> None:
        """uint8 (P, C, H, W) twice. numbers: (B,), for the first B <= P images; the others are padding."""
        chunk = self.chunk_of[numbers].to(self.home)
        for convention in self.conventions:
            for name, images in zip(SETS, (real, recon), strict=True):
                with torch.autocast(images.device.type, enabled=False):
                    features = self.net(PREPARE[convention](images))[: len(numbers)]
                self.moments[convention, name].add(to_grid(features.to(self.home)), chunk)

    def result(self) -> dict[str, float]:
        """Computes rfid_<convention> and, with several chunks, rfid_<convention>_se over all processes.

        Every process must call it, and all get the same result. Raises ValueError if a Gaussian would be
        fitted to fewer than 2 images.
        """
        for moments in self.moments.values():
            moments.reduce()
        n = self.moments[self.conventions[0], "real"].n
        if n.sum() - (n.max() if self.chunks > 1 else 0) < 2 or (self.chunks > 1 and n.min() < 1):
            raise ValueError(f"{int(n.sum())} images are too few for a covariance")
        return distributed.from_main(self._distances)

    def _distances(self) -> dict[str, float]:
        result = {}
        for convention in self.conventions:
            real, recon = (self.moments[convention, name] for name in SETS)
            result[f"rfid_{convention}"] = frechet(*real.gaussian(), *recon.gaussian())
            if self.chunks > 1:
                parts = [frechet(*real.gaussian(c), *recon.gaussian(c)) for c in range(self.chunks)]
                result[f"rfid_{convention}_se"] = jackknife(parts)
        return result


def chunks(size: int, count: int) -> Tensor:
    """Assigns `size` images at random, with a fixed seed, to `count` chunks of equal size."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0)) % count


def jackknife(parts: Sequence[float]) -> float:
    """Standard error of a statistic, from its values with each equal-sized chunk left out (Efron 1982)."""
    mean = math.fsum(parts) / len(parts)
    return math.sqrt((len(parts) - 1) / len(parts) * math.fsum((part - mean) ** 2 for part in parts))
