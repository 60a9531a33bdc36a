"""Run: python -m pytest tests/evaluation/test_latent_statistics.py. Closed forms, numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import losses
from evaluation import latent_statistics as stats


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coloured(a: float, images: int = 64, side: int = 64) -> torch.Tensor:
    """Gaussian noise whose power is frequency^-a: white noise times frequency^(-a/2) in Fourier space."""
    y, x = (np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    radius = np.hypot(y, x)
    radius[0, 0] = 1
    white = np.fft.fft2(noise(images, 2, side, side).numpy())
    return torch.from_numpy(np.fft.ifft2(white * radius ** (-a / 2)).real)


# ---- one channel at a time ---------------------------------------------------------------------------------


def test_moments_are_those_of_scipy():
    """Mean, std and kurtosis over everything and per channel; a constant has no kurtosis."""
    z = noise(5, 4, 3, 2) * torch.tensor([1.0, 2.0, 0.0, 3.0])[:, None, None] + 0.1
    z[:, 3] = z[:, 3] ** 3
    result, rows = stats.moments(z.float()), z.float().transpose(0, 1).flatten(1).double().numpy()
    assert result["channel_mean"].numpy() == pytest.approx(rows.mean(axis=1))
    assert result["channel_std"].numpy() == pytest.approx(rows.std(axis=1), abs=1e-12)
    keep = [0, 1, 3]
    assert result["channel_kurtosis"][keep].numpy() == pytest.approx(scipy.stats.kurtosis(rows[keep], axis=1))
    assert result["channel_kurtosis"][2].isnan() and result["channel"] == [0, 1, 2, 3]
    whole = rows.mean(), rows.std(), scipy.stats.kurtosis(rows, axis=None)
    assert (result["mean"], result["std"], result["kurtosis"]) == pytest.approx(whole)


@pytest.mark.parametrize("distribution, kurtosis", [
    (torch.distributions.Normal(3.0, 2.0), 0),
    (torch.distributions.Uniform(-1.0, 5.0), -1.2),
    (torch.distributions.Laplace(0.0, 1.0), 3),
])
def test_kurtosis_of_known_distributions(distribution, kurtosis):
    """0, -1.2 and 3, wherever the distribution lies and however wide it is."""
    torch.manual_seed(0)
    z = distribution.sample((100, 1, 64, 64))
    assert stats.moments(z)["kurtosis"] == pytest.approx(kurtosis, abs=0.06)


def test_histograms_are_those_of_numpy():
    """A density over edges that all channels share; a constant has one full bin."""
    z = torch.cat([noise(3, 2, 8, 8), torch.full((3, 1, 8, 8), 0.25)], dim=1)
    result = stats.histograms(z)
    for row, density in zip(z.transpose(0, 1).flatten(1), result["density"], strict=True):
        expected, _ = np.histogram(row, result["edges"], density=True)
        assert density.numpy() == pytest.approx(expected)
    assert (result["density"][2] > 0).sum() == 1
    alone = stats.histograms(torch.ones(2, 1, 4, 4))
    assert (alone["density"].sum() * (alone["edges"][1] - alone["edges"][0])).item() == pytest.approx(1)


def test_kl_of_gaussians():
    """Equal to torch's, in nats; N(0, 1) is dead and pure noise; the mean is the trainer's loss."""
    mean, logvar = noise(6, 3, 4, 5), noise(6, 3, 4, 5, seed=1)
    mean[:, 1], logvar[:, 1] = 0, 0
    result = stats.kl(mean, logvar)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    assert result["channel_kl"].numpy() == pytest.approx(exact.mean(dim=(0, 2, 3)).numpy())
    assert result["per_image"] == pytest.approx(exact.sum(dim=(1, 2, 3)).mean().item())
    assert result["mean"] == pytest.approx(losses.kl_loss(mean, logvar).item(), rel=1e-6)
    assert result["dead"] == 1 and result["channel_dead"].tolist() == [False, True, False]
    assert result["channel_signal"][1] == 0


def test_signal():
    """Means of variance 3 with sigma^2 of 1 are three quarters signal, as in the variance of the samples."""
    mean, logvar = 3**0.5 * noise(50, 1, 32, 32), torch.zeros(50, 1, 32, 32)
    assert stats.kl(mean, logvar)["channel_signal"].item() == pytest.approx(0.75, abs=0.01)
    sampled = mean + noise(50, 1, 32, 32, seed=1)
    assert (mean.var() / sampled.var()).item() == pytest.approx(0.75, abs=0.01)


# ---- channels together -------------------------------------------------------------------------------------


def test_correlation_is_that_of_numpy():
    """The matrix, its largest pair with its sign; a constant channel has none, one channel has no pair."""
    z = noise(20, 4, 8, 8)
    z[:, 1] = -0.6 * z[:, 0] + 0.8 * z[:, 1]
    z[:, 3] = 0.1
    result = stats.correlation(z)
    rows = z[:, :3].transpose(0, 1).flatten(1).numpy()
    assert result["matrix"][:3, :3].numpy() == pytest.approx(np.corrcoef(rows))
    assert result["largest"] == pytest.approx(-0.6, abs=0.03)
    assert result["matrix"][3].isnan().all() and result["mean_absolute"] < 0.25
    assert math.isnan(stats.correlation(z[:, :1])["largest"])


def test_pca_of_a_latent_of_rank_three():
    """Three components hold all the variance, and the picture shows the three sources, up to their sign."""
    sources = noise(2, 3, 16, 16) * torch.tensor([3.0, 2.0, 1.0])[:, None, None]
    mixing, _ = torch.linalg.qr(noise(8, 3, seed=1))
    z = torch.einsum("zc,nchw->nzhw", mixing, sources) + 5
    result = stats.pca(z)
    rows = z.transpose(0, 1).flatten(1)
    values = np.linalg.svd((rows - rows.mean(dim=1, keepdim=True)).numpy(), compute_uv=False) ** 2
    assert result["explained"].numpy() == pytest.approx(values / values.sum(), abs=1e-12)
    assert result["explained"][:3].sum().item() == pytest.approx(1)
    inside = (result["pictures"] > 0) & (result["pictures"] < 1)
    for i in range(3):
        shown, source = result["pictures"][:, i][inside[:, i]], sources[:, i][inside[:, i]]
        assert abs(np.corrcoef(shown, source)[0, 1]) > 0.99
    assert inside.float().mean() > 0.95 and result["pictures"].shape == (2, 3, 16, 16)


def test_pca_of_few_channels():
    """One channel is a grey picture in its order, two leave blue at one half, a constant is plain grey."""
    z = noise(2, 2, 4, 4)
    one, two = stats.pca(z[:, :1])["pictures"], stats.pca(z)["pictures"]
    assert (one[:, :1] == one).all()
    assert (one[:, 0].flatten().argsort() == z[:, 0].flatten().argsort()).all()
    assert (two[:, 2] == 0.5).all() and two[:, :2].std() > 0.1
    assert (stats.pca(torch.ones(2, 4, 4, 4))["pictures"] == 0.5).all()


# ---- distance from N(0, I) ---------------------------------------------------------------------------------


def closed_form(d: int, m: float, s: float, bandwidth: float) -> float:
    """MMD^2 between N(m, s^2 I) and N(0, I) in d dimensions: three Gaussian integrals."""
    b = bandwidth**2
    own, theirs = (b / (b + 2 * s**2)) ** (d / 2), (b / (b + 2)) ** (d / 2)
    across = (b / (b + 1 + s**2)) ** (d / 2) * math.exp(-d * m**2 / (2 * (b + 1 + s**2)))
    return own + theirs - 2 * across


@pytest.mark.parametrize("d, m, s, bandwidths", [
    (768, 0.1, 1.2, stats.BANDWIDTHS),
    (3072, 0.15, 1.0, stats.BANDWIDTHS),
    (3072, 0.0, 1.0, stats.BANDWIDTHS),
    (4, 0.5, 0.5, (0.5, 1, 2, 10)),
])
def test_mmd_of_gaussians(d, m, s, bandwidths):
    """Within 4 standard errors of the closed form at each bandwidth; where they differ, well above 0."""
    result = stats.mmd_to_gaussian(m + s * noise(300, d), bandwidths)
    assert result["dimensions"] == d and result["bandwidth"] == list(bandwidths)
    for value, error, bandwidth in zip(result["mmd2"], result["error"], bandwidths, strict=True):
        exact = closed_form(d, m, s, bandwidth)
        assert abs(value - exact) < 4 * error
        assert m == 0 or value > 4 * error


def test_mmd_is_unbiased_and_its_error_is_honest():
    """Over 400 draws of 10 vectors the mean is exact, and the error is at least the spread, not twice it."""
    results = [stats.mmd_to_gaussian(0.3 + noise(10, 6, seed=i), (2.0,)) for i in range(400)]
    values = np.array([result["mmd2"][0] for result in results])
    spread = values.std()
    assert abs(values.mean() - closed_form(6, 0.3, 1.0, 2.0)) < 4 * spread / 20
    assert 0.95 * spread < np.mean([result["error"][0] for result in results]) < 2 * spread


def test_mmd_is_that_of_two_samples():
    """The integrals replace an infinite sample of the Gaussian: Gretton's statistic of two samples agrees."""
    x, y, b = 0.2 + 1.1 * noise(200, 5), noise(1500, 5, seed=1), 3.0
    def kernel(p, q):
        return torch.exp(-torch.cdist(p, q).square() / (2 * b**2))
    def off_diagonal(k):
        return ((k.sum() - k.trace()) / (len(k) * (len(k) - 1))).item()
    two = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean().item()
    assert stats.mmd_to_gaussian(x, (b,))["mmd2"][0] == pytest.approx(two, abs=3e-3)


