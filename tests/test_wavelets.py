"""Run: python -m pytest tests/test_wavelets.py. Oracles: PyWavelets, gradcheck, numbers worked by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch

import wavelets
from wavelets import dwt2, idwt2, wavedec2, waverec2

SIZES = [(1, 1), (2, 3), (1, 8), (7, 5), (8, 8), (33, 20)]
ALL = list(itertools.product(wavelets.FILTERS, wavelets.MODES))
VECTORS = Path(__file__).parent / "known_answers.json"


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def pywt_dwt2(x: torch.Tensor, wavelet: str, mode: str) -> torch.Tensor:
    low, high = pywt.dwt2(x.numpy(), wavelet, mode)
    return torch.from_numpy(np.concatenate([low, *high], axis=1))


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------------------
# against PyWavelets


@pytest.mark.parametrize("wavelet", wavelets.FILTERS)
def test_filters_equal_pywavelets(wavelet):
    """The spectral factorisation reproduces PyWavelets' tables to 1e-14."""
    low, high = wavelets.FILTERS[wavelet]
    np.testing.assert_allclose(low, pywt.Wavelet(wavelet).rec_lo, rtol=0, atol=1e-14)
    np.testing.assert_allclose(high, pywt.Wavelet(wavelet).rec_hi, rtol=0, atol=1e-14)


@pytest.mark.parametrize("wavelet, mode", ALL)
def test_dwt2_equals_pywavelets(wavelet, mode):
    """Band order, signs, borders and sizes are PyWavelets', also for filters longer than the image."""
    for height, width in SIZES:
        x = randn(2, 3, height, width)
        assert max_error(dwt2(x, wavelet, mode), pywt_dwt2(x, wavelet, mode)) < 1e-12


@pytest.mark.parametrize("wavelet, mode", ALL)
def test_idwt2_equals_pywavelets(wavelet, mode):
    """The inverse of arbitrary bands, not only of bands that came from an image, is PyWavelets'."""
    for height, width in SIZES:
        bands = torch.randn_like(dwt2(randn(2, 3, height, width), wavelet, mode))
        low, *high = (band.numpy() for band in bands.chunk(4, dim=1))
        expected = torch.from_numpy(pywt.idwt2((low, tuple(high)), wavelet, mode))
        assert max_error(idwt2(bands, wavelet, mode), expected) < 1e-12


@pytest.mark.parametrize("wavelet, mode", ALL)
@pytest.mark.filterwarnings("ignore:Level value:UserWarning")  # PyWavelets on levels that only see the border
def test_cascade_equals_pywavelets(wavelet, mode):
    """wavedec2 and waverec2 follow PyWavelets through three levels of odd sides, surplus rows included."""
    x = randn(1, 2, 37, 22)
    coeffs, expected = wavedec2(x, 3, wavelet, mode), pywt.wavedec2(x.numpy(), wavelet, mode, level=3)
    assert max_error(coeffs[0], torch.from_numpy(expected[0])) < 1e-12
    for high, triple in zip(coeffs[1:], expected[1:], strict=True):
        assert max_error(high, torch.from_numpy(np.concatenate(triple, axis=1))) < 1e-12
    back = waverec2(coeffs, wavelet, mode)
    assert max_error(back, torch.from_numpy(pywt.waverec2(expected, wavelet, mode))) < 1e-12
    assert max_error(back[..., :37, :22], x) < 1e-12


# ------------------------------------------------------------------------------------------------------------
# invariances


@pytest.mark.parametrize("wavelet, mode", ALL)
def test_reconstruction_is_perfect(wavelet, mode):
    """idwt2(dwt2(x)) is x; an odd side comes back one larger with x in front."""
    for height, width in SIZES:
        x = randn(2, 3, height, width)
        back = idwt2(dwt2(x, wavelet, mode), wavelet, mode)
        assert back.shape[-2:] == (height + height % 2, width + width % 2)
        assert max_error(back[..., :height, :width], x) < 1e-12


@pytest.mark.parametrize("wavelet", wavelets.FILTERS)
def test_fault_12_periodization_is_an_orthogonal_matrix(wavelet):
    """W W^T = I on 6 x 4 pixels (most filters wrap around them more than once), so energy is kept."""
    eye = torch.eye(24, dtype=torch.float64)
    matrix = dwt2(eye.view(24, 1, 6, 4), wavelet).flatten(1)  # row k is the transform of pixel k
    assert max_error(matrix @ matrix.T, eye) < 1e-13
    x = randn(2, 3, 8, 10)
    assert dwt2(x, wavelet).norm().item() == pytest.approx(x.norm().item(), rel=1e-14)


