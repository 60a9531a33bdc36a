"""Look inside a trained autoencoder: scales of features, gradients and steps through the decoder.

    python analyze.py out/litevae-b-128/ckpt.pt --raw --data PHOTOS --res 64

Columns are explained in evaluation/feature_scales.py.
"""

import torch

import checkpoint
import data
from evaluation.feature_scales import feature_scales, part_steps, table
from runtime import cli, sources
from variants.build import build
from variants.sizes import PRESETS


def parse_args(argv: list[str] | None = None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?",
        help="of train.py (default: --preset before its first step)")
    add("--preset", choices=tuple(PRESETS), default="litevae-b", help="what to initialise without CKPT")
    add("--raw", action="store_true", help="the raw weights, not the averaged ones")
    add("--data", required=True, metavar="SRC", help="images, as in train.py")
    add("--res", type=cli.positive, default=64, help="side of the centre crops, pixels")
    add("--count", type=cli.positive, default=8, help="images")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        torch.manual_seed(0)
        if args.checkpoint:
            model, _ = checkpoint.load_model(args.checkpoint, args.raw)
        else:
            model = build(PRESETS[args.preset])
        source = sources.open_source(args.data)
        images = data.ValSet(source, args.res, args.count, model.config.in_channels)
        batch, broken = data.collate([images[i] for i in range(len(images))])
        if not len(batch):
            raise ValueError(f"no image of {args.data} can be read, the first: {broken[0]}")
        x = data.to_float(batch)
        print(table(feature_scales(model, x)))
        print("\nwhole parts: step, scaled")
        for name in ("encoder", "decoder"):
            print(f"{name}: " + ", ".join(f"{step:.3f}" for step in part_steps(model, x, name)))


if __name__ == "__main__":
    main()
