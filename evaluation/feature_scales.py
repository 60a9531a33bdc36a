"""Scale of features and gradients through the decoder, layer by layer (compare the paper's Fig. 3).

    python -m evaluation.feature_scales out/litevae-b-64/ckpt.pt --raw --data PHOTOS --res 64

Each row is a ResBlock, an upsampling or an edge convolution.

    feature   rms of its output
    largest   rms of its largest channel / feature
    branch    rms of the residual branch / rms of the skip
    gradient  rms of dL/d(output) / rms of dL/d(recon), with L the L1 loss
    step      rms of the change of the image / rms of the image, if this layer alone takes Adam's first step
              at 1e-4 (the rate times the sign of the gradient)
    scaled    the same with --lr-scaling fan-in
"""

import argparse
from typing import NamedTuple

import torch
from blocks import ResBlock, Upsample
from torch import Tensor

import data
from checkpoint import load_model
from losses import l1_loss
from model import Autoencoder, scale_config
from optimizers import rate_scale
from runtime import sources


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


class Layer(NamedTuple):
    """One row of the table; see the top of this file."""

    name: str
    feature: float
    largest: float
    branch: float | None
    gradient: float
    step: float
    scaled: float


def feature_scales(model: Autoencoder, x: Tensor, lr: float = 1e-4) -> list[Layer]:
    """A row per layer of model.decoder, for images x (B, C, H, W) decoded from the posterior's mean.

    Leaves the parameters as they were and gives them no gradients.
    """
    layers = {name: module for name, module in model.decoder.named_modules()
              if isinstance(module, (ResBlock, Upsample)) or name in ("conv_in", "conv_out")}
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
    weight_gradient = dict(zip(params, gradients[len(inner):], strict=True))

    rows = []
    for name, g in zip(outputs, gradients, strict=False):
        module, y, branch = layers[name], outputs[name], None
        if isinstance(module, ResBlock):
            skip = module.skip(inputs[name])
            branch = rms(y - skip) / rms(skip)
        own = {p: weight_gradient[p] for p in module.parameters()}
        steps = [change(model, x, recon, own, lr, scaling) for scaling in (False, True)]
        rows.append(Layer(name, rms(y), max(map(rms, y.unbind(1))) / rms(y), branch,
                          rms(g) / rms(gradients[len(inner) - 1]), *steps))
    return rows


@torch.no_grad()
def change(model: Autoencoder, x: Tensor, recon: Tensor, own: dict, lr: float, scaling: bool) -> float:
    """rms of the image's change over rms of the image, if these parameters take Adam's first step."""
    before = [p.clone() for p in own]
    for p, g in own.items():
        p.sub_(lr * (rate_scale(p) if scaling else 1.0) * g.sign())
    moved, _ = model(x)
    for p, old in zip(own, before, strict=True):
        p.copy_(old)
    return rms(moved - recon) / rms(recon)


def table(rows: list[Layer]) -> str:
    lines = ["".join(f"{title:>10s}" for title in Layer._fields)]
    for name, *values in rows:
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append("".join(f"{cell:>10s}" for cell in (name, *cells)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="default: LiteVAE-B before its first step")
    parser.add_argument("--raw", action="store_true", help="not the averaged weights")
    parser.add_argument("--data", required=True, metavar="SRC", help="images, as in train.py")
    parser.add_argument("--res", type=int, default=64, help="side of the centre crops, pixels")
    parser.add_argument("--count", type=int, default=8, help="images")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(args.checkpoint, args.raw)[0] if args.checkpoint else Autoencoder(scale_config("B"))
    images = data.ValSet(sources.open_source(args.data), args.res, args.count)
    x = data.to_float(torch.stack([images[i][0] for i in range(len(images))]))
    print(table(feature_scales(model, x)))


if __name__ == "__main__":
    main()
