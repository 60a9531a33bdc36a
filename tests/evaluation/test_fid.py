"""Run: python -m pytest tests/test_fid.py. Oracles: vectors.json, scipy's matrix root, numpy's covariance."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from formulas import formula_state, image_a, image_b, known_answers, tensor, u01, write_formula_file
from torch import nn

from evaluation import fid
from runtime import weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def known() -> dict:
    return known_answers()


def gaussian(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance by numpy."""
    return torch.tensor(rows.mean(axis=0)), torch.tensor(np.cov(rows.T))


def known_rows(case: str) -> tuple[np.ndarray, np.ndarray]:
    """The two samples of a case of vectors.json, as their formulas say."""
    if case.startswith("independent"):
        return u01(64 * 8, 2).reshape(64, 8), 0.8 * u01(48 * 8, 3).reshape(48, 8) + 0.15
    if case.startswith("paired"):
        x = u01(1600, 4).reshape(100, 16)
        return x, x + 0.2 * u01(1600, 5).reshape(100, 16) - 0.07
    x = u01(96, 6).reshape(6, 16)
    return x, x + 0.2 * u01(96, 7).reshape(6, 16)


CASES = ["independent n1=64 n2=48 d=8", "paired n=100 d=16", "rank deficient n=6 d=16"]


def streamed(rows: np.ndarray, sizes: list[int]) -> fid.Moments:
    """The rows in batches of these sizes, spread over three chunks, the last of which gets most."""
    moments = fid.Moments(rows.shape[1], 3, CPU)
    for batch in torch.tensor(rows).split(sizes):
        moments.add(batch, torch.arange(len(batch)).clamp(max=2))
    return moments


# ------------------------------------------------------------------------------------------------------------
# the distance


@pytest.mark.parametrize("case", CASES)
def test_known_distances(case, known):
    """Direct to 1e-8; streamed in unequal batches and chunks the same to 1e-10; equal samples give 0."""
    x, y = known_rows(case)
    direct = fid.frechet(*gaussian(x), *gaussian(y))
    assert direct == pytest.approx(known["fid"][case]["fid"], abs=1e-8)
    split = [streamed(rows, [1, 3, len(rows) - 4]).gaussian() for rows in (x, y)]
    assert fid.frechet(*split[0], *split[1]) == pytest.approx(direct, abs=1e-10)
    assert fid.frechet(*gaussian(x), *gaussian(x)) == pytest.approx(0, abs=1e-10)


def test_closed_form():
    """Means 3 apart, diagonal covariances: 9 + (1 - 2)^2 + 0 + (3 - 1)^2 = 14."""
    a, b = torch.tensor([1.0, 4, 9]).double().diag(), torch.tensor([4.0, 4, 1]).double().diag()
    means = torch.zeros(3).double(), torch.tensor([1.0, 2, 2]).double()
    assert fid.frechet(means[0], a, means[1], b) == pytest.approx(14, abs=1e-12)


