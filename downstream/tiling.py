"""Decode and encode large images in tiles, in memory that does not grow with the image.

LiteVAE's decoder has only convolutions and nearest-neighbour upsampling, so a pixel depends on the latents at
most `halo` away. A tile that is decoded with this margin and cropped equals that part of the whole image, up
to the rounding of floats. The margin is cut only at the border of the image, where the whole decode has the
same zero padding. Elsewhere the padding is wrong, but its effect ends within the margin.

Encoders have group norms, whose statistics cover the image. Tiled encoding is therefore an approximation;
docs/latents.md has its error.

B batch, C image channels, Z latent channels, f downsample factor, h w = H/f, W/f.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import Attention, Autoencoder, Posterior, SelfModulatedConv2d

LOCAL = (nn.Conv2d, SelfModulatedConv2d, nn.Identity)     # layers whose outputs depend on a neighbourhood

# ----------------------------------------------------------------------------
# decoding, exact


def halo(model: Autoencoder) -> int:
    """How far a decoded pixel sees, in latent pixels: 18 for LiteVAE's default decoder.

    The decoder is followed from the image back to the latent. A k x k convolution adds k // 2 pixels of its
    own resolution; an upsampling by 2 halves what has added up, rounded up; the inverse Haar transform is an
    upsampling of 2 x 2 blocks. Raises ValueError if a pixel depends on the whole image, as with group norm or
    attention, and for the output of other wavelets, whose inverse wraps around the image.
    """
    wavelet = getattr(model.decoder, "wavelet", None)
    if wavelet not in (None, "haar"):
        raise ValueError(f"tiles cannot be exact: the inverse {wavelet} transform joins opposite borders of "
                         "the image; decode it whole")
    layers = trace(model)
    others = sorted({type(layer).__name__ for layer, _ in layers if not isinstance(layer, LOCAL)})
    if others:
        raise ValueError(f"tiles cannot be exact: a pixel depends on the whole image through "
                         f"{' and '.join(others)} in this decoder; decode it whole")
    reach, size = 0, SMALL * model.config.downsample_factor
    for layer, side in reversed(layers):
        reach = -(-reach * side // size) + radius(layer)
        size = side
    return -(-reach * SMALL // size)


SMALL = 2       # side of the latent that is decoded to see the layers; a group norm needs more than one pixel


@torch.no_grad()
def trace(model: Autoencoder) -> list[tuple[nn.Module, int]]:
    """The layers that a decode runs, in order, and the height of their outputs."""
    ran: list[tuple[nn.Module, int]] = []
    hooks = [module.register_forward_hook(lambda layer, _, output: ran.append((layer, output.shape[-2])))
             for module in model.modules()
             if isinstance(module, SelfModulatedConv2d | Attention) or not list(module.children())]
    try:
        weight = next(model.parameters())
        model.decode(weight.new_zeros(1, model.config.latent_channels, SMALL, SMALL))
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def radius(layer: nn.Module) -> int:
    conv = layer.conv if isinstance(layer, SelfModulatedConv2d) else layer
    return 0 if isinstance(conv, nn.Identity) else conv.dilation[0] * (conv.kernel_size[0] // 2)


def decode_tiles(model: Autoencoder, z: Tensor, tile: int = 64) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, pixels): the image of z (B, Z, h, w) in pieces of tile x tile latents.

    pixels (B, C, f tile, f tile), smaller at the right and lower border, are on the model's device; z may be
    elsewhere. A window of (tile + 2 halo)^2 latents goes through the decoder at once. Raises ValueError like
    `halo`, and if tile is below 1.
    """
    if tile < 1:
        raise ValueError(f"tiles must have at least 1 latent pixel, got {tile}")
    margin, f, device = halo(model), model.config.downsample_factor, next(model.parameters()).device
    for rows, tall in windows(z.shape[-2], tile, margin):
        for columns, wide in windows(z.shape[-1], tile, margin):
            with torch.no_grad():
                pixels = model.decode(z[..., tall, wide].to(device))
            top, left = f * (rows.start - tall.start), f * (columns.start - wide.start)
            rows_px, columns_px = (slice(f * part.start, f * part.stop) for part in (rows, columns))
            height, width = rows_px.stop - rows_px.start, columns_px.stop - columns_px.start
            yield rows_px, columns_px, pixels[..., top : top + height, left : left + width]


