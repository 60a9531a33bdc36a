"""Orthonormal 2D discrete wavelet transform (paper Sec. 4.1): haar and db2..db8, one level or a cascade.

The bands are concatenated along the channels with PyWavelets' order and signs: LL, LH, HL, HH. LH (cH) is
high-pass along y, HL (cV) along x, and HH (cD) along both. For Haar on a block [[a, b], [c, d]]:

    LL = (a+b+c+d)/2    LH = (a+b-c-d)/2    HL = (a-b+c-d)/2    HH = (a-b-c+d)/2

Nothing is detached and the grad mode is not changed, so a loss on the bands reaches the image. All operations
are additions, multiplications and slices, which autocast and TF32 leave in full precision. float64 inputs
stay float64; any other dtype is computed and returned in float32.

Shapes: B batch, C channels, H W input size, h w band size, L filter length (2 for haar, 2p for dbp). Modes:
    periodization  h = ceil(H/2)           orthonormal: energy is preserved for even sizes
    symmetric      h = floor((H+L-1)/2)    mirrored border, c b a | a b c | c b a
"""

import math

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# filters and borders


def daubechies(moments: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scaling and wavelet filters with `moments` vanishing moments (PyWavelets' rec_lo and rec_hi).

    Spectral factorisation (Daubechies 1992, Sec. 6.1) in float64; within 1e-15 of PyWavelets' tables.
    """
    # |H(z)|^2 is a multiple of (1+z)^p (1+1/z)^p Q(y) with y = (2-z-1/z)/4; keep the smaller of each pair
    # z, 1/z
    y = np.roots([math.comb(moments - 1 + k, k) for k in reversed(range(moments))]).astype(complex)
    z = 1 - 2 * y + np.sqrt((1 - 2 * y) ** 2 - 1)
    z = np.where(abs(z) < 1, z, 1 / z)
    low = np.poly([-1] * moments + z.tolist()).real
    low *= math.sqrt(2) / low.sum()
    high = low[::-1] * (-1) ** np.arange(2 * moments)
    return tuple(low.tolist()), tuple(high.tolist())


# a table, not a cached function: torch.compile traces through caches and cannot trace np.roots
FILTERS = {"haar": daubechies(1)} | {f"db{p}": daubechies(p) for p in range(2, 9)}
MODES = ("periodization", "symmetric")


def extension(size: int, taps: int, mode: str, device: torch.device) -> Tensor:
    """Indices that extend a side of `size` samples for a filter of length `taps` with stride 2."""
    if mode == "periodization":
        even = size + size % 2  # an odd side first repeats its last sample
        return wrapped(1 - taps // 2, even + taps // 2 - 1, even, device).clamp(max=size - 1)
    out = (size + taps - 1) // 2
    index = torch.arange(2 - taps, 2 * out, device=device) % (2 * size)  # long filters mirror repeatedly
    return torch.minimum(index, 2 * size - 1 - index)


def wrapped(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """The indices from start to stop, modulo size."""
    # modulo a tensor, because the ONNX exporter cannot take a remainder by a size that varies
    return torch.arange(start, stop, device=device) % torch.full((), size, device=device)


def check(x: Tensor, wavelet: str, mode: str) -> None:
    """Raise ValueError unless both names are known and x is (B, C, H, W) with at least one pixel."""
    if wavelet not in FILTERS:
        raise ValueError(f"unknown wavelet {wavelet!r}; choose one of {', '.join(FILTERS)}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if x.ndim != 4 or 0 in x.shape[-2:]:
        raise ValueError(f"expected (B, C, H, W) with H, W >= 1, got shape {tuple(x.shape)}")


def full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------------------
# one dimension (the last one)


def analyse(x: Tensor, wavelet: str, mode: str) -> tuple[Tensor, Tensor]:
    """(..., N) -> low, high, each (..., n): correlate with both filters and keep every second sample."""
    low, high = FILTERS[wavelet]
    x = x.index_select(-1, extension(x.shape[-1], len(low), mode, x.device))
    x = x.unflatten(-1, (-1, 2))                                        # the extended side is even
    n = x.shape[-2] - len(low) // 2 + 1
    shifted = [x[..., k // 2 : k // 2 + n, k % 2] for k in range(len(low))]    # one view per tap
    return weighted(low, shifted), weighted(high, shifted)


def synthesise(low: Tensor, high: Tensor, wavelet: str, mode: str) -> Tensor:
    """low, high, each (..., n) -> (..., 2n) for periodization, (..., 2n-L+2) for symmetric."""
    f_low, f_high = FILTERS[wavelet]
    half = len(f_low) // 2
    if mode == "periodization":
        wrap = wrapped(0, low.shape[-1] + half - 1, low.shape[-1], low.device)
        low, high = low.index_select(-1, wrap), high.index_select(-1, wrap)
    n = low.shape[-1] - half + 1
    if n < 1:
        raise ValueError(f"bands of side {low.shape[-1]} are too small for {wavelet} in mode {mode}")
    views = [b[..., half - 1 - k : half - 1 - k + n] for b in (low, high) for k in range(half)]
    even = weighted(f_low[0::2] + f_high[0::2], views)  # samples 0, 2, 4, ... see only the even taps
    odd = weighted(f_low[1::2] + f_high[1::2], views)
    x = torch.stack([even, odd], dim=-1).flatten(-2)  # (..., 2n)
    return x.roll(half - 1, dims=-1) if mode == "periodization" else x


def weighted(weights: tuple[float, ...], tensors: list[Tensor]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


# ------------------------------------------------------------------------------------------------------------
# one level


def dwt2(x: Tensor, wavelet: str = "haar", mode: str = "periodization") -> Tensor:
    """One level of the transform, equal to pywt.dwt2.

    x: (B, C, H, W), any size -> (B, 4C, h, w): LL of all C channels, then LH, HL, HH. A constant image of 1
    has LL = 2. Raises ValueError for an unknown wavelet or mode and for any other shape.
    """
    check(x, wavelet, mode)
    x = full_precision(x)
    if wavelet == "haar":
        return haar(x)
    columns = [band.mT for band in analyse(x, wavelet, mode)]  # low and high along x, now (B, C, w, H)
    (ll, lh), (hl, hh) = (analyse(band, wavelet, mode) for band in columns)
    return torch.cat([ll.mT, lh.mT, hl.mT, hh.mT], dim=1)


def idwt2(bands: Tensor, wavelet: str = "haar", mode: str = "periodization") -> Tensor:
    """Inverse of `dwt2`, equal to pywt.idwt2.

    bands: (B, 4C, h, w) -> (B, C, 2h, 2w) for periodization, (B, C, 2h-L+2, 2w-L+2) for symmetric; odd sizes
    come back one larger. Raises ValueError like `dwt2`, if the bands are too small, and if the number of
    channels is not a multiple of 4.
    """
    check(bands, wavelet, mode)
    if bands.shape[1] % 4:
        raise ValueError(f"expected 4 bands with equal numbers of channels, got {bands.shape[1]} channels")
    ll, lh, hl, hh = full_precision(bands).chunk(4, dim=1)
    if wavelet == "haar":
        return inverse_haar(ll, lh, hl, hh)
    low, high = (synthesise(a.mT, b.mT, wavelet, mode).mT for a, b in ((ll, lh), (hl, hh)))
    return synthesise(low, high, wavelet, mode)


def haar(x: Tensor) -> Tensor:
    """`dwt2` for Haar by additions and subtractions; both modes repeat the last sample of an odd side."""
    if x.shape[-2] % 2:
        x = torch.cat([x, x[..., -1:, :]], dim=-2)
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], dim=-1)
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    low, high = top + bottom, top - bottom                       # along y: whole rows, so memory in order
    (a, b), (c, d) = ((band[..., 0::2], band[..., 1::2]) for band in (low, high))
    return torch.cat([a + b, c + d, a - b, c - d], dim=1).mul_(0.5)


def inverse_haar(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor) -> Tensor:
    """The inverse of `haar`: four bands (B, C, h, w) -> (B, C, 2h, 2w)."""
    low, high = (torch.stack([a + b, a - b], dim=-1).flatten(-2) for a, b in ((ll, hl), (lh, hh)))
    return torch.stack([low + high, low - high], dim=-2).flatten(-3, -2).mul_(0.5)


# ------------------------------------------------------------------------------------------------------------
# a cascade of levels


def wavedec2(x: Tensor, levels: int, wavelet: str = "haar", mode: str = "periodization") -> list[Tensor]:
    """Cascade of `dwt2` on the LL band, equal to pywt.wavedec2.

    x: (B, C, H, W) -> [low_n (B, C, ...), high_n (B, 3C, ...), ..., high_1] for n levels, coarsest first;
    each high holds LH, HL, HH of all C channels. Raises ValueError like `dwt2`, and if levels < 1.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    low, highs = x, []
    for _ in range(levels):
        low, high = dwt2(low, wavelet, mode).tensor_split([low.shape[1]], dim=1)
        highs.append(high)
    return [low, *reversed(highs)]


def waverec2(coeffs: list[Tensor], wavelet: str = "haar", mode: str = "periodization") -> Tensor:
    """Inverse of `wavedec2`, equal to pywt.waverec2; the extra sample of odd sizes is cropped between levels.

    coeffs: as returned by `wavedec2` -> (B, C, H, W), where odd H and W come back one larger.
    Raises ValueError like `idwt2`, and if two levels do not fit together.
    """
    low, *highs = coeffs
    for high in highs:
        surplus_h, surplus_w = low.shape[-2] - high.shape[-2], low.shape[-1] - high.shape[-1]
        if surplus_h not in (0, 1) or surplus_w not in (0, 1) or high.shape[1] != 3 * low.shape[1]:
            raise ValueError(f"low {tuple(low.shape)} and high {tuple(high.shape)} do not fit together")
        low = low[..., : high.shape[-2], : high.shape[-1]]
        low = idwt2(torch.cat([low, high], dim=1), wavelet, mode)
    return low
