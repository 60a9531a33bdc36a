"""Look inside an autoencoder: scales through the decoder and, with --out, a folder of plots and a JSON.

    python analyze.py out/litevae-b-128/ckpt.pt --data PHOTOS --res 128 --out analysis
    python analyze.py --diffusers sd-vae-ft-mse --data PHOTOS --res 256 --out analysis
    python analyze.py out/litevae-b-128/ckpt.pt --raw --data PHOTOS --res 64      # only the decoder's table

The columns of the table are explained in evaluation/feature_scales.py, everything else in docs/analysis.md.
"""

import argparse
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from evaluation import analyses, models, plots
from evaluation.feature_scales import feature_scales, part_steps, table
from model import Autoencoder
from runtime import cli, distributed, files, sources
from runtime.failures import failures
from variants.build import build
from variants.sizes import PRESETS

RESOLUTIONS = [32, 64, 128, 256, 512]    # paper Fig. 5
PACKAGES = ("torch", "torchvision", "numpy", "pillow")


# ------------------------------------------------------------------------------------------------------------
# flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    models.add_flags(parser, "that of --preset")
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS),
        help="what to initialise and analyse, untrained, if no model is named (default: litevae-b)")
    add("--data", required=True, metavar="SRC", help="images, as in train.py")
    add("--res", type=cli.positive, default=64, help="side of the centre crops, pixels")
    add("--count", type=cli.positive, default=8, help="images for the table of the decoder and for pictures")
    output = parser.add_argument_group("with --out").add_argument
    output("--out", metavar="DIR", help="write analysis.json and a PNG for each analysis here")
    output("--samples", type=cli.positive, default=64, help="images for the statistics")
    output("--resolutions", type=cli.resolutions, default=RESOLUTIONS, metavar="N[,N]",
           help="sides at which PSNR and SSIM are computed, pixels; a ViT has only one")
    output("--batch-size", type=cli.positive, default=16, help="images of --res at a time")
    output("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if len(models.named(args)) > 1:
        parser.error("give one of a checkpoint, --diffusers, --open-litevae and --model")
    if args.preset and models.named(args):
        parser.error(f"--preset {args.preset} is for an untrained model, got {models.named(args)[0]}, too")
    if args.model and not args.out:
        parser.error("--model has no decoder to look into; give --out for what its images show")
    return args


# ------------------------------------------------------------------------------------------------------------
# set-up


def open_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Returns the network in eval mode and the report's entries about it: without a name, of --preset."""
    if models.named(args) or args.raw:
        return models.open_model(args)
    torch.manual_seed(0)
    name = args.preset or "litevae-b"
    print(f"no model is named: analysing {name}, untrained")
    config = PRESETS[name]
    return build(config).eval(), {"checkpoint": f"{name}, untrained", "config": asdict(config)}


def resolutions(args: argparse.Namespace, network: nn.Module) -> list[int]:
    bound = isinstance(network, Autoencoder) and network.config.resolution
    return [bound] if bound else args.resolutions


def read(images: data.ValSet) -> Tensor:
    """The images, uint8 (N, C, H, W), without broken files; ValueError if all are broken."""
    batch, broken = data.collate([images[i] for i in range(len(images))])
    if not len(batch):
        raise ValueError(f"no image of {images.source.spec} can be read, the first: {broken[0]}")
    return batch


def set_up(args: argparse.Namespace) -> tuple[analyses.Subject, dict]:
    """Returns the model with its images and the report's entries about both; ValueError for wrong flags."""
    device = distributed.init(args.device)
    models.exact_fp32(device)
    network, about = open_model(args)
    network = network.to(device)
    channels = models.check_res(args.res, network)
    if args.model:
        with torch.no_grad():                                         # raises on a wrong output
            network(torch.zeros(1, channels, args.res, args.res, device=device))
    source = sources.open_source(args.data, held_out=bool(args.out))
    images = few = read(data.ValSet(source, args.res, args.count, channels))
    sets = []                                                         # at other resolutions
    if args.out:
        sides = resolutions(args, network)
        for side in sides:
            models.check_res(side, network, "--resolutions")
        samples = data.ValSet(source, args.res, args.samples, channels)
        images = read(samples)
        about["broken"] = len(samples) - len(images)
        sets = [data.ValSet(source, side, args.samples, channels) for side in sides]
        Path(args.out).mkdir(parents=True, exist_ok=True)
    log = Path(args.ckpt).parent / "log.jsonl" if args.ckpt else None
    weight = about.get("training", {}).get("args", {}).get("disc_weight", 0.0)
    subject = analyses.Subject(network, device, images, few, sets, args.batch_size, log, weight)
    about |= {"data": source.spec, "res": args.res, "n": len(images), "device": device.type,
              "versions": {name: version(name) for name in PACKAGES}}
    return subject, about


# ------------------------------------------------------------------------------------------------------------
# output


def print_table(model: Autoencoder, x: Tensor) -> None:
    print(table(feature_scales(model, x)))
    print("\nwhole parts: step, scaled")
    for name in ("encoder", "decoder"):
        print(f"{name}: " + ", ".join(f"{step:.3f}" for step in part_steps(model, x, name)))


def write(out: Path, about: dict, results: dict[str, dict], unavailable: dict[str, str]) -> None:
    """Writes the JSON, then the pictures; no picture of an earlier call remains.

    OSError if the disk is full: the file that had no room is then that of the earlier call.
    """
    report = analyses.plain({**about, **results, "unavailable": unavailable})
    with files.whole(out / "analysis.json") as file:
        file.write(f"{analyses.to_json(report)}\n".encode())
    for analysis in analyses.ANALYSES:
        path = out / f"{analysis.name}.png"
        if analysis.name in results and plots.available():
            with files.whole(path) as file:
                analysis.draw(results[analysis.name]).savefig(file, format="png")
        else:
            path.unlink(missing_ok=True)
    if not plots.available():
        print("warning: no pictures, since matplotlib is missing: pip install -r requirements-plots.txt")


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        subject, about = set_up(args)
    if not args.out:
        print_table(subject.model, subject.x)
    else:
        print(f"{about['n']} images of {about['data']}, {args.res} px; {about['broken']} broken")
        results, unavailable = analyses.measure(subject, print)
        with failures("the files of an earlier call are unchanged"):
            write(Path(args.out), about, results, unavailable)
        print(f"wrote {args.out}/analysis.json")


if __name__ == "__main__":
    main()