@pytest.mark.parametrize("mode", wavelets.MODES)
def test_haar_fast_path_equals_the_general_path(mode):
    """The adds and subtractions of Haar are the filter bank with taps 1/sqrt(2), forward and back."""
    x = randn(2, 3, 7, 6)
    low, high = wavelets.analyse(x, "haar", mode)
    ll, lh = wavelets.analyse(low.mT, "haar", mode)
    hl, hh = wavelets.analyse(high.mT, "haar", mode)
    bands = [ll.mT, lh.mT, hl.mT, hh.mT]
    assert max_error(dwt2(x, "haar", mode), torch.cat(bands, dim=1)) < 1e-14
    low, high = (wavelets.synthesise(a.mT, b.mT, "haar", mode).mT for a, b in (bands[:2], bands[2:]))
    assert max_error(idwt2(dwt2(x), "haar", mode), wavelets.synthesise(low, high, "haar", mode)) < 1e-14


def test_haar_on_a_block_by_hand():
    """[[1, 2], [3, 5]] gives LL 5.5, LH -2.5 (rows differ), HL -1.5 (columns differ), HH 0.5."""
    bands = dwt2(torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]))
    assert bands.flatten().tolist() == [5.5, -2.5, -1.5, 0.5]


def test_bands_are_grouped_over_channels():
    """Channel b*C + c holds band b of channel c: LL of all colours first."""
    x = randn(1, 3, 8, 8)
    alone = [dwt2(x[:, c : c + 1], "db2") for c in range(3)]
    assert torch.equal(dwt2(x, "db2"), torch.cat([a[:, b : b + 1] for b in range(4) for a in alone], dim=1))


# ------------------------------------------------------------------------------------------------------------
# gradients, precision, compilers


@pytest.mark.parametrize("mode", wavelets.MODES)
@pytest.mark.parametrize("wavelet, size", [("haar", 4), ("haar", 3), ("db2", 8)])
def test_fault_10_gradients(wavelet, size, mode):
    """First and second derivatives of the transform and its inverse pass torch's numerical check."""
    x = randn(1, 1, size, size).requires_grad_()
    bands = dwt2(x, wavelet, mode).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dwt2(t, wavelet, mode), x)
    assert torch.autograd.gradcheck(lambda t: idwt2(t, wavelet, mode), bands)
    assert torch.autograd.gradgradcheck(lambda t: dwt2(t, wavelet, mode).pow(3), x)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_the_grad_mode_is_left_alone(wavelet):
    """A loss on the detail bands reaches the image; under no_grad there is no graph."""
    x = randn(1, 3, 16, 16).requires_grad_()
    highs = wavedec2(x, 3, wavelet)[1:]
    sum(high.abs().sum() for high in highs).backward()
    assert (x.grad != 0).all()
    with torch.no_grad():
        assert not dwt2(x, wavelet).requires_grad


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_float32_at_least(wavelet, dtype):
    """float64 stays, any other dtype is computed and returned in float32, inside bf16 autocast too."""
    x = randn(1, 3, 16, 16, dtype=dtype)
    expected = pywt_dwt2(x.double(), wavelet, "periodization")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bands = dwt2(x, wavelet)
        back = idwt2(bands.to(dtype), wavelet)
    assert bands.dtype == back.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert max_error(bands.double(), expected) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("wavelet, mode", [("haar", "periodization"), ("db2", "symmetric")])
def test_compiles_in_one_graph(wavelet, mode):
    """torch.compile takes a cascade and its inverse without a graph break."""
    x = randn(1, 3, 16, 16)
    round_trip = lambda x: waverec2(wavedec2(x, 2, wavelet, mode), wavelet, mode)  # noqa: E731
    compiled = torch.compile(round_trip, fullgraph=True, backend="eager")
    assert max_error(compiled(x), x) < 1e-12


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_channels_last_gives_the_same_numbers(wavelet):
    """Memory format changes neither the bands nor the reconstruction."""
    x = randn(2, 3, 9, 8)
    bands = dwt2(x.to(memory_format=torch.channels_last), wavelet)
    assert torch.equal(bands, dwt2(x, wavelet))
    assert torch.equal(idwt2(bands.to(memory_format=torch.channels_last), wavelet), idwt2(bands, wavelet))


# ------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dwt2(torch.zeros(1, 3, 4, 4), "db9"), "unknown wavelet 'db9'"),
        (lambda: dwt2(torch.zeros(1, 3, 4, 4), "db2", "zero"), "unknown mode 'zero'"),
        (lambda: dwt2(torch.zeros(3, 4, 4)), r"got shape \(3, 4, 4\)"),
        (lambda: dwt2(torch.zeros(1, 3, 0, 4)), r"got shape \(1, 3, 0, 4\)"),
        (lambda: idwt2(torch.zeros(1, 6, 4, 4)), "got 6 channels"),
        (lambda: idwt2(torch.zeros(1, 4, 2, 9), "db4", "symmetric"), "side 2 are too small for db4"),
        (lambda: wavedec2(torch.zeros(1, 3, 4, 4), 0), "levels must be at least 1, got 0"),
        (lambda: waverec2([torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 5, 2)]), r"high \(1, 9, 5, 2\)"),
    ],
)
def test_bad_input_names_the_value(call, message):
    """Whatever a caller can get wrong raises a ValueError that shows what was received."""
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------
# known answers (vectors.json): the haar, db2 and db4 entries of the two modes we have


