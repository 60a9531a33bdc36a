"""Scale of features and gradients through the decoder, layer by layer (compare the paper's Fig. 3).

    python -m evaluation.feature_scales out/litevae-b-64/ckpt.pt --raw --data PHOTOS --res 64

Each row is a ResBlock, an upsampling or an edge convolution. `feature` is the rms of its output, `largest`
the rms of its largest channel divided by that, `branch` the rms of the residual branch divided by that of the
skip, and `gradient` the rms of dL/d(output) divided by that of dL/d(recon), with L the L1 loss.
"""

import argparse

import torch
from torch import Tensor, nn

import data
from blocks import ResBlock, Upsample
from checkpoint import load_model
from losses import l1_loss
from model import Autoencoder, scale_config


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def feature_scales(model: Autoencoder, x: Tensor) -> list[tuple[str, float, float, float | None, float]]:
    """(name, feature, largest, branch, gradient) per layer of model.decoder, for images x (B, C, H, W).

    The posterior's mean is decoded. Parameters and their gradients are left as they are.
    """
    outputs: dict[str, Tensor] = {}
    branches: dict[str, float] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            outputs[name] = output
            if isinstance(module, ResBlock):
                skip = module.skip(inputs[0])
                branches[name] = rms(output - skip) / rms(skip)
        return hook

    layers = {name: module for name, module in model.decoder.named_modules()
              if isinstance(module, (ResBlock, Upsample)) or name in ("conv_in", "conv_out")}
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    recon, _ = model(x)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(l1_loss(x, recon), list(outputs.values()))
    last = rms(gradients[-1])
    return [(name, rms(y), max(map(rms, y.unbind(1))) / rms(y), branches.get(name), rms(g) / last)
            for (name, y), g in zip(outputs.items(), gradients, strict=True)]


def table(rows: list[tuple]) -> str:
    lines = ["layer          feature  largest   branch  gradient"]
    for name, feature, largest, branch, gradient in rows:
        ratio = "" if branch is None else f"{branch:.3f}"
        lines.append(f"{name:13s} {feature:8.3f} {largest:8.2f} {ratio:>8s} {gradient:9.3f}")
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
    images = data.ValSet(data.open_source(args.data), args.res, args.count)
    x = data.to_float(torch.stack([images[i][0] for i in range(len(images))]))
    print(table(feature_scales(model, x)))


if __name__ == "__main__":
    main()
