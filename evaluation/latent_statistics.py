"""Statistics of latents: what a diffusion model has to learn, and how far it is from N(0, I).

Latents z are (N, Z, h, w), of N images, and all sums are float64. Each function returns a dict of numbers,
lists and tensors; a number that does not exist, like the kurtosis of a constant, is NaN. docs/analysis.md has
the formulas with their sources and a worked example.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BANDWIDTHS = (25, 50, 100, 250, 500)   # of the RBF kernel, paper Table 6
DEAD = 0.01                            # nats; ours: a channel whose KL is below says nothing about the image
BINS = 64                              # of a histogram; ours
CHUNK = 64                             # images whose spectrum is computed at once


def by_channel(z: Tensor) -> Tensor:
    """(N, Z, h, w) -> (Z, N h w) in float64."""
    return z.transpose(0, 1).flatten(1).double()


# ------------------------------------------------------------------------------------------------------------
# one channel at a time


def moments(z: Tensor) -> dict:
    """Mean, standard deviation and excess kurtosis m4 / m2^2 - 3, over everything and for each channel.

    The kurtosis is 0 for a Gaussian, -1.2 for a uniform distribution and 3 for a Laplace distribution.
    """
    names = "mean", "std", "kurtosis"
    whole = (value.item() for value in shape_of(z.double().flatten()[None]))
    channels = zip((f"channel_{name}" for name in names), shape_of(by_channel(z)), strict=True)
    return dict(zip(names, whole, strict=True)) | {"channel": list(range(z.shape[1]))} | dict(channels)


def shape_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and excess kurtosis of each row."""
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    variance = centred.square().mean(dim=1)
    kurtosis = centred.pow(4).mean(dim=1) / variance.square() - 3
    return mean, variance.sqrt(), kurtosis.where(rows.amax(1) > rows.amin(1), torch.nan)


def histograms(z: Tensor) -> dict:
    """Probability density of each channel: `edges` (BINS + 1) alike for all channels, `density` (Z, BINS)."""
    rows = by_channel(z)
    low, high = rows.min().item(), rows.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = torch.stack([torch.histc(row, BINS, low, high) for row in rows])
    return {"edges": edges, "density": counts / counts.sum(dim=1, keepdim=True) / (edges[1] - edges[0])}


def kl(mean: Tensor, logvar: Tensor) -> dict:
    """KL(q(z|x) || N(0, 1)) of each channel in nats: a mean over images and positions, per latent element.

    per_image is the sum over all elements of a latent, a mean over images. A channel of less than DEAD nats
    is dead. channel_signal is var(mean) / (var(mean) + mean(sigma^2)), the part of the variance of a sampled
    channel that depends on the image; 0 is pure noise.
    """
    variance = logvar.double().exp()
    elements = 0.5 * (mean.double().square() + variance - 1 - logvar)
    channels, means, noise = by_channel(elements).mean(dim=1), by_channel(mean), by_channel(variance)
    signal = means.var(dim=1, correction=0)
    return {
        "mean": channels.mean().item(),
        "per_image": elements.flatten(1).sum(dim=1).mean().item(),
        "threshold": DEAD,
        "dead": (channels < DEAD).sum().item(),
        "channel": list(range(len(channels))),
        "channel_kl": channels,
        "channel_dead": channels < DEAD,
        "channel_signal": signal / (signal + noise.mean(dim=1)),
    }


# ------------------------------------------------------------------------------------------------------------
# channels together


def correlation(z: Tensor) -> dict:
    """Pearson correlation of all pairs of channels, over images and positions: `matrix` (Z, Z).

    mean_absolute and largest (by absolute value) are over pairs of different channels. A constant channel has
    no correlation.
    """
    rows = by_channel(z)
    rows = rows - rows.mean(dim=1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True).where((rows.amax(1) > rows.amin(1))[:, None], torch.nan)
    unit = rows / norms
    matrix = unit @ unit.T
    pairs = matrix[*torch.triu_indices(*matrix.shape, offset=1)]
    pairs = pairs[pairs.isfinite()]
    largest = pairs[pairs.abs().argmax()].item() if len(pairs) else math.nan
    return {"mean_absolute": pairs.abs().mean().item(), "largest": largest, "matrix": matrix}


def pca(z: Tensor) -> dict:
    """The first three principal components of the channels as a colour picture.

    `explained` (Z,): the part of the variance along each component. `pictures` (N, 3, h, w) in [0, 1]: each
    component from -2.5 to 2.5 standard deviations, as red, green and blue. A component without variance is
    grey, and one channel alone is a grey picture. The largest coefficient of each component is positive.
    """
    rows = by_channel(z)
    centred = rows - rows.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)              # largest first
    top = vectors[:, :3]
    top = top * top.gather(0, top.abs().argmax(dim=0, keepdim=True)).sign()
    std = values[:3].sqrt()
    scale = torch.where(std > 1e-6 * std[0], 1 / (5 * std), 0.0)
    parts = (0.5 + scale[:, None] * (top.T @ centred)).clamp(0, 1)
    parts = parts.unflatten(1, (len(z), *z.shape[2:])).transpose(0, 1)          # (N, 3 or fewer, h, w)
    if parts.shape[1] == 2:
        parts = torch.cat([parts, torch.full_like(parts[:, :1], 0.5)], dim=1)
    return {"explained": values / values.sum(), "pictures": parts.expand(-1, 3, -1, -1).float()}