def test_mmd_needs_three_vectors():
    """Two have no jackknife."""
    with pytest.raises(ValueError, match="at least 3 images, got 2"):
        stats.mmd_to_gaussian(noise(2, 4))


# ---- spectrum ----------------------------------------------------------------------------------------------


def test_white_noise_is_flat():
    """Every share but the first is 1 / (H W), whatever the mean and the scale; so is the exponent 0."""
    z = 7 + 3 * noise(200, 2, 24, 32)
    frequency, share = stats.spectrum(z)
    assert frequency.numpy() == pytest.approx(np.arange(1, 13), abs=0.25)
    assert (24 * 32 * share[1:]).numpy() == pytest.approx(np.ones(11), abs=0.05)
    assert stats.exponent(frequency, share) == pytest.approx(0, abs=0.02)
    assert stats.spectrum(noise(200, 2, 24, 32))[1].numpy() == pytest.approx(share.numpy())


@pytest.mark.parametrize("a", [1.0, 2.0, 3.0])
def test_power_laws(a):
    """Noise with power frequency^-a has exponent a within 5 percent."""
    assert stats.exponent(*stats.spectrum(coloured(a))) == pytest.approx(a, rel=0.05)


def test_exponent_is_exact_on_exact_powers():
    """The fit leaves the first value out; without enough values or with zeros there is none."""
    frequency = torch.arange(1, 9, dtype=torch.float64)
    share = frequency**-1.7
    share[0] = 5
    assert stats.exponent(frequency, share) == pytest.approx(1.7)
    assert math.isnan(stats.exponent(frequency[:3], share[:3]))
    assert math.isnan(stats.exponent(*stats.spectrum(torch.ones(2, 1, 16, 16))))


