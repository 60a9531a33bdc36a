"""Run: python -m pytest tests/evaluation/test_equivariance_error.py. Oracles: NumPy's matrices, scipy."""

import numpy as np
import pytest
import torch
from linear import LinearAutoencoder, numpy_resize
from scipy.fft import dctn
from torch import Tensor

from evaluation.equivariance import dct_matrix, dct_spectrum, equivariance_error, psnr, relative_error, zigzag
from model import Autoencoder, scale_config
from synthetic import dead_leaves


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- equivariance ------------------------------------------------------------------------------------------


def test_error_of_a_linear_autoencoder():
    """All nine numbers against NumPy's matrices and np.rot90, for images that are not square."""
    model, x = LinearAutoencoder(seed=1), noise(3, 1, 32, 48).double()
    encode, decode = model.numpy_encode, model.numpy_decode
    transforms = {
        "half": [lambda a: numpy_resize(a, a.shape[2] // 2, a.shape[3] // 2)],
        "quarter": [lambda a: numpy_resize(a, a.shape[2] // 4, a.shape[3] // 4)],
        "turn": [lambda a, k=k: np.rot90(a, k, (2, 3)) for k in (1, 2, 3)],
    }
    found, images = equivariance_error(model, x), x.numpy()
    z = encode(images)
    for name, several in transforms.items():
        sums = np.zeros(3)
        for T in several:
            wanted = encode(T(images))
            parts = [np.linalg.norm(t - w) / np.linalg.norm(w) for t, w in zip(T(z), wanted, strict=True)]
            decoded = decode(T(z)).clip(-1, 1)
            scores = [10 * np.log10(4 / ((decoded - b.clip(-1, 1)) ** 2).mean((1, 2, 3))).mean()
                      for b in (T(decode(z)), T(images))]
            sums += [np.mean(parts), *scores]
        ours = [found[f"{kind}_{name}"] for kind in ("encoder", "decoder", "image")]
        assert ours == pytest.approx(list(sums / len(several)), rel=1e-5), name
    assert len(found) == 9


def test_an_equivariant_autoencoder_has_no_error():
    """Means of blocks commute with turns, and on images of one grey with scaling; not on noise."""
    model = LinearAutoencoder(mean=True)
    found = equivariance_error(model, noise(2, 1, 1, 1).double().expand(2, 1, 32, 32))
    assert max(found[f"encoder_{name}"] for name in ("half", "quarter", "turn")) < 1e-6
    assert min(found[f"decoder_{name}"] for name in ("half", "quarter", "turn")) > 105    # the limit is 106
    textured = equivariance_error(model, noise(2, 1, 32, 32).double())
    assert textured["encoder_turn"] < 1e-6 < 0.1 < textured["encoder_quarter"]


def test_error_leaves_the_model_alone():
    """Mode and weights stay, no gradient is taken, and sizes that cannot be scaled are refused."""
    model = Autoencoder(scale_config("S", decoder_channels=8, decoder_blocks=1))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    found = equivariance_error(model, noise(2, 3, 64, 96))
    assert model.training and all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(np.isfinite(value) for value in found.values()) and found["encoder_half"] > 0
    for size in ((40, 64), (32, 64)):
        with pytest.raises(ValueError, match=f"image size {size[0]}x64: .* multiples of 32 and at least 64"):
            equivariance_error(model, noise(2, 3, *size))


def test_worked_numbers():
    """||(3, 4) - (0, 4)|| / ||(0, 4)|| is 3/4; an error of 0.2 everywhere on a range of 2 is 20 dB."""
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])) == pytest.approx(0.75)
    assert psnr(torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.3)) == pytest.approx(20)
    assert psnr(torch.full((1, 1, 2, 2), 1.7), torch.ones(1, 1, 2, 2)) == pytest.approx(106.02, abs=0.01)


# ---- spectrum ----------------------------------------------------------------------------------------------

# the order of JPEG's coefficients (ITU-T T.81, Figure 5), row * 8 + column
JPEG = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,
        7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
        39, 46, 53, 60, 61, 54, 47, 55, 62, 63]


def test_zigzag():
    assert zigzag(8) == JPEG and zigzag(2) == [0, 1, 2, 3]


def test_spectrum_is_scipys():
    """Blocks of 8 and of 4, a remainder left out, channels of any mean and scale."""
    x = noise(2, 3, 20, 27) * torch.tensor([0.1, 1, 30]).view(1, 3, 1, 1) + 5
    a = x.double().numpy()
    a = (a - a.mean((0, 2, 3), keepdims=True)) / a.std((0, 2, 3), keepdims=True)
    for block in (8, 4):
        magnitudes = [
            abs(dctn(image[i : i + block, j : j + block], norm="ortho")).flatten()
            for image in a.reshape(6, 20, 27)
            for i in range(0, 20 - block + 1, block) for j in range(0, 27 - block + 1, block)
        ]
        table = np.mean(magnitudes, axis=0)
        expected = table[zigzag(block)] / table[0]
        assert np.allclose(dct_spectrum(x, block).numpy(), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="size 4x16: a spectrum of 8x8 blocks"):
        dct_spectrum(x[..., :4, :16])


def test_closed_forms():
    """Noise is flat; a wave of the DCT is one line; a picture of dead leaves falls by a factor of 20."""
    white = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    # 2048 blocks: a mean of |N(0, 1)| has a standard error of 0.6 / sqrt(2048) = 1.7% of it
    assert (dct_spectrum(white) - 1).abs().max() < 0.08
    basis = dct_matrix(8)
    wave = (basis[2][:, None] * basis[3]).repeat(2, 2) + torch.zeros(1, 1, 1, 1)
    offset = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)        # some DC, of which each channel has mean 0
    spectrum = dct_spectrum(wave + offset)
    lines = [i for i in range(64) if spectrum[i] > 1e-9]
    assert lines == [0, JPEG.index(2 * 8 + 3)] and spectrum[lines[1]] == pytest.approx(1 / 8)
    leaves = torch.from_numpy(np.stack([dead_leaves(1, i, 64) for i in range(8)])).permute(0, 3, 1, 2)
    assert dct_spectrum(leaves)[-16:].mean() < 1 / 20
    assert torch.allclose(dct_spectrum(leaves), dct_spectrum(3 - leaves.double() / 255), rtol=1e-9)
