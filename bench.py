"""Measure speed and memory on this machine: one table, each row ours beside a peer's.

    python bench.py                                    # all sections: minutes
    python bench.py --only dwt,encoder --json out/bench.json

Ours and the peer run in turn, in one process, with the same precision, memory format and compilation. Speeds
are medians after a warm-up. The ratio is ours / peer's: above 1 is better for img/s and TFLOP/s, below 1 for
the rest. A peer that cannot be imported (requirements-dev.txt) is named and skipped. docs/performance.md
explains the rows.
"""

import argparse
import importlib
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm

import data
import train
from evaluation import fid, metrics
from model import Autoencoder, Decoder, LiteVAEEncoder, scale_config
from runtime import cli, distributed, sources
from runtime.measure import alternate, count, peak_memory, tensors
from synthetic import dead_leaves
from variants import options
from wavelets import dwt2, idwt2, wavedec2, waverec2

# ----------------------------------------------------------------------------
# settings


class Sizes(NamedTuple):
    """Images in a batch and their side in pixels, by section."""

    dwt: tuple[int, int]
    encoders: tuple[tuple[int, int], ...]
    decoders: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]      # training
    evaluation: tuple[int, int]
    files: int                              # JPEG files to decode
    matmul: int                             # side of the square matrices


GPU_BATCHES = ((1, 256), (8, 256), (32, 256))
SIZES = {
    "cpu": Sizes((8, 256), ((1, 64), (1, 128)), ((1, 64),), ((2, 64),), (2, 64), 64, 2048),
    "cuda": Sizes((32, 256), GPU_BATCHES, GPU_BATCHES, ((32, 128), (16, 256)), (32, 256), 64, 8192),
}
MODE = "symmetric"             # the only border that all wavelet libraries have
SCALES = "SBML"
SD_VAE = dict(                 # the published configuration of Stable Diffusion's autoencoder
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
RECIPE = ""                    # flags of train.py: its defaults
SD_RECIPE = "--encoder sd --conv1x1 --latent-channels 4 --decoder-norm group --decoder-attention"


class Bench(NamedTuple):
    """What all sections share; `folder` is for files that they make."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format
    compiled: bool
    seconds: float
    folder: Path

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.device.type]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, net: nn.Module) -> nn.Module:
        net = net.to(self.device, memory_format=self.memory_format)
        if not self.compiled:
            return net
        # for each size anew, and without a limit that all networks of a class share
        return torch.compile(net, dynamic=False, isolate_recompiles=True, recompile_limit=32)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", type=section_names, default=",".join(SECTIONS), metavar="NAME,NAME", help="sections to run")
    add("--seconds", type=cli.amount, default=0.5, help="for each row after its warm-up, or 3 measurements")
    add("--json", metavar="FILE", help="also write the rows and a description of the machine")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as in train.py")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile all networks, ours and the peers', which takes minutes")
    return parser.parse_args(argv)


def section_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"unknown section {name!r}; choose from {', '.join(SECTIONS)}")
    return names


# ----------------------------------------------------------------------------
# rows


class Row(NamedTuple):
    """A line of the table; its numbers are None if the peer is missing."""

    section: str
    case: str
    size: str
    unit: str
    ours: float | None
    peer: str
    theirs: float | None
    ratio: float | None


def row(section: str, case: str, size: str, unit: str, ours: float, peer: str, theirs: float) -> Row:
    return Row(section, case, size, unit, ours, peer, theirs, ours / theirs if theirs else None)


def peer_row(section: str, case: str, size: str, unit: str, peer: str, build: Callable[[], Any],
             measure: Callable[[Any], tuple[float, float]]) -> Row:
    """measure(build()) gives ours and the peer's; build() raises ImportError if the peer is missing."""
    try:
        built = build()
    except ImportError as error:
        return Row(section, case, size, unit, None, f"{peer} missing: {error}", None, None)
    ours, theirs = measure(built)
    return row(section, case, size, unit, ours, peer, theirs)


def speeds(bench: Bench, images: int, ours: Callable, theirs: Callable) -> tuple[float, float]:
    """Images per second of two functions that take `images` in a call."""
    timing = alternate(ours, theirs, bench.seconds, bench.device)
    return images / timing.ours, images / timing.peer


def table(rows: list[Row]) -> str:
    """Markdown whose columns line up."""
    cells = [list(Row._fields), *[[show(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


# ----------------------------------------------------------------------------
# wavelets, always in fp32 and never compiled

LIBRARIES = ("ptwt", "pytorch_wavelets", "PyWavelets", "copy")


def library(name: str, wavelet: str, levels: int, device: torch.device) -> tuple[Callable, Callable]:
    """A library's transform and its inverse; "copy" only copies the tensor."""
    if name == "ptwt":
        ptwt = importlib.import_module("ptwt")
        return (lambda x: ptwt.wavedec2(x, wavelet, mode=MODE, level=levels),
                lambda bands: ptwt.waverec2(bands, wavelet))
    if name == "pytorch_wavelets":
        package = importlib.import_module("pytorch_wavelets")
        return (package.DWTForward(levels, wavelet, MODE).to(device),
                package.DWTInverse(wavelet, MODE).to(device))
    if name == "PyWavelets":
        pywt = importlib.import_module("pywt")
        return (lambda x: pywt.wavedec2(x.numpy(), wavelet, MODE, levels),
                lambda bands: pywt.waverec2(bands, wavelet, MODE))
    if name == "copy":
        return torch.clone, torch.clone
    if levels == 1:
        return lambda x: dwt2(x, wavelet, MODE), lambda bands: idwt2(bands, wavelet, MODE)
    return lambda x: wavedec2(x, levels, wavelet, MODE), lambda bands: waverec2(bands, wavelet, MODE)


def wavelet_call(name: str, wavelet: str, levels: int, direction: str, x: Tensor) -> Callable:
    """What a row times: the transform, both passes through it, or the inverse of the library's own bands."""
    forward, inverse = library(name, wavelet, levels, x.device)
    if direction == "forward":
        return partial(forward, x)
    if direction == "inverse":
        return partial(inverse, forward(x))
    if name == "copy":                                    # the backward pass of clone() copies nothing
        return lambda: (x.clone(), x.clone())
    x = x.detach().requires_grad_()
    gradients = [torch.randn_like(band) for band in tensors(forward(x))]
    return lambda: torch.autograd.grad(tensors(forward(x)), x, gradients)


def wavelet_row(bench: Bench, peer: str, *case: Any) -> Row:
    batch, side = bench.sizes.dwt
    x = torch.randn(batch, 3, side, side, device=bench.device)
    ours = wavelet_call("ours", *case, x)
    title = "{}, levels: {}, {}".format(*case)
    return peer_row("dwt", title, f"{batch} x {side} px", "img/s", peer,
                    lambda: wavelet_call(peer, *case, x), partial(speeds, bench, batch, ours))


def dwt(bench: Bench) -> Iterator[Row]:
    """Forward, both passes, and the inverse of one level; PyWavelets has no gradient and needs a CPU."""
    for wavelet, levels in (("haar", 1), ("haar", 3), ("db2", 1)):
        for direction in ("forward", "forward+backward", "inverse")[: 3 if levels == 1 else 2]:
            for peer in LIBRARIES:
                numpy = bench.device.type == "cpu" and direction != "forward+backward"
                if peer != "PyWavelets" or numpy:
                    yield wavelet_row(bench, peer, wavelet, levels, direction)


# ----------------------------------------------------------------------------
# networks


class Network(NamedTuple):
    """A network, the channels of its input, and how many times smaller than the image that is."""

    net: nn.Module
    channels: int
    factor: int

    def input(self, bench: Bench, batch: int, side: int) -> Tensor:
        x = torch.randn(batch, self.channels, *[side // self.factor] * 2, device=bench.device)
        # in training, an encoder's input needs no gradient, a decoder's does
        return x.contiguous(memory_format=bench.memory_format).requires_grad_(self.factor > 1)

    def size(self) -> int:
        """Bytes of the weights."""
        return sum(p.nbytes for p in self.net.parameters())


def forward(bench: Bench, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad(), bench.autocast():
        net(x)


def forward_backward(bench: Bench, net: nn.Module, x: Tensor) -> None:
    with bench.autocast():
        out = net(x)
    inputs = [t for t in (x, *net.parameters()) if t.requires_grad]
    torch.autograd.grad(out, inputs, torch.ones_like(out))


@cache
def sd_vae(bench: Bench) -> nn.Module:
    """diffusers' AutoencoderKL with random weights; ImportError without diffusers."""
    vae = importlib.import_module("diffusers").AutoencoderKL(**SD_VAE).to(bench.device).eval()
    vae.encoder, vae.decoder = bench.place(vae.encoder), bench.place(vae.decoder)
    return vae


def sd_encoder(bench: Bench) -> Network:
    return Network(sd_vae(bench).encoder, channels=3, factor=1)


def sd_decoder(bench: Bench) -> Network:
    return Network(sd_vae(bench).decoder, SD_VAE["latent_channels"], factor=8)


def network_rows(bench: Bench, section: str, case: str, ours: Network, peer: Callable[[Bench], Network],
                 run: Callable, batch: int, side: int) -> Iterator[Row]:
    """Speed and peak memory of `run`, that of the weights included."""
    def calls(theirs: Network) -> list[Callable]:
        return [partial(run, bench, each.net, each.input(bench, batch, side)) for each in (ours, theirs)]

    def speed(theirs: Network) -> tuple[float, float]:
        return speeds(bench, batch, *calls(theirs))

    def memory(theirs: Network) -> Iterator[float]:
        for each, call in zip((ours, theirs), calls(theirs), strict=True):
            yield (each.size() + peak_memory(call, bench.device)[1]) / 1e6

    title, size = f"{case}, {run.__name__.replace('_', '+')}", f"{batch} x {side} px"
    for unit, measure in (("img/s", speed), ("peak MB", memory)):
        yield peer_row(section, title, size, unit, "diffusers", partial(peer, bench), measure)


def encoder(bench: Bench) -> Iterator[Row]:
    """LiteVAE's encoders against SD-VAE's."""
    for scale in SCALES:
        ours = Network(bench.place(LiteVAEEncoder(scale_config(scale))), channels=3, factor=1)
        for run, (batch, side) in itertools.product((forward, forward_backward), bench.sizes.encoders):
            yield from network_rows(bench, "encoder", f"LiteVAE-{scale}", ours, sd_encoder, run, batch, side)


def decoder(bench: Bench) -> Iterator[Row]:
    """The self-modulated decoder, which all scales share, and the same folded for inference."""
    config = scale_config("S")
    folded = Autoencoder(config).fold_smc().decoder
    for case, net, runs in (("SMC", Decoder(config), (forward, forward_backward)),
                            ("SMC folded", folded, (forward,))):
        ours = Network(bench.place(net), config.latent_channels, factor=8)
        for run, (batch, side) in itertools.product(runs, bench.sizes.decoders):
            yield from network_rows(bench, "decoder", case, ours, sd_decoder, run, batch, side)


def random_weights(net: nn.Module) -> dict[str, Tensor]:
    """A state that keeps the scale of features, in place of published weights and their download."""
    state = {}
    for name, like in net.state_dict().items():
        state[name] = torch.zeros(like.shape, dtype=like.dtype)
        if like.ndim > 1:
            state[name].normal_(std=math.sqrt(2 / like[0].numel()))
        elif "var" in name or "bn.weight" in name:
            state[name].fill_(1)
    return state


def vgg_features() -> nn.Module:
    """The convolutions of VGG16 with random weights."""
    with torch.device("meta"):
        net = torchvision.models.vgg16().features
    net.load_state_dict(random_weights(net), assign=True)
    return net


# ----------------------------------------------------------------------------
# training


def start_training(bench: Bench, words: str) -> Callable[[], None]:
    """A trainer that has taken two steps on a batch in memory; returns its next step, on the same batch."""
    flags = train.parse_args(words.split())
    config = options.build_config(flags)
    trainer = train.Trainer(flags, config, bench.device)
    trainer.prepare([slice(0, flags.batch_size)], inherited=False)
    latent_shape = (config.latent_channels, *[flags.res // config.downsample_factor] * 2)
    images = data.TrainSet(sources.SyntheticSource(), flags.res, seed=0, latent_shape=latent_shape)
    batch, _ = data.collate_train([images[i] for i in range(flags.batch_size)])
    if bench.device.type == "cuda":
        batch = tuple(t.pin_memory() for t in batch)      # as the loader does
    numbers, batches = itertools.count(), itertools.repeat(batch)

    def step() -> None:
        trainer.step(next(numbers), batches, stop=False)

    step()
    step()                                                # now with the optimizers' state
    return step


def matmul_rate(bench: Bench) -> float:
    """FLOP/s of a large matrix product in the precision of the networks."""
    n, dtype = bench.sizes.matmul, torch.bfloat16 if bench.precision == "bf16" else torch.float32
    product = partial(torch.mm, *torch.randn(2, n, n, device=bench.device, dtype=dtype))
    return 2 * n**3 / alternate(product, product, bench.seconds, bench.device).ours


def training_rows(bench: Bench, batch: int, side: int, disc: str) -> Iterator[Row]:
    vgg = bench.folder / "vgg16.pth"
    torch.save(vgg_features().state_dict(), vgg)
    flags = (f"{RECIPE} --batch-size {batch} --res {side} --disc {disc} --vgg-file {vgg} --precision "
             f"{bench.precision} --{'compile' if bench.compiled else 'no-compile'} ")
    (ours, our_peak), (theirs, their_peak) = (
        peak_memory(partial(start_training, bench, flags + more), bench.device) for more in ("", SD_RECIPE))
    our_counts, their_counts = (count(step, bench.device) for step in (ours, theirs))
    our_speed, their_speed = speeds(bench, batch, ours, theirs)

    about, peer = ("train", f"step, disc {disc}", f"{batch} x {side} px"), "SD-VAE, same trainer"
    launched = "kernels" if bench.device.type == "cuda" else "operations"
    rate = our_counts.flops * our_speed / batch
    yield row(*about, "img/s", our_speed, peer, their_speed)
    yield row(*about, "peak MB", our_peak / 1e6, peer, their_peak / 1e6)
    yield row(*about, launched, our_counts.launches, peer, their_counts.launches)
    yield row(*about, "waits", our_counts.waits, peer, their_counts.waits)
    yield row(*about, "TFLOP/s", rate / 1e12, f"matmul {bench.sizes.matmul}", matmul_rate(bench) / 1e12)


def training(bench: Bench) -> Iterator[Row]:
    """Whole steps of the default recipe, with LPIPS on random weights."""
    for (batch, side), disc in itertools.product(bench.sizes.steps, ("unet-s", "none")):
        yield from training_rows(bench, batch, side, disc)


# ----------------------------------------------------------------------------
# reading files


def photographs(bench: Bench) -> Path:
    """A folder with JPEG files of ImageNet's usual size, in one class."""
    folder = bench.folder / "photographs"
    if not folder.exists():
        (folder / "class").mkdir(parents=True)
        for i in range(bench.sizes.files):
            Image.fromarray(dead_leaves(0, i, 500)[:375]).save(folder / "class" / f"{i}.jpg", quality=90)
    return folder


def file_row(bench: Bench, section: str, case: str, ours: data.Dataset, *steps: Callable) -> Row:
    """A data set against torchvision's ImageFolder with these steps, on one thread."""
    def read(dataset: data.Dataset) -> list:
        return [dataset[i] for i in range(bench.sizes.files)]

    peer = torchvision.datasets.ImageFolder(photographs(bench), transforms.Compose(steps))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mine, theirs = speeds(bench, bench.sizes.files, partial(read, ours), partial(read, peer))
    torch.set_num_threads(threads)
    return row(section, case, f"{bench.sizes.files} files", "img/s", mine, "torchvision", theirs)


def loader(bench: Bench) -> Iterator[Row]:
    """What one core gives to training: JPEG files of 500 x 375 to crops of 128 px."""
    source = sources.open_source(str(photographs(bench)))
    for case, times in (("training crops of 128 px", data.OVERSAMPLING), ("--jpeg-oversampling 1.4", 1.4)):
        ours = data.TrainSet(source, 128, seed=0, latent_shape=(12, 16, 16), oversampling=times)
        yield file_row(bench, "loader", case, ours, transforms.RandomResizedCrop(128),
                       transforms.RandomHorizontalFlip(), transforms.ToTensor())


# ----------------------------------------------------------------------------
# evaluation


def reconstruct(vae: nn.Module, x: Tensor) -> Tensor:
    return vae.decode(vae.encode(x).latent_dist.mean).sample


def scores(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return metrics.psnr(a, b), metrics.ssim(a, b)


def skimage_scores(package: ModuleType, a: np.ndarray, b: np.ndarray) -> list[tuple[float, float]]:
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)     # Wang et al. 2004
    return [(package.peak_signal_noise_ratio(x, y, data_range=255),
             package.structural_similarity(x, y, data_range=255, channel_axis=0, **window))
            for x, y in zip(a, b, strict=True)]


def inceptions(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """FID's network and torchvision's, with the same random weights."""
    with torch.device("meta"):
        theirs = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                 init_weights=False)
    state = random_weights(theirs)
    theirs.load_state_dict(state, assign=True)
    theirs.fc = nn.Identity()
    return fid.Inception(state).to(device), theirs.to(device).eval()


@torch.no_grad()
def evaluation(bench: Bench) -> Iterator[Row]:
    """The stages of eval.py: networks in fp32, without TF32; LPIPS and Inception with random weights."""
    (batch, side), device = bench.sizes.evaluation, bench.device
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    images = data.ValSet(sources.open_source(str(photographs(bench))), side)
    yield file_row(bench, "eval", f"decode and resize to {side} px", images,
                   transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                   transforms.CenterCrop(side), transforms.PILToTensor())

    def stage(case: str, ours: Callable, peer: str, build: Callable[[], Callable]) -> Row:
        return peer_row("eval", case, f"{batch} x {side} px", "img/s", peer, build,
                        partial(speeds, bench, batch, ours))

    a = torch.stack([images[i][0] for i in range(batch)]).to(device)
    b = metrics.to_uint8(data.to_float(a) + 0.1 * torch.randn(a.shape, device=device))
    x, y = data.to_float(a), data.to_float(b)
    net = bench.place(Autoencoder(scale_config("B"))).eval()
    yield stage("model, LiteVAE-B", partial(net, x), "diffusers",
                lambda: partial(reconstruct, sd_vae(bench), x))
    pair = a.cpu().numpy(), b.cpu().numpy()
    yield stage("PSNR and SSIM", partial(scores, a, b), "scikit-image",
                lambda: partial(skimage_scores, importlib.import_module("skimage.metrics"), *pair))
    vgg = vgg_features().to(device)
    lpips = metrics.load_lpips("vgg", vgg.state_dict()).to(device)
    yield stage("LPIPS", partial(metrics.lpips_distance, lpips, x, y), "VGG16 alone",
                lambda: lambda: (vgg(x), vgg(y)))
    prepared, (ours, theirs) = fid.prepare_pytorch(a), inceptions(device)
    yield stage("Inception", partial(ours, prepared), "torchvision", lambda: partial(theirs, prepared))


# ----------------------------------------------------------------------------
# the command

SECTIONS = {"dwt": dwt, "encoder": encoder, "decoder": decoder, "train": training, "eval": evaluation,
            "loader": loader}


def run_section(bench: Bench, name: str) -> list[Row]:
    """The rows of a section, up to the one that does not fit into the GPU's memory."""
    rows = []
    train.set_fast_math(bench.device)
    try:
        rows.extend(SECTIONS[name](bench))
    except torch.OutOfMemoryError:
        rows.append(Row(name, "out of memory, the rest is left out", "", "", None, "", None, None))
    return rows


def machine(bench: Bench) -> dict:
    """What the numbers depend on."""
    cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if cuda else torch.cpu.get_capabilities().get("cpu_name")
    return {"device": name or platform.machine(), "threads": torch.get_num_threads(),
            "precision": bench.precision, "compile": bench.compiled, "seconds": bench.seconds,
            "torch": version("torch"), "torchvision": version("torchvision")}


def main() -> None:
    args = parse_args()
    with cli.user_errors():
        device = distributed.init(args.device)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).touch()                       # a wrong path fails now, not after minutes
    torch.manual_seed(0)
    precision, memory_format = train.pick_precision(args.precision, device), train.set_fast_math(device)
    with TemporaryDirectory() as folder:
        bench = Bench(device, precision, memory_format, args.compile, args.seconds, Path(folder))
        rows = [row for name in tqdm(args.only, leave=False) for row in run_section(bench, name)]
    print(", ".join(f"{key} {value}" for key, value in machine(bench).items()))
    print(f"\n{table(rows)}")
    if args.json:
        report = {"machine": machine(bench), "rows": [row._asdict() for row in rows]}
        Path(args.json).write_text(f"{json.dumps(report, indent=2)}\n")


if __name__ == "__main__":
    main()