def test_spectrum_of_a_wave():
    """A cosine of 5 cycles per image has its power at 5."""
    t = (torch.arange(32) + 0.5) / 32
    frequency, share = stats.spectrum(torch.cos(2 * math.pi * 5 * t).expand(1, 1, 32, 32))
    assert share.argmax() == 4 and frequency[4].item() == pytest.approx(5, abs=0.2)


def test_borders_leave_no_trace():
    """Noise of frequency^-4 in a corner of a larger image keeps its exponent; without a window it has 3.

    The jump between opposite borders, which the FFT sees, has a spectrum of its own.
    """
    corner = coloured(4.0, images=24, side=128)[..., :32, :32]
    assert stats.exponent(*stats.spectrum(corner)) == pytest.approx(4, rel=0.1)
    power = np.square(np.abs(np.fft.fft2(corner.numpy()))).sum(axis=(0, 1))
    radius = 32 * np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32))
    bare = torch.tensor([power[radius.round() == k].mean() for k in range(1, 17)])
    assert stats.exponent(torch.arange(1.0, 17.0).double(), bare) < 3.2


def test_spectra_share_an_axis():
    """Every fourth pixel of images without frequencies above 6 has the images' own spectrum up to 6."""
    white = torch.fft.fft2(noise(16, 2, 64, 64))
    radius = 64 * torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.fftfreq(64))
    images = torch.fft.ifft2(white * (radius < 6)).real
    result = stats.spectra(images[..., ::4, ::4], images)
    assert len(result["latent_share"]) == 8 and len(result["image_share"]) == 32
    ratio = result["latent_share"][1:5] / result["image_share"][1:5]
    assert ratio.numpy() == pytest.approx(np.ones(4), abs=0.05)
    assert result["latent_white"] == 1 / 256
    assert result["latent_exponent"] == pytest.approx(result["image_exponent"], rel=0.05)
