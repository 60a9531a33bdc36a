"""Score an autoencoder: rFID, PSNR, SSIM and LPIPS of its reconstructions, under a documented protocol.

    python eval.py out/litevae-b-128/ckpt.pt --imagenet-val       # or --data SRC for other images
    torchrun --nproc_per_node=8 eval.py CKPT --imagenet-val       # the same scores, faster
    python eval.py CKPT --data photos --res 64,128,256 --plot curve.png
    python eval.py --diffusers sd-vae-ft-mse --data photos --res 256        # or --open-litevae, --model

Default protocol: short side resized to --res by PIL bicubic, centre crop, posterior mean, EMA weights, fp32,
reconstructions rounded to 8 bits, all metrics computed from the pair of 8-bit images (others: see
metrics.PROTOCOLS). Metrics whose weights are missing are reported as unavailable; the exit code is 3 if
--metrics named one of them.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from checkpoint import SHIPPED
from evaluation import fid, metrics, models, report
from runtime import cli, distributed, sources, weights
from runtime.distributed import print0
from runtime.failures import failures

DEFAULT = "default"   # --imagenet-val without a folder
IMAGENET_VAL = 50_000
NETWORK_METRICS = {   # name: network of weights.URLS
    "lpips_vgg": "vgg", "lpips_alex": "alex", "lpips_squeeze": "squeeze", "rfid": "inception",
}
WANTED = ("lpips_vgg", "lpips_alex", "rfid")    # without --metrics
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "lpips", "clean-fid")
BIAS = ("for Gaussian features with a true rFID of .40, paired as here, 1,000 images give 5.75, 5,000 give "
        "1.61 and 50,000 give .52; compare rFID only at equal N")


# ------------------------------------------------------------------------------------------------------------
# flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    models.add_flags(parser, "weights/litevae-tiny.pt")
    images = parser.add_argument_group("images").add_argument
    images("--imagenet-val", nargs="?", const=DEFAULT, metavar="PATH",
           help="ImageNet's 50,000 validation images: class folders, a flat folder, tars, or a folder that "
                "contains one of these (default: below $IMAGENET, datasets/imagenet or LDM's cache)")
    images("--data", metavar="SRC",
           help="other images: folders, .tar, .zip, globs, {0000..0252} ranges, joined by commas; or "
                "'synthetic'")
    images("--res", type=cli.resolutions, metavar="N[,N]",
           help="side of the square images, pixels; several values give a curve (default: the checkpoint's)")
    images("--limit", type=cli.positive, help="score this many images, spread over the set (default: all)")
    images("--listing-cache", action=argparse.BooleanOptionalAction, default=True,
           help="keep long listings of files in ~/.cache/litevae and use them while nothing has changed")
    scores = parser.add_argument_group("scores").add_argument
    scores("--protocol", choices=tuple(metrics.PROTOCOLS), default="default", help="evaluation protocol")
    scores("--metrics", type=metric_names, metavar="NAME[,NAME]",
           help="psnr, ssim, lpips (vgg and alex), lpips_vgg, lpips_alex, lpips_squeeze, rfid (default: all "
                "but squeeze); PSNR and SSIM are always computed")
    scores("--jackknife", action="store_true",
           help="compute the 95 percent interval of rFID; takes 2.7 GB and runs its last step 11 times")
    scores("--vgg-file", metavar="FILE", help="LPIPS VGG weights (default: torch hub's cache)")
    scores("--alex-file", metavar="FILE", help="LPIPS Alex weights (default: torch hub's cache)")
    scores("--inception-file", metavar="FILE", help="rFID Inception weights (default: torch hub's cache)")
    output = parser.add_argument_group("output").add_argument
    output("--json", metavar="FILE", help="write scores, intervals, protocol and versions here")
    output("--per-image", metavar="FILE", help="write each image's scores here, as CSV")
    output("--grid", metavar="FILE", help="write 8 inputs above their reconstructions here")
    output("--extremes", metavar="FILE", help="write the images with the lowest and highest PSNR here")
    output("--extremes-count", type=cli.positive, default=8, help="number of images at each extreme")
    output("--plot", metavar="FILE", help="write a plot of the scores over several --res here")
    system = parser.add_argument_group("system").add_argument
    system("--precision", choices=("fp32", "bf16"), default="fp32", help="model precision; metrics use fp32")
    system("--batch-size", type=cli.positive, default=16, help="images per process")
    system("--num-workers", type=cli.natural, default=data.default_workers(),
           help="data loader workers per process; unless given, 4 or the number of cores if smaller")
    system("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if not models.named(args) and (args.imagenet_val or "").endswith(".pt"):
        args.ckpt, args.imagenet_val = args.imagenet_val, DEFAULT     # eval.py --imagenet-val ckpt.pt
    if not models.named(args):
        args.ckpt = str(SHIPPED)
        print0("no model is named: scoring weights/litevae-tiny.pt")
    if len(models.named(args)) != 1:
        parser.error("give one of a checkpoint, --diffusers, --open-litevae and --model; for example: "
                     "eval.py out/litevae-b-128/ckpt.pt --imagenet-val")
    if (args.data is None) == (args.imagenet_val is None):
        parser.error("give either --imagenet-val [PATH] or --data SRC")
    return args


def metric_names(text: str) -> list[str]:
    names = []
    for word in text.lower().replace("-", "_").split(","):
        names += ["lpips_vgg", "lpips_alex"] if word == "lpips" else [word]
    for name in names:
        if name not in (*NETWORK_METRICS, "psnr", "ssim"):
            raise argparse.ArgumentTypeError(f"unknown metric {name!r}; choose from psnr, ssim, lpips, "
                                             f"{', '.join(NETWORK_METRICS)}")
    return names


# ------------------------------------------------------------------------------------------------------------
# set-up: model, images, networks of the metrics


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that this model or the other flags do not support."""
    if not args.ckpt and args.res is None:
        raise ValueError("give --res; only checkpoints from train.py record their training resolution")
    if args.jackknife and "rfid" not in (args.metrics or WANTED):
        raise ValueError("--jackknife is the interval of rFID, which --metrics leaves out")
    if args.model and metrics.PROTOCOLS[args.protocol].sample:
        raise ValueError(f"--protocol {args.protocol} samples a posterior, but --model has none")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError for files that could not be written in the end."""
    for flag in ("json", "per_image", "grid", "extremes", "plot"):
        path = Path(getattr(args, flag) or "x.png")
        what = f"--{flag.replace('_', '-')} {path}"
        if path.is_dir():
            raise ValueError(f"{what} is a folder: name a file")
        if not next(parent for parent in path.absolute().parents if parent.exists()).is_dir():
            raise ValueError(f"{what} cannot be written: a part of its path is a file")
        if flag in ("grid", "extremes", "plot") and path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ValueError(f"{what} is no picture: its name has to end in .png or .jpg")


def open_images(args: argparse.Namespace) -> sources.Source:
    if args.data:
        return sources.open_source(args.data, held_out=True, cached=args.listing_cache)
    root = None if args.imagenet_val == DEFAULT else args.imagenet_val
    return data.by_file_name(sources.open_source(data.imagenet_val_spec(root), cached=args.listing_cache))


def load_networks(args: argparse.Namespace, device: torch.device) -> tuple[dict, dict, dict]:
    """Returns, by metric: networks, report entries on their files, and reasons why others are unavailable."""
    networks, files, reasons = {}, {}, {}
    given = {"vgg": args.vgg_file, "alex": args.alex_file, "inception": args.inception_file}
    for metric in WANTED if args.metrics is None else args.metrics:
        if metric not in NETWORK_METRICS:
            continue
        name = NETWORK_METRICS[metric]
        file = given.get(name)
        try:
            # rank 0 downloads and reads; the others receive the tensors
            state, *about = distributed.from_main(lambda name=name, file=file: weights.load(name, file))
            network = fid.Inception(state) if metric == "rfid" else metrics.load_lpips(name, state)
        except ValueError as error:
            reasons[metric] = str(error)
        else:
            networks[metric] = network.to(device)
            files[metric] = dict(zip(("path", "sha256", "published"), about, strict=True))
    return networks, files, reasons


def names_hash(images: data.ValSet) -> str:
    """sha256 of the sorted file names without folders, equal for all layouts of a set."""
    names = sorted(os.path.basename(images.name(i)) for i in range(len(images)))
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# scoring at one resolution


def make_scorer(args: argparse.Namespace, model: nn.Module, images: data.ValSet, networks: dict,
                device: torch.device) -> tuple[metrics.Scorer, dict[str, str]]:
    """Returns the scorer and the reasons why metrics are unavailable at this resolution."""
    protocol, reasons, lpips_nets = metrics.PROTOCOLS[args.protocol], {}, {}
    for metric, network in networks.items():
        name = NETWORK_METRICS[metric]
        if metric != "rfid" and images.res < metrics.LPIPS_MIN_SIDE[name]:
            reasons[metric] = f"needs {metrics.LPIPS_MIN_SIDE[name]} px"
        elif metric != "rfid":
            lpips_nets[name] = network
    rfid = None
    if "rfid" in networks:
        chunk_of = fid.chunks(len(images), fid.CHUNKS if args.jackknife else 1)
        rfid = fid.RFID(networks["rfid"], protocol.rfid, chunk_of, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    scorer = metrics.Scorer(model, device, autocast, protocol, lpips_nets, rfid, args.batch_size)
    return scorer, reasons


def score(args: argparse.Namespace, scorer: metrics.Scorer, images: data.ValSet, loader, broken: set
          ) -> tuple[dict, dict[str, np.ndarray]]:
    """Scores this process's share -> (scores, intervals, unavailable, seconds ...), per-image table."""
    bar = tqdm(loader, disable=not distributed.is_main(), dynamic_ncols=True, desc=f"{images.res} px")
    batches = data.report_broken(scorer.clock.waiting("decode", bar), broken)
    for numbers, pictures in batches:
        scorer.add(pictures, numbers)
    table = scorer.table()
    result = {**metrics.summary(table), "intervals": metrics.intervals(table), "unavailable": {}}
    if scorer.rfid:
        with scorer.clock.stage("covariances"):
            try:
                rfid = scorer.rfid.result()
            except ValueError as error:
                rfid, result["unavailable"]["rfid"] = {}, str(error)
        for name in [name for name in rfid if name.endswith("_se")]:
            half = fid.T_QUANTILE * rfid[name]
            value = rfid[name.removesuffix("_se")]
            result["intervals"][name.removesuffix("_se")] = [value - half, value + half]
        result |= rfid
    result["nonfinite"] = sum(distributed.gather(scorer.nonfinite))
    result["seconds"] = dict(scorer.clock.seconds)
    return result, table


