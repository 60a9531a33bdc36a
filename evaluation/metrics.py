"""PSNR, SSIM and LPIPS of reconstructions, evaluation protocols, and averages over a data set.

Validation during training and eval.py share this code. In the default protocol every metric is computed from
two uint8 images, PSNR and SSIM in float64 and LPIPS in fp32. Metrics are computed per image, then averaged.
psnr_pooled is the PSNR of the mean squared error, torchmetrics' default and 1 to 1.5 dB lower. rFID is not a
mean over images; it is in fid.py.

Scores do not depend on the number of processes: networks see batches of one size (the last one is padded),
per-image values are gathered by image number, and sums are exactly rounded.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import lpips
import numpy as np
import torch
from torch import Tensor, nn

from evaluation.fid import RFID
from runtime import distributed

MIN_MSE = 1e-10  # on the 0..1 scale: identical images score 100 dB instead of infinity
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a range of 1
GAUSS11 = tuple(math.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11))  # SSIM window (Wang et al. 2004)
UNIFORM7 = (1.0,) * 7  # scikit-image's default window
LPIPS_MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels; below this a pooling layer has no output
RESAMPLES = 1000  # bootstrap resamples


# ------------------------------------------------------------------------------------------------------------
# protocols


@dataclass(frozen=True)
class Protocol:
    """Every choice that changes a score. Both SSIMs and all LPIPS networks are computed in each protocol."""

    resize: str             # data.RESIZES; always of the short side, followed by a centre crop
    sample: bool            # decode a posterior sample (seeded per image) instead of the mean
    truncate: bool          # truncate to 8 bits instead of rounding; this also darkens the reference
    floats: bool            # PSNR and SSIM from clamped, LPIPS from unclamped floats, not the 8-bit pair
    ssim: str               # headline SSIM
    lpips: str              # headline LPIPS
    rfid: tuple[str, ...]   # fid.PREPARE, headline first


# fmt: off
PROTOCOLS = {
    #                       resize      sample truncate floats  ssim        lpips        rfid
    "default":     Protocol("bicubic",  False, False,   False, "ssim",     "lpips_vgg", ("pytorch", "clean")),
    # lavinal712/AutoencoderKL, eval.py: the protocol with the most published third-party numbers
    "lavinal712":  Protocol("bilinear", True,  True,    True,  "ssim_7x7", "lpips_vgg", ("pytorch", "clean")),
    # guided-diffusion's crop and TensorFlow's features, as in LlamaGen and RAE; otherwise the default
    "adm":         Protocol("adm",      False, False,   False, "ssim",     "lpips_vgg", ("tf", "pytorch")),
    # taming-transformers: OpenCV's resize and torch-fidelity's features; otherwise the default
    "taming":      Protocol("opencv",   False, False,   False, "ssim",     "lpips_vgg", ("tf", "pytorch")),
}
# fmt: on


# ------------------------------------------------------------------------------------------------------------
# to 8 bits


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] in any float dtype -> uint8, rounded and clamped: undoes u8 / 127.5 - 1, even in bf16."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def truncate(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by truncation, as in peers' PNGs; 63 of the 256 levels come back one lower."""
    return ((x.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def pairs(protocol: Protocol, images: Tensor, recon: Tensor) -> tuple[Tensor, ...]:
    """uint8 images and recon in about [-1, 1] -> 8-bit pair, pair for PSNR and SSIM, pair for LPIPS.

    NaN in recon is black.
    """
    recon = recon.nan_to_num(nan=-1.0)
    if protocol.truncate:
        normalised = (images.float() / 255 - 0.5) / 0.5     # torchvision's ToTensor and Normalize
        a, b = truncate(normalised), truncate(recon)
    else:
        a, b = images, to_uint8(recon)
    if protocol.floats:
        x, y = images.float() / 127.5 - 1, recon.float()
        return a, b, unit(images), ((y.clamp(-1, 1) + 1) / 2).double(), x, y
    return a, b, a, b, a.float() / 127.5 - 1, b.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------
# per-image metrics: two (B, C, H, W), both uint8 or both float64 in [0, 1] -> float64 (B,)


def check(a: Tensor, b: Tensor) -> None:
    fine = a.dtype == b.dtype and a.dtype in (torch.uint8, torch.float64)
    if a.shape != b.shape or a.ndim != 4 or not fine:
        got = " and ".join(f"{t.dtype} {tuple(t.shape)}" for t in (a, b))
        raise ValueError(f"expected two uint8 (or float64) tensors of equal shape (B, C, H, W), got {got}")


def unit(images: Tensor) -> Tensor:
    """uint8 or float64 in [0, 1] -> float64 in [0, 1]."""
    return images.double() / 255 if images.dtype == torch.uint8 else images


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error on the 0..1 scale. Raises ValueError if dtypes or shapes differ."""
    check(a, b)
    scale = 255 if a.dtype == torch.uint8 else 1
    return (a.double() - b.double()).square().flatten(1).mean(dim=1) / scale**2


def decibels(error: Tensor) -> Tensor:
    """Mean squared error on the 0..1 scale -> PSNR in dB, at most 100."""
    return -10 * error.clamp(min=MIN_MSE).log10()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over all channels in dB, at most 100. Raises ValueError like `mse`."""
    return decibels(mse(a, b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), averaged over channels and over the windows inside the image.

    Gaussian window 11 x 11, sigma 1.5, range 1; equals scikit-image with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False. Raises ValueError like `mse`, and for images with a side under 11.
    """
    return windowed_ssim(a, b, GAUSS11, bessel=1.0)


def ssim_7x7(a: Tensor, b: Tensor) -> Tensor:
    """SSIM in uniform 7 x 7 windows with sample covariances, scikit-image's default; about .01 higher."""
    return windowed_ssim(a, b, UNIFORM7, bessel=49 / 48)


def windowed_ssim(a: Tensor, b: Tensor, window: Sequence[float], bessel: float) -> Tensor:
    check(a, b)
    if min(a.shape[-2:]) < len(window):
        raise ValueError(f"SSIM needs sides of at least {len(window)} pixels, got {tuple(a.shape[-2:])}")
    # one image at a time: its maps fit in a cache, and results are bitwise independent of the batch size
    images = zip(unit(a), unit(b), strict=True)
    return torch.stack([ssim_map(x, y, window, bessel).mean() for x, y in images])


def ssim_map(x: Tensor, y: Tensor, window: Sequence[float], bessel: float) -> Tensor:
    """SSIM of two images (C, H, W) in [0, 1] per window of K x K pixels: (C, H - K + 1, W - K + 1)."""
    mean_x, mean_y, xx, yy, xy = blur(torch.stack([x, y, x * x, y * y, x * y]), window)
    covariance = bessel * (xy - mean_x * mean_y)
    variances = bessel * (xx - mean_x**2 + yy - mean_y**2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return luminance * (2 * covariance + C2) / (variances + C2)


def blur(maps: Tensor, window: Sequence[float]) -> Tensor:
    """Windowed mean along both axes, without padding: (..., H, W) -> (..., H - K + 1, W - K + 1).

    Sums shifted copies along one axis at a time: float64 conv2d takes 10 times as long on a CPU.
    """
    for dim in (-2, -1):
        size = maps.shape[dim] - len(window) + 1
        total = torch.zeros_like(maps.narrow(dim, 0, size))
        for k, weight in enumerate(window):
            total.add_(maps.narrow(dim, k, size), alpha=weight / sum(window))
        maps = total
    return maps


# ------------------------------------------------------------------------------------------------------------
# LPIPS


def load_lpips(name: str, state: dict[str, Tensor]) -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018; the lpips package) on vgg, alex or squeeze, frozen and in eval mode.

    state: the convolutions, as returned by weights.load. Raises ValueError if they belong to another network.
    """
    net = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).requires_grad_(False)
    # the package's slices keep torchvision's layer numbers: slice2.5.weight is features.5.weight
    try:
        net.net.load_state_dict({key: state[key.split(".", 1)[1]] for key in net.net.state_dict()})
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"these are not the weights of LPIPS's {name} ({reason})") from error
    return net.eval()


def lpips_distance(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """LPIPS of images in [-1, 1], 1 or 3 channels, in fp32 even under autocast: float64 (B,)."""
    with torch.autocast(x.device.type, enabled=False):
        return net(*(t.float().expand(-1, 3, -1, -1) for t in (x, y))).flatten().double()


# ------------------------------------------------------------------------------------------------------------
# over a data set


class Stopwatch:
    """Seconds per stage; synchronises the GPU so that work counts towards the stage that launched it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def waiting(self, name: str, items: Iterable) -> Iterator:
        """Yields the items; the time spent waiting for them counts towards the stage."""
        iterator, end = iter(items), object()
        while True:
            with self.stage(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item


class Scorer:
    """Scores this process's share of a data set, batch by batch; `table` merges the shares.

    model: x (B, C, H, W) in [-1, 1] -> (recon, posterior), in eval mode, run inside `autocast`. lpips_nets:
    by name, see `load_lpips`. Every network sees batches of batch_size images: smaller batches are padded and
    the padding is dropped, so the score of an image does not depend on how the set is split. `nonfinite`
    counts this process's reconstructions with NaN or infinite pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        autocast: AbstractContextManager | None = None,
        protocol: Protocol = PROTOCOLS["default"],
        lpips_nets: dict[str, nn.Module] | None = None,
        rfid: RFID | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model, self.device, self.autocast = model, device, autocast or nullcontext()
        self.protocol, self.lpips_nets, self.rfid = protocol, lpips_nets or {}, rfid
        self.batch_size, self.clock = batch_size, Stopwatch(device)
        self.home = torch.device("cpu") if device.type == "mps" else device     # mps has no float64
        self.columns = ["psnr", "ssim", "ssim_7x7", "mse", *(f"lpips_{name}" for name in self.lpips_nets)]
        self.rows = [torch.empty(0, 1 + len(self.columns), dtype=torch.float64)]
        self.nonfinite = 0

    @property
    def count(self) -> int:
        return sum(map(len, self.rows))

    @torch.no_grad()
    def add(self, images: Tensor, numbers: Tensor | None = None) -> None:
        """images: uint8 (B, C, H, W); numbers: their indices in the set (default: as in `val_loader`)."""
        count = len(images)
        if not count:
            return
        if numbers is None:
            numbers = distributed.rank() + distributed.world_size() * (self.count + torch.arange(count))
        images = pad(images, self.batch_size).to(self.device)
        with self.clock.stage("model"):
            recon = self.reconstruct(images, pad(numbers, self.batch_size))
        self.nonfinite += (~recon[:count].isfinite()).flatten(1).any(dim=1).sum().item()
        a, b, x, y, *floats = pairs(self.protocol, images, recon)
        with self.clock.stage("PSNR, SSIM"):
            x, y = x[:count].to(self.home), y[:count].to(self.home)
            error = mse(x, y)
            values = [decibels(error), ssim(x, y), ssim_7x7(x, y), error]
        for name, net in self.lpips_nets.items():
            with self.clock.stage(f"LPIPS {name}"):
                values.append(lpips_distance(net, *floats)[:count])
        if self.rfid:
            with self.clock.stage("rFID"):
                self.rfid.add(a, b, numbers)
        self.rows.append(torch.stack([numbers.double(), *(value.cpu() for value in values)], dim=1))

    def reconstruct(self, images: Tensor, numbers: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> recon in about [-1, 1], from the posterior mean or the protocol's sample."""
        x = images.float() / 127.5 - 1
        with self.autocast:
            if not self.protocol.sample:
                return self.model(x)[0]
            config = self.model.config
            shape = (config.latent_channels, *(side // config.downsample_factor for side in x.shape[-2:]))
            return self.model(x, noise(numbers, shape).to(x.device))[0]

    def table(self) -> dict[str, np.ndarray]:
        """Columns number, psnr, ssim, ... of the images of all processes, in order; the same on each.

        Raises ValueError if there are no images.
        """
        rows = torch.cat(distributed.gather(torch.cat(self.rows)))
        if not len(rows):
            raise ValueError("no images to evaluate")
        rows = rows[rows[:, 0].argsort(stable=True)]
        return dict(zip(["number", *self.columns], rows.numpy().T, strict=True))


def pad(rows: Tensor, size: int) -> Tensor:
    """Pads to `size` rows with copies of the last row."""
    missing = max(0, size - len(rows))
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def noise(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) noise (B, *shape) that depends only on the number of each image."""
    seeded = (torch.Generator().manual_seed(number) for number in numbers.tolist())
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded])


def summary(table: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over images, psnr_std, psnr_pooled and n. fsum rounds once, so the order does not matter."""
    n = len(table["number"])
    means = {name: math.fsum(column) / n for name, column in table.items() if name != "number"}
    variance = math.fsum((table["psnr"] - means["psnr"]) ** 2) / n
    pooled = decibels(torch.tensor(means.pop("mse"), dtype=torch.float64)).item()
    return {**means, "psnr_std": math.sqrt(variance), "psnr_pooled": pooled, "n": n}


def intervals(table: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Bootstrap 95% intervals [low, high] of the means over images and of the pooled PSNR (Efron 1979)."""
    names = [name for name in table if name != "number"]
    values, rng = np.stack([table[name] for name in names]), np.random.default_rng(0)
    n = values.shape[1]
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    means = np.stack([values @ draw / n for draw in draws], axis=1)         # (metrics, RESAMPLES)
    ends = dict(zip(names, np.percentile(means, [2.5, 97.5], axis=1).T.tolist(), strict=True))
    low, high = ends.pop("mse")
    ends["psnr_pooled"] = decibels(torch.tensor([high, low], dtype=torch.float64)).tolist()
    return ends


def evaluate(
    model: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device,
    autocast: AbstractContextManager | None = None,
) -> dict[str, float]:
    """PSNR and SSIM of posterior-mean reconstructions, over the images of all processes.

    batches: this process's share, uint8 (B, C, H, W). Shares and batches may differ in size; empty batches
    are skipped. Returns psnr, ssim, ssim_7x7, psnr_std, psnr_pooled and n, the same on every process. Raises
    ValueError if n is 0.
    """
    training = model.training
    scorer = Scorer(model.eval(), device, autocast)
    for images in batches:
        scorer.add(images)
    model.train(training)
    return summary(scorer.table())