# ------------------------------------------------------------------------------------------------------------
# distance from N(0, I)


def mmd_to_gaussian(x: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> dict:
    """Squared maximum mean discrepancy between vectors x (N, d) and N(0, I) (Gretton et al. 2012, Lemma 6).

    The kernel is k(x, y) = exp(-|x - y|^2 / (2 s^2)) with bandwidth s. The Gaussian's side is integrated
    exactly instead of sampled:

        mmd2 = mean over i != j of k(x_i, x_j) - m(x_i) - m(x_j) + c
        m(x) = E k(x, y) = (s^2 / (s^2 + 1))^(d/2) exp(-|x|^2 / (2 (s^2 + 1)))
        c = E k(y, y') = (s^2 / (s^2 + 2))^(d/2)

    This U-statistic is unbiased, so it may be negative. `error` is its standard error by the jackknife, which
    errs on the large side (Efron and Stein 1981). Raises ValueError for fewer than three vectors.
    """
    (n, d), x = x.shape, x.double()
    if n < 3:
        raise ValueError(f"MMD needs at least 3 images, got {n}")
    norms = x.square().sum(dim=1)
    distances = norms[:, None] + norms - 2 * x @ x.T
    values, errors = [], []
    for s2 in (bandwidth**2 for bandwidth in bandwidths):
        to_gaussian = torch.exp(-0.5 * d * math.log1p(1 / s2) - norms / (2 * (s2 + 1)))
        among_gaussians = math.exp(-0.5 * d * math.log1p(2 / s2))
        terms = torch.exp(-distances / (2 * s2)) - to_gaussian[:, None] - to_gaussian + among_gaussians
        rows = terms.fill_diagonal_(0).sum(dim=1)
        without = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))          # the statistic without vector i
        values.append(rows.sum().item() / (n * (n - 1)))
        errors.append(math.sqrt((n - 1) * without.var(correction=0).item()))
    return {"dimensions": d, "bandwidth": list(bandwidths), "mmd2": values, "error": errors}


# ------------------------------------------------------------------------------------------------------------
# spectrum


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Radial power spectrum of x (N, C, H, W): frequencies and shares, each (min(H, W) // 2,).

    The power |FFT|^2 of every channel, without its mean and under a Hann window, is averaged over images and
    channels and then over the frequencies between k - 1/2 and k + 1/2 cycles per image, k = 1, 2, ... A share
    is this average divided by the power of all frequencies; white noise has 1 / (H W) everywhere. The window
    keeps the jump between opposite borders out of the spectrum. Shares of a constant are NaN.
    """
    side = min(x.shape[-2:])
    window = hann(x.shape[-2])[:, None] * hann(x.shape[-1])
    power = torch.zeros(x.shape[-2:], dtype=torch.float64)
    for part in x.split(CHUNK):
        mean = (part.double() * window).sum(dim=(-2, -1), keepdim=True) / window.sum()
        power += torch.fft.fft2((part.double() - mean) * window).abs().square().sum(dim=(0, 1))
    power[0, 0] = 0
    down, across = torch.fft.fftfreq(x.shape[-2]), torch.fft.fftfreq(x.shape[-1])
    radius = side * torch.hypot(down[:, None], across).double()
    rings = [radius.round() == k for k in range(1, side // 2 + 1)]
    frequency = torch.stack([radius[ring].mean() for ring in rings])
    return frequency, torch.stack([power[ring].mean() for ring in rings]) / power.sum()


def hann(size: int) -> Tensor:
    """The Hann window at the centres of `size` pixels, so that none of them has weight 0."""
    return torch.sin(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size).square()


def exponent(frequency: Tensor, share: Tensor) -> float:
    """a of the power law share ~ frequency^-a, by least squares in logarithms over all but the first value.

    The window mixes the lowest frequency with the mean. NaN for fewer than three values or none above 0.
    """
    if len(frequency) < 4 or not (share > 0).all():
        return math.nan
    x, y = frequency[1:].log(), share[1:].log()
    x, y = x - x.mean(), y - y.mean()
    return -(x @ y / (x @ x)).item()


def spectra(z: Tensor, images: Tensor) -> dict:
    """Spectra of latents and of their images (N, C, H, W), in cycles per image, and their exponents.

    Both exponents are fitted over the frequencies that the latents have.
    """
    frequency, share = spectrum(z)
    image_frequency, image_share = spectrum(images)
    common = slice(len(frequency))
    return {
        "latent_exponent": exponent(frequency, share),
        "image_exponent": exponent(image_frequency[common], image_share[common]),
        "latent_white": 1 / math.prod(z.shape[-2:]),
        "latent_frequency": frequency, "latent_share": share,
        "image_frequency": image_frequency, "image_share": image_share,
    }