def describe(args: argparse.Namespace, device: torch.device) -> dict:
    """Returns the entries of the report that are the same at every resolution."""
    protocol = metrics.PROTOCOLS[args.protocol]
    headline = {"rfid": f"rfid_{protocol.rfid[0]}", "psnr": "psnr", "ssim": protocol.ssim,
                "lpips": protocol.lpips}
    return {
        "protocol": {"name": args.protocol, **asdict(protocol), "crop": "centre", "headline": headline},
        "precision": args.precision,
        "batch_size": args.batch_size,
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


# ------------------------------------------------------------------------------------------------------------
# output


def warnings(args: argparse.Namespace, result: dict) -> list[str]:
    """Returns caveats for the reader of the scores."""
    lines = [f"{metric} is unavailable: {reason}" for metric, reason in result["unavailable"].items()]
    if result.get("complete") is False:
        lines.append(f"{result['n']:,} images, not ImageNet's 50,000: not comparable with published scores")
    if any(name.startswith("rfid_") for name in result) and result["n"] < IMAGENET_VAL:
        lines.append(f"rFID of {result['n']:,} images is biased upwards; {BIAS}")
    for metric, file in result["files"].items():
        if not file["published"]:
            lines.append(f"{file['path']} is not the published file: {metric} is not comparable")
    if result["broken"]:
        lines.append(f"{result['broken']} broken images left out")
    if result["nonfinite"]:
        lines.append(f"{result['nonfinite']} reconstructions have NaN or infinite pixels, scored as black or "
                     "clamped: the scores say little about this model")
    return lines


def reconstruct(scorer: metrics.Scorer, images: data.ValSet, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the 8-bit pairs of the given images: uint8 (N, C, H, W) twice; broken ones are left out."""
    good = [(i, image) for i, image in ((int(i), images[int(i)][0]) for i in numbers) if image is not None]
    pixels, pairs = torch.stack([image for _, image in good]), []
    for batch, ids in zip(pixels.split(scorer.batch_size), torch.tensor([i for i, _ in good])
                          .split(scorer.batch_size), strict=True):
        with torch.no_grad():
            padded = metrics.pad(batch, scorer.batch_size).to(scorer.device)
            recon = scorer.reconstruct(padded, metrics.pad(ids, scorer.batch_size))
        a, b, *_ = metrics.pairs(scorer.protocol, padded, recon)
        pairs.append((a[: len(ids)].cpu(), b[: len(ids)].cpu()))
    return tuple(map(torch.cat, zip(*pairs, strict=True)))


def write_extremes(path: Path, count: int, scorer: metrics.Scorer, images: data.ValSet, table: dict) -> None:
    order, blocks = table["psnr"].argsort(kind="stable"), []
    for title, picks in (("lowest", order[:count]), ("highest", order[::-1][:count])):
        numbers = table["number"][picks].astype(int)
        captions = [f"{Path(images.name(i)).name}\n{table['psnr'][row]:.2f} dB"
                    for i, row in zip(numbers, picks, strict=True)]
        title = f"{title} PSNR: input above, reconstruction below"
        blocks.append((title, *reconstruct(scorer, images, numbers), captions))
    report.write_extremes(path, blocks)


def write_files(args: argparse.Namespace, scorer: metrics.Scorer, images: data.ValSet, table: dict) -> None:
    """Writes per-image values and pictures of one resolution; with several --res, file names get -<res>."""
    def path(file: str) -> Path:
        target = Path(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_stem(f"{target.stem}-{images.res}") if len(args.res) > 1 else target

    if args.per_image:
        report.write_csv(path(args.per_image), table, images.name)
    if args.grid:
        shown = min(8, len(images))
        picks = [i * len(images) // shown for i in range(shown)]
        report.write_grid(path(args.grid), reconstruct(scorer, images, picks))
    if args.extremes:
        write_extremes(path(args.extremes), args.extremes_count, scorer, images, table)


def write_summary(args: argparse.Namespace, results: list[dict]) -> None:
    """Writes the JSON (several reports become a list under "curve") and the plot."""
    for file in filter(None, (args.json, args.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        whole = results[0] if len(results) == 1 else {"curve": results}
        Path(args.json).write_text(json.dumps(whole, indent=2) + "\n")
    if args.plot:
        report.write_plot(args.plot, results)


# ------------------------------------------------------------------------------------------------------------


@failures("run the command again")
def main() -> None:
    args = parse_args()
    with cli.user_errors():
        device = distributed.init(args.device)
        models.exact_fp32(device)
        check_model(args)
        check_outputs(args)
        model, about_model = models.open_model(args)
        model = model.to(device)
        args.res = args.res or [about_model["training"]["args"]["res"]]
        if args.model:
            with torch.no_grad():                                     # raises on a wrong output
                model(torch.zeros(1, 3, args.res[0], args.res[0], device=device))
        channels = [models.check_res(res, model) for res in args.res][0]
        source = distributed.from_main(lambda: open_images(args))
        resize = metrics.PROTOCOLS[args.protocol].resize
        sets = [data.ValSet(source, res, args.limit, channels, resize) for res in args.res]
        place = (device, distributed.rank(), distributed.world_size())
        loaders = [data.numbered_loader(images, args.batch_size, args.num_workers, *place) for images in sets]
        networks, files, unavailable = load_networks(args, device)

    about_all, results, broken = describe(args, device), [], set()
    for images, loader in zip(sets, loaders, strict=True):
        scorer, too_small = make_scorer(args, model, images, networks, device)
        result, table = score(args, scorer, images, loader, broken)
        result["unavailable"] = {**unavailable, **too_small, **result["unavailable"]}
        if args.imagenet_val:
            result["complete"] = result["n"] == IMAGENET_VAL
        result |= {"res": images.res, "data": source.spec, "names_sha256": names_hash(images),
                   "broken": len(images) - result["n"], "files": files, **about_model, **about_all}
        results.append(result)
        print0(f"\n{report.about(result)}\n\n{report.table(result)}\n\n{report.speed(result)}")
        for line in warnings(args, result):
            print0(f"warning: {line}")
        if distributed.is_main():
            write_files(args, scorer, images, table)
    if len(results) > 1:
        print0(f"\n{report.curve_table(results)}")
    if distributed.is_main():
        write_summary(args, results)
    missing = set(args.metrics or ()) & {name for result in results for name in result["unavailable"]}
    if missing:
        print0(f"error: unavailable metrics: {', '.join(sorted(missing))}")
    distributed.cleanup()
    if missing:
        sys.exit(3)


if __name__ == "__main__":
    main()
