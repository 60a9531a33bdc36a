"""The optimizers of an autoencoder: the paper's Adam, with lower rates for wide layers, and Muon.

**Adam** moves every weight by about the learning rate. Early in training, when gradients agree, that turns
all the filters of a wide layer the same way at once; `rate_scale` keeps such a step small at every width.

**Muon** (Jordan et al. 2024) replaces the momentum U S V^T of a weight matrix by U V^T, so that a step moves
all directions equally. The first and last convolutions of each network, biases, norms, gains and codebooks
stay with Adam. The update has the size of Adam's (Liu et al. 2025, arXiv 2502.16982): 0.2 sqrt(max(m, n)) lr,
so one --lr serves both. Momentum and polynomial are those of torch.optim.Muon, which takes matrices only.
What differs: a convolution (C', C, k, k) is the matrix (C', C k k), the iteration runs on the Gram matrix in
fp32 ("Gram Newton-Schulz", Dao AI Lab 2026), and processes share the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from runtime import distributed

# ----------------------------------------------------------------------------
# Adam

FULL_RATE_INPUTS = 144  # ours: a 3x3 convolution of 16 channels; with 216 the start is unsteady


def adam(params: list[nn.Parameter], scaling: str = "none") -> torch.optim.Adam:
    """The paper's Adam. Each group carries `scale`, its learning rate relative to the flag's."""
    groups: dict[float, list[nn.Parameter]] = {}
    for p in params:
        groups.setdefault(rate_scale(p) if scaling == "fan-in" else 1.0, []).append(p)
    return torch.optim.Adam([dict(params=group, scale=scale) for scale, group in groups.items()],
                            betas=(0.5, 0.9), fused=True)


def rate_scale(p: nn.Parameter) -> float:
    """min(1, 144 / inputs of an output): 1 for vectors and up to 16 channels, 1/32 for a 3x3 conv of 512.

    Adam moves each weight by about the rate. Early in training these moves agree, so an output moves by the
    rate times its number of inputs: at 1e-4 one step changes the image of LiteVAE's default decoder by
    32 times its own size (docs/training.md). The theory of wide networks divides the rate by the number
    of inputs (Yang et al. 2022, arXiv 2203.03466, Table 3). A ViT's position embedding has no inputs, but
    counts as a matrix of its width.
    """
    # differs from the paper: it has one rate for all
    return min(1.0, FULL_RATE_INPUTS / p[0].numel()) if p.ndim > 1 else 1.0


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; each group takes its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


# ----------------------------------------------------------------------------
# Muon

POLYNOMIAL = (3.4445, -4.7750, 2.0315)   # a x + b x^3 + c x^5 on singular values (Jordan et al. 2024)
ITERATIONS = 5
EDGES = ("conv_in", "init_conv", "conv_out", "quant_conv", "post_quant_conv")   # first and last layers


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters for Muon (weights of inner convolutions and linear layers), and all others."""
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and name.rsplit(".", 1)[-1] not in EDGES}
    # a depthwise convolution is no matrix: its filters share no input
    matrices = {id(layer.weight) for layer in layers.values() if getattr(layer, "groups", 1) == 1}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) in matrices], [p for p in trainable if id(p) not in matrices]


class Muon(torch.optim.Optimizer):
    """p <- p - lr 0.2 sqrt(max(m, n)) orthogonalise(g + momentum (buffer - g)), buffer the average of g.

    params: tensors of two or more dimensions, (m, ...) read as (m, n). Every process holds every buffer; with
    several processes each orthogonalises its share of the matrices, and a sum over processes joins them.
    As in torch's fused optimizers, a step changes nothing if `found_inf`, a tensor set from outside, is 1.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.found_inf = torch.zeros((), device=params[0].device)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, good = group["params"], 1 - self.found_inf
            averages = [self.average(p, group["momentum"], good) for p in params]
            for p, update in zip(params, share_work(averages), strict=True):
                size = 0.2 * max(update.shape) ** 0.5
                p.addcmul_(update.view_as(p), good, value=-group["lr"] * size)

    def average(self, p: nn.Parameter, momentum: float, good: Tensor) -> Tensor:
        """Nesterov's average of the gradient as a matrix (m, n); finite, and kept, if `good` is 0."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"]
        grad = torch.where(good > 0, p.grad, 0)
        buffer.lerp_(grad, (1 - momentum) * good)
        return grad.lerp(buffer, momentum).flatten(1)


def share_work(matrices: list[Tensor]) -> list[Tensor]:
    """All matrices orthogonalised, a share in each process."""
    world, rank = distributed.world_size(), distributed.rank()
    load, owner = [0.0] * world, {}
    for i in sorted(range(len(matrices)), key=lambda i: -flops(*matrices[i].shape)):
        owner[i] = load.index(min(load))                  # the largest first, to the least busy
        load[owner[i]] += flops(*matrices[i].shape)
    mine = sorted((i for i in owner if owner[i] == rank), key=lambda i: tuple(matrices[i].shape))
    joined = torch.zeros(sum(m.numel() for m in matrices), device=matrices[0].device)
    updates = [part.view_as(m) for part, m in
               zip(joined.split([m.numel() for m in matrices]), matrices, strict=True)]
    for _, same in groupby(mine, key=lambda i: matrices[i].shape):
        batch = list(same)                                # one batched product instead of many small ones
        results = orthogonalise(torch.stack([matrices[i] for i in batch]))
        for i, result in zip(batch, results, strict=True):
            updates[i].copy_(result)
    distributed.sum_(joined)                              # each entry has one owner, the rest hold 0: exact
    return updates


def orthogonalise(x: Tensor) -> Tensor:
    """U S' V^T of matrices x = U S V^T (..., m, n), S' about 0.7 to 1.2: five Newton-Schulz iterations.

    x <- a x + b x x^T x + c (x x^T)^2 x costs two products with x. All its factors are polynomials in x x^T
    and commute, so they are multiplied up as m x m matrices and applied once. That squares the condition of
    x, so it needs fp32 in full: in TF32 the small eigenvalues turn negative and the iteration blows up.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    a, b, c = POLYNOMIAL
    with full_fp32():
        x = x.float()
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        gram, product = x @ x.mT, None
        for i in range(ITERATIONS):
            factor = b * gram + c * (gram @ gram)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            if i < ITERATIONS - 1:                        # the Gram matrix of factor @ x
                gram = factor @ gram @ factor
        return product @ x


def flops(m: int, n: int) -> int:
    """Floating-point operations of `orthogonalise` on an m x n matrix, m <= n: 4 m^2 n + 34 m^3.

    The direct form takes 5 (4 m^2 n + 2 m^3), which is 2.7 times as much for 512 x 4608.
    """
    m, n = min(m, n), max(m, n)
    products = ITERATIONS + (ITERATIONS - 1) + 2 * (ITERATIONS - 1)     # gram^2, product, next gram
    return 2 * (2 * m * m * n) + products * 2 * m**3


@contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 in products on CUDA."""
    matmul = torch.backends.cuda.matmul
    saved, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = saved