def windows(size: int, tile: int, margin: int) -> list[tuple[slice, slice]]:
    """Tiles of one side, each with its window: the tile and its margin, cut at the borders."""
    spans = ((start, min(start + tile, size)) for start in range(0, size, tile))
    return [(slice(a, b), slice(max(0, a - margin), min(size, b + margin))) for a, b in spans]


def decode_tiled(model: Autoencoder, z: Tensor, tile: int = 64, out: Tensor | None = None) -> Tensor:
    """model.decode(z), computed in tiles of tile x tile latents and collected in `out`.

    z (B, Z, h, w) -> (B, C, H, W): `out` if given, on any device, else a new fp32 tensor on the CPU. Raises
    ValueError like `decode_tiles`, and if out has another shape.
    """
    f = model.config.downsample_factor
    shape = (len(z), model.config.in_channels, f * z.shape[-2], f * z.shape[-1])
    out = torch.empty(shape) if out is None else out
    if out.shape != shape:
        raise ValueError(f"out is {tuple(out.shape)}, the image of these latents is {shape}")
    for rows, columns, pixels in decode_tiles(model, z, tile):
        out[..., rows, columns] = pixels
    return out


# ----------------------------------------------------------------------------
# encoding, approximate


@torch.no_grad()
def encode_tiled(model: Autoencoder, x: Tensor, tile: int = 512, overlap: int = 128) -> Posterior:
    """About model.encode(x), from overlapping tiles of tile x tile pixels; on the CPU.

    Each tile has group-norm statistics of its own. Where tiles overlap, means and log-variances are blended
    with weights that fall linearly to the borders of a tile. x (B, C, H, W) -> Posterior (B, Z, h, w). Raises
    ValueError like model.encode, and unless tile and overlap are multiples of f with 0 < overlap < tile.
    """
    f, device = model.config.downsample_factor, next(model.parameters()).device
    if not 0 < overlap < tile or tile % f or overlap % f:
        raise ValueError(f"tile and overlap must be multiples of {f} with 0 < overlap < tile, got {tile} and "
                         f"{overlap} pixels")
    model.check_size(x)
    shape = (len(x), 2 * model.config.latent_channels, x.shape[-2] // f, x.shape[-1] // f)
    moments, total = torch.zeros(shape), torch.zeros(shape[-2:])
    for top in starts(x.shape[-2], tile, overlap):
        for left in starts(x.shape[-1], tile, overlap):
            window = x[..., top : top + tile, left : left + tile]
            posterior = model.encode(window.to(device))
            if not isinstance(posterior, Posterior):
                raise ValueError("tiles of a model with a codebook cannot be blended: encode the image whole")
            h, w = posterior.mean.shape[-2:]
            weight = ramp(h, overlap // f)[:, None] * ramp(w, overlap // f)
            place = (..., slice(top // f, top // f + h), slice(left // f, left // f + w))
            moments[place] += weight * torch.cat([posterior.mean, posterior.logvar], dim=1).cpu()
            total[place] += weight
    return Posterior.of(moments / total)


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one side begin; the last one ends at the border."""
    return [*range(0, size - tile, tile - overlap), max(size - tile, 0)]


def ramp(size: int, overlap: int) -> Tensor:
    """Weights of a tile along one side: 1 in the middle, falling linearly over `overlap` at both ends."""
    distance = torch.arange(size) + 0.5
    return (torch.minimum(distance, size - distance) / overlap).clamp(max=1)