def test_equals_scipys_matrix_root():
    """For covariances of full rank the nuclear norm is the trace of scipy's root of their product."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 40)) @ rng.normal(size=(40, 40))
    y = x + rng.normal(size=(300, 40))
    (mean_x, cov_x), (mean_y, cov_y) = ((rows.mean(axis=0), np.cov(rows.T)) for rows in (x, y))
    root = np.trace(scipy.linalg.sqrtm(cov_x @ cov_y).real)
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * root
    assert fid.frechet(*gaussian(x), *gaussian(y)) == pytest.approx(expected, rel=1e-9)


def test_identity_is_0_in_many_dimensions_of_few_images():
    """20 images in 300 dimensions with features of some size: still 0 to 1e-10 of the trace."""
    rows = 10 * np.random.default_rng(1).gamma(1.0, size=(20, 300))
    mean, cov = gaussian(rows)
    assert abs(fid.frechet(mean, cov, mean, cov)) < 1e-10 * cov.trace()


# ------------------------------------------------------------------------------------------------------------
# sums


def test_sums_of_rounded_features_are_exact():
    """Any order and any batches give the same bits, as integers would; float64 alone does not."""
    features = np.random.default_rng(2).gamma(0.5, 4.0, size=(500, 30)).astype(np.float32)
    rows = fid.to_grid(torch.tensor(features))
    shuffled = rows[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    sums, orders = [], ((rows, 500), (shuffled, 7))
    for order, size in orders:
        moments = fid.Moments(30, 1, CPU)
        for batch in order.split(size):
            moments.add(batch, torch.zeros(len(batch), dtype=torch.long))
        sums.append(moments)
    assert torch.equal(sums[0].outer, sums[1].outer) and torch.equal(sums[0].sum, sums[1].sum)
    assert all(torch.equal(a, b) for a, b in zip(sums[0].gaussian(), sums[1].gaussian(), strict=True))
    ints = (rows * fid.GRID).long().numpy().astype(object)
    exact = (ints.T @ ints) / int(fid.GRID) ** 2
    assert (sums[0].outer.sum(dim=(0, 1)).numpy() == exact.astype(float)).all()
    plain = [sum(batch.T @ batch for batch in order.split(size)) for order, size in orders]
    assert not torch.equal(*plain)


def test_rounding_of_features_does_not_show():
    """The grid moves features by less than 2.4e-7 and the distance by less than 1e-6 of itself."""
    rng = np.random.default_rng(3)
    x = rng.gamma(0.5, size=(400, 32)).astype(np.float32)
    y = (x * 1.1 + 0.05 * rng.normal(size=x.shape)).astype(np.float32)
    rounded = [fid.to_grid(torch.tensor(rows)).numpy() for rows in (x, y)]
    assert 0 < np.abs(rounded[0] - x).max() <= 0.5 / fid.GRID
    exact = fid.frechet(*gaussian(x.astype(np.float64)), *gaussian(y.astype(np.float64)))
    assert fid.frechet(*gaussian(rounded[0]), *gaussian(rounded[1])) == pytest.approx(exact, rel=1e-6)


def test_leaving_a_chunk_out():
    """gaussian(without=c) is numpy's of the rows of the other chunks."""
    rows = np.random.default_rng(4).normal(size=(90, 5))
    chunk = fid.chunks(90, 3)
    assert chunk.bincount().tolist() == [30, 30, 30] and torch.equal(chunk, fid.chunks(90, 3))
    moments = fid.Moments(5, 3, CPU)
    moments.add(torch.tensor(rows), chunk)
    for c in range(3):
        for ours, direct in zip(moments.gaussian(c), gaussian(rows[chunk.numpy() != c]), strict=True):
            assert torch.allclose(ours, direct, rtol=0, atol=1e-12)


def test_jackknife_of_a_mean():
    """For a mean, leaving out each of G equal chunks gives the std of the chunks' means / sqrt(G)."""
    values = np.random.default_rng(5).normal(size=(10, 40))
    parts = [np.delete(values, c, axis=0).mean() for c in range(10)]
    assert fid.jackknife(parts) == pytest.approx(values.mean(axis=1).std(ddof=1) / math.sqrt(10), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------
# preparation and features


@pytest.mark.parametrize("convention, key, low, scale, tolerance", [
    ("clean", "clean-fid clean (PIL bicubic, float)", 128, 128, 2e-3),    # its PIL and torch's: 5e-4 apart
    ("pytorch", "clean-fid legacy_pytorch == pytorch-fid (bilinear, half-pixel)", 127.5, 127.5, 1e-3),
    ("tf", "torch-fidelity / TF1 (bilinear, no half-pixel)", 128, 128, 1e-3),
])  # fmt: skip
def test_known_preparation(convention, key, low, scale, tolerance, known):
    """32 px to 299 px at the known pixels, each convention in its range."""
    image = fid.PREPARE[convention](tensor(image_a(32, 32))) * scale + low
    answers = known["resize"]["A 32x32 -> 299x299 (values 0..255, not re-quantised)"][key]
    for place, expected in answers.items():
        y, x = json.loads(place.replace("(", "[").replace(")", "]"))
        assert image[0, :, y, x].tolist() == pytest.approx(expected, abs=tolerance)


class Mean(nn.Module):
    """Features by hand: the mean of each colour in the network's input."""

    dims = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 299, 299)
        assert not torch.is_autocast_enabled("cpu")
        return x.mean(dim=(2, 3))