@pytest.fixture(scope="module")
def known() -> dict:
    return json.loads(VECTORS.read_text())["dwt"]


def bands_of(x: list | np.ndarray | torch.Tensor, wavelet: str = "haar", mode: str = "periodization") -> dict:
    """The four bands of one (H, W) matrix under PyWavelets' names."""
    bands = dwt2(torch.as_tensor(x, dtype=torch.float64)[None, None], wavelet, mode)[0]
    return dict(zip(("cA", "cH", "cV", "cD"), bands.numpy(), strict=True))


def assert_matches(band: np.ndarray, expected: list | dict) -> None:
    """A band against its stored values, or against its stored sums and samples, to the file's own 1e-8."""
    if isinstance(expected, list):
        np.testing.assert_allclose(band, expected, rtol=0, atol=1e-8)
        return
    samples = {"sum": band.sum(), "sum_sq": (band**2).sum(), "first_row": band[0], "last": band[-1, -1]}
    for y, x in ((0, 0), (1, 2)):
        samples[f"[{y},{x}]"] = band[y, x]
    for key, value in expected.items():
        np.testing.assert_allclose(samples[key], value, rtol=0, atol=1e-8, err_msg=key)


def test_known_filters(known):
    """dec_lo is our low filter reversed, as the notes say."""
    for wavelet, expected in known["filters"].items():
        low, high = wavelets.FILTERS[wavelet]
        np.testing.assert_allclose([low, high], [expected["rec_lo"], expected["rec_hi"]], rtol=0, atol=1e-14)
        reverse = [low[::-1], high[::-1]]
        np.testing.assert_allclose(reverse, [expected["dec_lo"], expected["dec_hi"]], rtol=0, atol=1e-14)


def test_known_transforms(known):
    """Every stored 8 x 8 transform in periodization and symmetric mode."""
    stored = known["dwt2 of M8"]
    stored["haar"] = dict.fromkeys(wavelets.MODES, stored["haar (identical for all six modes on even sides)"])
    for wavelet, mode in itertools.product(("haar", "db2", "db4"), wavelets.MODES):
        expected, bands = stored[wavelet][mode], bands_of(known["M8"], wavelet, mode)
        assert list(bands["cA"].shape) == expected["shape"]
        for band in bands:
            assert_matches(bands[band], expected[band])


def test_known_odd_size(known):
    """The 7 x 5 corner: both modes repeat the last row and column."""
    for mode in wavelets.MODES:
        expected = known["odd size: M8[:7,:5], haar"][mode]
        low = bands_of(np.array(known["M8"])[:7, :5], "haar", mode)["cA"]
        assert list(low.shape) == expected["shape"]
        assert_matches(low, expected["cA"])


def test_known_cascade(known):
    """Three Haar levels of a formula image: samples, sums, energy per level and in all."""
    expected = known["3-level haar cascade of A(32x32) channel 0 as A/127.5-1"]
    y, x = np.mgrid[:32, :32]
    image = (4 * x + 3 * y + (x * x + 2 * y * y) // 16) % 256 / 127.5 - 1
    low, energy = image, 0.0
    for level in (1, 2, 3):
        bands = bands_of(low)
        assert list(bands["cA"].shape) == expected[f"level {level}"]["shape"]
        for band in bands:
            assert_matches(bands[band], expected[f"level {level}"][band])
        energy += sum((bands[band] ** 2).sum() for band in ("cH", "cV", "cD"))
        low = bands["cA"]
    assert energy + (low**2).sum() == pytest.approx(expected["energy"]["input sum_sq"], abs=1e-9)


def test_known_gain_of_a_constant(known):
    """A constant 1 has LL 2, 4, 8 at levels 1, 2, 3 and details of zero."""
    expected = known["3-level haar cascade of A(32x32) channel 0 as A/127.5-1"]["constant image 1.0"]
    for levels in (1, 2, 3):
        low, *highs = wavedec2(torch.ones(1, 1, 16, 16), levels)
        assert (low == expected[f"cA{levels}"]).all()
        assert all((high == expected["details"]).all() for high in highs)


def test_known_orientation(known):
    """Vertical stripes are in HL (cV) alone, horizontal ones in LH (cH), the checkerboard in HH (cD)."""
    assert known["orientation"]["image X[y,x]=(-1)^x 8x8"] == "only cV nonzero: all cV = 2"
    y, x = np.mgrid[:8, :8]
    for image, name in (((-1.0) ** x, "cV"), ((-1.0) ** y, "cH"), ((-1.0) ** (x + y), "cD")):
        for band, values in bands_of(image).items():
            assert (values == (2 if band == name else 0)).all()
