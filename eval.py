"""Score a checkpoint: PSNR and SSIM of reconstructions.

    python eval.py out/litevae-b-128/ckpt.pt --imagenet-val       # or --data with any images
    torchrun --nproc_per_node=8 eval.py CKPT --imagenet-val       # the same numbers, sooner

Protocol (metrics.py): short side to --res by PIL bicubic, centre crop, posterior mean, EMA weights, fp32, the
reconstruction rounded to 8 bits, every metric from the pair of 8-bit images, mean over images.
"""

import argparse
import json
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import checkpoint
import cli
import data
import distributed
import metrics
from distributed import print0
from model import Autoencoder

DEFAULT = "default"   # --imagenet-val without a folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("ckpt", metavar="CKPT", nargs="?", help="checkpoint of train.py")
    add("--imagenet-val", nargs="?", const=DEFAULT, metavar="DIR",
        help="ImageNet's validation set: class folders, a flat folder or a .tar "
             "(default: $IMAGENET/val or datasets/imagenet/val)")
    add("--data", metavar="SRC", help="any images instead: folders, .tar, .zip, globs, joined by commas")
    add("--res", type=cli.positive, help="side of the square images, pixels (default: the checkpoint's)")
    add("--batch-size", type=cli.positive, default=16, help="images per process")
    add("--limit", type=cli.positive, help="score this many images, spread over the set (default: all)")
    add("--num-workers", type=cli.natural, default=4, help="loader processes per process")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--raw", action="store_true", help="the weights themselves, not their moving average")
    add("--json", metavar="FILE", help="write the scores here")
    add("--grid", metavar="FILE", help="write a picture here: 8 inputs above their reconstructions")
    args = parser.parse_args(argv)
    if args.ckpt is None and args.imagenet_val not in (None, DEFAULT):
        args.ckpt, args.imagenet_val = args.imagenet_val, DEFAULT     # eval.py --imagenet-val ckpt.pt
    if args.ckpt is None:
        parser.error("which checkpoint? for example: eval.py out/litevae-b-128/ckpt.pt --imagenet-val")
    if (args.data is None) == (args.imagenet_val is None):
        parser.error("which images? give either --imagenet-val [DIR] or --data SRC")
    return args


@torch.no_grad()
def write_grid(path: str, model: Autoencoder, images: data.ValSet, device: torch.device) -> None:
    """Eight images spread over the set, above their reconstructions."""
    picks = [images[i * len(images) // 8] for i in range(min(8, len(images)))]
    x = data.to_float(data.collate(picks)[0].to(device))
    pair = torch.cat([x, model(x)[0].clamp(-1, 1)])
    save_image(make_grid(pair / 2 + 0.5, nrow=len(x), padding=2, pad_value=1), path)


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        device = distributed.init(args.device)
        if device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "ieee"        # scores should not depend on the GPU
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        model, state = checkpoint.load_model(args.ckpt, raw=args.raw)
        model = model.to(device)
        res = args.res or state["args"]["res"]
        if res % model.config.downsample_factor:
            raise ValueError(f"--res {res} is not a multiple of {model.config.downsample_factor}")
        if res < 16:
            raise ValueError(f"--res {res} is below 16, the least that SSIM can judge")
        spec = args.data or args.imagenet_val
        spec = data.imagenet_val_spec() if spec == DEFAULT else spec
        source = distributed.from_main(lambda: data.open_source(spec, held_out=True))
        if args.imagenet_val and len(source) != 50_000:
            print0(f"warning: {len(source):,} images, ImageNet has 50,000: compare with no published score")
        images = data.ValSet(source, res, args.limit, channels=model.config.in_channels)
        loader = data.val_loader(images, args.batch_size, args.num_workers, device,
                                 distributed.rank(), distributed.world_size())

    weights = "raw" if args.raw or not state["ema"] else "EMA"
    print0(f"{args.ckpt}: step {state['step']}, {weights} weights; {len(images):,} of {spec} at {res} px")
    bar = tqdm(loader, disable=not distributed.is_main(), dynamic_ncols=True)
    scores = metrics.evaluate(model, data.report_broken(bar, set()), device)
    print0(f"PSNR {scores['psnr']:.3f} dB (std over images {scores['psnr_std']:.2f}, pooled "
           f"{scores['psnr_pooled']:.3f})   SSIM {scores['ssim']:.4f}   N {scores['n']:,}")
    if scores["n"] < len(images):
        print0(f"{len(images) - scores['n']} broken images left out")
    if distributed.is_main():
        for file in filter(None, (args.json, args.grid)):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        if args.json:
            about = {"checkpoint": args.ckpt, "step": state["step"], "weights": weights}
            report = {**scores, **about, "data": spec, "res": res}
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        if args.grid:
            write_grid(args.grid, model, images, device)
    distributed.cleanup()


if __name__ == "__main__":
    main()