def test_rfid_by_hand():
    """Unequal batches, padded, under autocast, grey: the distance of numpy's Gaussians of the features."""
    rng = np.random.default_rng(6)
    real = torch.tensor(rng.integers(0, 256, (9, 1, 20, 20)), dtype=torch.uint8)
    recon = torch.tensor(rng.integers(0, 200, (9, 1, 20, 20)), dtype=torch.uint8)
    metric = fid.RFID(Mean(), ("pytorch", "tf"), fid.chunks(9, 1), CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for numbers in torch.arange(9).split(4):
            padded = torch.cat([numbers, numbers.new_zeros(4 - len(numbers))])
            metric.add(real[padded], recon[padded], numbers)
    result = metric.result()
    for convention in ("pytorch", "tf"):
        features = [Mean()(fid.PREPARE[convention](images)).double().numpy() for images in (real, recon)]
        expected = fid.frechet(*gaussian(features[0]), *gaussian(features[1]))
        assert result[f"rfid_{convention}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count, chunks", [(1, 1), (2, 2), (3, 10)])
def test_too_few_images(count, chunks):
    """Fewer than two images in a Gaussian, or a chunk without any, raise a ValueError with the count."""
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    metric = fid.RFID(Mean(), ("tf",), torch.arange(count) % chunks, CPU)
    metric.add(images, images, torch.arange(count))
    if count == 3:      # each chunk alone: two are left, which is enough
        assert metric.result()["rfid_tf"] == pytest.approx(0, abs=1e-12)
    else:
        with pytest.raises(ValueError, match=f"{count} images are too few"):
            metric.result()


def test_other_weights_are_refused():
    """Weights of another network raise a ValueError in one line, and clean-fid's loader is put back."""
    loader = fid.inception_pytorch.load_state_dict_from_url
    with pytest.raises(ValueError, match="not the weights of FID's Inception") as error:
        fid.Inception(formula_state("squeeze"))
    assert "\n" not in str(error.value)
    assert fid.inception_pytorch.load_state_dict_from_url is loader


@pytest.mark.slow
def test_known_inception(known, tmp_path, monkeypatch):
    """The formula's 95.7 MB through the offline path give vectors.json's features in each convention."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = write_formula_file("inception", tmp_path)
    expected = known["fake_weight_networks"]["inception (pytorch-fid key names, 2048-d pool, float64)"]
    loaded = weights.load("inception")
    assert len(loaded.state) == expected["keys"] and loaded.path == str(path) and not loaded.published
    net = fid.Inception(loaded.state)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    starts = {"pytorch": "legacy_pytorch", "clean": "clean", "tf": "torch-fidelity"}
    for convention, start in starts.items():
        answer = next(value for key, value in expected.items() if key.startswith(start))
        with torch.no_grad():
            a, b = net(fid.PREPARE[convention](tensor(image_a(64, 64), image_b(64, 64)))).double()
        print(f"{convention}: f(A).mean {a.mean():.8f} ({answer['f(A).mean']}), |f(A) - f(B)| "
              f"{(a - b).norm():.8f} ({answer['||f(A)-f(B)||']})")
        assert a[:5].tolist() == pytest.approx(answer["f(A)[:5]"], rel=1e-4, abs=1e-5)
        assert a.mean().item() == pytest.approx(answer["f(A).mean"], rel=1e-4)
        assert a.std().item() == pytest.approx(answer["f(A).std(unbiased)"], rel=1e-4)
        assert (a - b).norm().item() == pytest.approx(answer["||f(A)-f(B)||"], rel=1e-3)
