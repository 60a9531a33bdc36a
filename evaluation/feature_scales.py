"""Feature and gradient scales in each layer of the decoder, and where its features are large (paper Fig. 3).

`analyze.py` prints the table of `feature_scales`. Each row is a ResBlock, an upsampling layer, or the first
or last convolution.

    feature   rms of the output
    largest   rms of the largest output channel / feature
    branch    rms of the residual branch / rms of the skip
    gradient  rms of dL/d(output) / its value at the last convolution, where L is the L1 loss
    step      rms of the image's change / rms of the image when only this layer takes Adam's first step
              at 1e-4 (the learning rate times the sign of the gradient)
    scaled    the same with --lr-scaling fan-in
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import l1_loss
from model import Autoencoder, Upsample
from optimizers import rate_scale


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


class Layer(NamedTuple):
    """One row of the table; see the module docstring."""

    name: str
    feature: float
    largest: float
    branch: float | None
    gradient: float
    step: float
    scaled: float


def named_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The rows of the table, in the order in which they run."""
    return {name: module for name, module in decoder.named_modules()
            if hasattr(module, "skip") or isinstance(module, Upsample) or name in ("conv_in", "conv_out")}


def feature_scales(model: Autoencoder, x: Tensor, lr: float = 1e-4) -> list[Layer]:
    """Returns one row per layer of model.decoder, for images x (B, C, H, W) decoded from the posterior mean.

    Parameters keep their values and receive no gradients.
    """
    layers = named_layers(model.decoder)
    inputs, outputs = {}, {}

    def keep(name: str):
        def hook(_, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output
        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    recon, _ = model(x)
    for hook in hooks:
        hook.remove()
    inner = list(outputs.values())
    params = [p for module in layers.values() for p in module.parameters()]
    gradients = torch.autograd.grad(l1_loss(x, recon), [*inner, *params])
    gradient = dict(zip(outputs, gradients[: len(inner)], strict=True))
    weight_gradient = dict(zip(params, gradients[len(inner):], strict=True))

    rows = []
    for name, y in outputs.items():
        module, branch = layers[name], None
        if hasattr(module, "skip"):
            skip = module.skip(inputs[name])
            branch = rms(y - skip) / rms(skip)
        own = {p: weight_gradient[p] for p in module.parameters()}
        steps = [change(model, x, recon, own, lr, scaling) for scaling in (False, True)]
        rows.append(Layer(name, rms(y), max(map(rms, y.unbind(1))) / rms(y), branch,
                          rms(gradient[name]) / rms(gradient["conv_out"]), *steps))
    return rows


def part_steps(model: Autoencoder, x: Tensor, part: str, lr: float = 1e-4) -> list[float]:
    """`step` and `scaled` as above, if the whole encoder or decoder takes Adam's first step."""
    params = list(getattr(model, part).parameters())
    if not params:
        return [0.0, 0.0]
    recon, _ = model(x)
    own = dict(zip(params, torch.autograd.grad(l1_loss(x, recon), params), strict=True))
    return [change(model, x, recon, own, lr, scaling) for scaling in (False, True)]


@torch.no_grad()
def change(model: Autoencoder, x: Tensor, recon: Tensor, own: dict, lr: float, scaling: bool) -> float:
    """rms of the image's change / rms of the image when the parameters in `own` take Adam's first step."""
    before = [p.clone() for p in own]
    for p, g in own.items():
        p.sub_(lr * (rate_scale(p) if scaling else 1.0) * g.sign())
    moved, _ = model(x)
    for p, old in zip(own, before, strict=True):
        p.copy_(old)
    return rms(moved - recon) / rms(recon)


@torch.no_grad()
def feature_norms(model: Autoencoder, x: Tensor) -> dict:
    """Norm of the features at each position of each layer of model.decoder, for images x (B, C, H, W).

    The norm is the rms over channels. `peak`: its maximum over positions divided by its median, a mean over
    images; isolated spots of large features make it large. `pictures`: the norms of the first image, (h, w).
    """
    maps = {}

    def keep(name: str):
        def hook(_, args: tuple[Tensor], output: Tensor) -> None:
            maps[name] = output.float().square().mean(dim=1).sqrt().cpu()
        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in named_layers(model.decoder).items()]
    model(x)
    for hook in hooks:
        hook.remove()
    flat = [norms.flatten(1) for norms in maps.values()]
    peaks = [(norms.amax(dim=1) / norms.median(dim=1).values).mean().item() for norms in flat]
    return {"layer": list(maps), "peak": peaks, "pictures": [norms[0] for norms in maps.values()]}


def table(rows: list[Layer]) -> str:
    lines = ["".join(f"{title:>10s}" for title in Layer._fields)]
    for name, *values in rows:
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append("".join(f"{cell:>10s}" for cell in (name, *cells)))
    return "\n".join(lines)
