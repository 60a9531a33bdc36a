"""Dead-leaves images: a data set that needs no download.

Opaque shapes fall on one another until they cover the image. Their radii follow p(r) ~ r^-3, so every scale
covers the same area. Such images share the statistics of photographs that matter to an autoencoder: a
power-law spectrum, occlusion edges and heavy-tailed gradients (Lee, Mumford and Huang, "Occlusion models for
natural images", 2001). Ours add families of similar shapes, muted palettes, shading, texture, defocus and
noise. The constants were tuned by hand against photographs; tests/test_synthetic.py checks the statistics.

One row of a table holds everything needed to paint a shape. Shape numbers are drawn at twice the size. The
table is looked up there and averaged over 2x2 pixels for antialiasing; the rest runs at the final size.

    python synthetic.py --out sheet.png
"""

import argparse
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rng = np.random.Generator

MIN_RADIUS = 1.6     # pixels, at every image size: a smaller image shows fewer shapes, not finer ones
VERTICES = 20        # per disc or blob
TEXTURES = 3         # texture fields per image; each shape mixes them
# chroma axes: warm to cool, and green to magenta; natural colours vary far less along the second
CHROMA = np.array([[1, 0, -1], [-0.5, 1, -0.5]])


# ---- shapes ------------------------------------------------------------------------------------------------


def _scatter(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Family number, radius and centre (x + iy, pixels) of every shape, back to front -> three arrays (N,).

    The shapes of a family share place, form and colour, like leaves, windows, pebbles or letters.
    """
    low = MIN_RADIUS * math.exp(rng.exponential(0.4))
    high = max(size / 2, 2 * low)
    mean_area = 2 * math.pi * low**2 * math.log(high / low)
    layers = rng.uniform(0.3, 2.0)                      # how often the image is covered: bare to cluttered
    u = rng.random(4 + int(layers * size**2 / mean_area))
    radii = (u * high**-2 + (1 - u) * low**-2) ** -0.5  # inverse CDF of p(r) ~ r^-3
    # parts lie on objects and objects on grounds, so large shapes lie behind; how strictly varies per image
    radii = radii[np.argsort(rng.standard_normal(len(u)) - rng.uniform(0, 2) * np.log(radii))]
    grounds = size * np.append(1, rng.uniform(0.3, 0.9, rng.integers(2, 8)))
    radii = np.append(grounds, radii)

    n, families = len(radii), rng.integers(4, 16)
    family = rng.choice(families, n, p=rng.dirichlet(np.ones(families)))
    home, spread = rng.random((2, families)), np.exp(rng.uniform(-3, 0.5, families))
    place = home[:, family] + spread[family] * rng.standard_normal((2, n))
    place[:, : len(grounds)] = rng.random((2, len(grounds)))
    place = (place + 0.15) % 1.3 - 0.15                 # no centre lies far outside
    place[:, 0] = 0.5                                   # shape 0 is the background (see _shape_map)
    return family, radii, size * (place[0] + 1j * place[1])


def _turns(rng: Rng, n: int) -> np.ndarray:
    """Directions in radians -> (n,); three in four are upright or flat, like walls, trunks and horizons."""
    turn = rng.uniform(0, 2 * math.pi, n)
    return np.where(rng.random(n) < 0.75, np.round(turn * 2 / math.pi) * math.pi / 2, turn)


def _outlines(rng: Rng, family: np.ndarray, radii: np.ndarray, centres: np.ndarray) -> list:
    """Ellipses, blobs, polygons, boxes and bars -> N closed outlines [x0, y0, x1, y1, ...].

    Coordinates have the unit of `radii` and `centres`.
    """
    n, families = len(radii), family.max() + 1
    ellipse, blob, polygon, box, bar = range(5)
    kind = rng.choice(5, families, p=rng.dirichlet([1.0, 1.0, 0.7, 1.5, 0.8]))
    sides = np.choose(kind, [VERTICES, VERTICES, 5, 4, 4])
    aspect = np.exp(rng.normal(0, 0.3, families)) * np.where(kind == bar, 3, 1)
    turn, sway = _turns(rng, families), rng.exponential(0.2, families)
    kind, sides, turn = kind[family], sides[family], turn[family] + sway[family] * rng.standard_normal(n)
    aspect = (aspect[family] * np.exp(rng.normal(0, 0.1, n)))[:, None]

    angle = 2 * math.pi * (np.arange(VERTICES) + 0.5) / sides[:, None]
    angle += (kind == polygon)[:, None] * rng.uniform(-0.5, 0.5, angle.shape)
    depth = rng.normal(0, 0.2, (2, n, 1)) * (kind == blob)[:, None]
    phase = rng.uniform(0, 2 * math.pi, (2, n, 1))
    lobes = depth[0] * np.cos(2 * angle + phase[0]) + depth[1] * np.cos(3 * angle + phase[1])
    points = (1 + lobes) * (aspect * np.cos(angle) + 1j / aspect * np.sin(angle))
    points = (radii * np.exp(1j * turn))[:, None] * points + centres[:, None]
    flat = np.stack([points.real, points.imag], -1).reshape(n, -1).tolist()
    return [xy[: 2 * k] for xy, k in zip(flat, sides, strict=True)]


def _shape_map(outlines: list, size: int) -> np.ndarray:
    """Number of the visible shape per pixel -> (size, size) int32; later outlines cover earlier ones.

    Pixels outside all outlines belong to shape 0.
    """
    canvas = Image.new("I", (size, size))
    draw = ImageDraw.Draw(canvas)
    for number, outline in enumerate(outlines):
        draw.polygon(outline, fill=number)
    return np.asarray(canvas)


# ---- surfaces ----------------------------------------------------------------------------------------------


def _colours(rng: Rng, family: np.ndarray) -> np.ndarray:
    """One colour per shape -> (N, 3), about [0, 1]: alike within a family, with a small palette per image."""
    n, families, hues = len(family), family.max() + 1, rng.integers(2, 6)
    tone = rng.uniform(0.35, 0.75) + rng.uniform(0.14, 0.33) * rng.standard_normal(families)
    tone = np.clip(tone[family] + rng.gamma(2.0, 0.08) * rng.standard_normal(n), 0.04, 0.93)
    # most surfaces are nearly grey, a few are vivid; the mean is warm, like daylight on wood, skin and earth
    hue = rng.gamma(0.5, 0.33, (hues, 1)) * rng.normal(0, [1, 0.3], (hues, 2))
    hue = hue[rng.integers(0, hues, families)][family] + rng.normal(0, 0.03, (n, 2))
    hue += rng.normal([0.07, 0], [0.06, 0.02])
    return tone[:, None] * np.clip(1 + hue @ CHROMA, 0, 2)


def _table(rng: Rng, family: np.ndarray, radii: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Paint of each shape: colour (3), shading (4), focus (1), texture contrasts -> (N, 8 + TEXTURES).

    The shading at pixel p is 1 + slope . (p - centre) - bulge |p - centre|^2; the table stores the
    coefficients of 1, x, y and x^2 + y^2.
    """
    n, families = len(radii), family.max() + 1
    soft = np.maximum(radii, 4)                         # limits the shading of small shapes
    light = rng.normal(0, 0.15, 2)                      # one light: all shapes are brighter on the same side
    bulge = rng.exponential(0.15, families)[family] / soft**2
    slope = (light + rng.normal(0, 0.1, (n, 2))) / soft[:, None]
    centre = np.stack([centres.real, centres.imag], 1)
    offset = 1 - (slope * centre).sum(1) - bulge * np.abs(centres) ** 2
    slope += 2 * bulge[:, None] * centre
    focus = np.arange(n) > rng.uniform(0.2, 1) * n      # in focus in front of this depth
    contrast = rng.gamma(1.0, rng.uniform(0.02, 0.12), (families, TEXTURES))[family]
    return np.column_stack([_colours(rng, family), offset, slope, -bulge, focus, contrast]).astype(np.float32)


def _textures(rng: Rng, size: int) -> np.ndarray:
    """Power-law noise, stretched along one axis, soft or hard -> (TEXTURES, size, size), unit variance."""
    turn = _turns(rng, TEXTURES)[:, None, None]
    stretch, power = np.exp(rng.uniform(0, 1, turn.shape)), rng.uniform(0.9, 1.8, turn.shape)
    fx, fy = np.fft.rfftfreq(size), np.fft.fftfreq(size)[:, None]
    along, across = np.cos(turn) * fx + np.sin(turn) * fy, np.cos(turn) * fy - np.sin(turn) * fx
    f = ((along * stretch) ** 2 + (across / stretch) ** 2 + size**-2).astype(np.float32)
    noise = rng.standard_normal((*f.shape, 2), np.float32).view(np.complex64)[..., 0]
    fields = np.fft.irfft2(noise * f ** np.float32(-power / 2), s=(size, size))
    fields /= fields.std((1, 2), keepdims=True)
    fields = np.tanh(rng.choice([0.3, 1, 2], turn.shape).astype(np.float32) * fields)
    return fields / fields.std((1, 2), keepdims=True)


# ---- pictures ----------------------------------------------------------------------------------------------


def _camera(rng: Rng, image: np.ndarray, focus: np.ndarray) -> np.ndarray:
    """Defocus and sensor noise: image (S, S, 3) in [0, 1] -> uint8.

    focus: (S, S) in [0, 1], 1 where a shallow depth of field leaves the image sharp.
    """
    picture = Image.fromarray((255 * image).astype(np.uint8))
    lens = rng.choice(["shallow", "soft", "sharp"], p=[0.25, 0.25, 0.5])
    if lens == "shallow":
        behind = picture.filter(ImageFilter.GaussianBlur(0.3 + rng.exponential(0.6)))
        picture = Image.composite(picture, behind, Image.fromarray((255 * focus).astype(np.uint8)))
    elif lens == "soft":
        picture = picture.filter(ImageFilter.GaussianBlur(rng.exponential(0.35)))
    noise = rng.exponential(0.8) * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def dead_leaves(seed: int, index: int, size: int) -> np.ndarray:
    """Image `index` of the infinite data set `seed`, a pure function of its arguments.

    -> (size, size, 3) uint8 RGB. Raises ValueError for a negative seed or index and for a size below 8.
    """
    if seed < 0 or index < 0 or size < 8:
        raise ValueError(f"need seed >= 0, index >= 0 and size >= 8, got {seed}, {index} and {size}")
    rng = np.random.default_rng([seed, index, size])
    family, radii, centres = _scatter(rng, size)
    shapes = _shape_map(_outlines(rng, family, 2 * radii, 2 * centres), 2 * size)
    seen = np.take(_table(rng, family, radii, centres), shapes, axis=0)
    seen = (seen[::2, ::2] + seen[1::2, ::2] + seen[::2, 1::2] + seen[1::2, 1::2]) / 4
    y, x = np.mgrid[:size, :size].astype(np.float32)
    shade = seen[..., 3] + seen[..., 4] * x + seen[..., 5] * y + seen[..., 6] * (x**2 + y**2)
    shade *= 1 + np.einsum("tyx,yxt->yx", _textures(rng, size), seen[..., 8:])
    # the light falls off to one side
    slope = rng.normal(0, 0.2, 2) / size
    shade *= np.float32(1 + slope[0] * (x - size / 2) + slope[1] * (y - size / 2))
    return _camera(rng, np.clip(seen[..., :3] * shade[..., None], 0, 1), seen[..., 7])


def sheet(n: int, size: int, seed: int) -> Image.Image:
    """Contact sheet of images 0 to n - 1 of data set `seed`, eight to a row; ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"a sheet needs at least one image, got n = {n}")
    page = Image.new("RGB", (min(n, 8) * size, -(-n // 8) * size), "white")
    for i in range(n):
        page.paste(Image.fromarray(dead_leaves(seed, i, size)), (i % 8 * size, i // 8 * size))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a contact sheet of dead-leaves images.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="sheet.png", help="image file to write, .png or .jpg")
    parser.add_argument("--n", type=int, default=24, help="number of images")
    parser.add_argument("--size", type=int, default=96, help="side of each image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set")
    args = parser.parse_args()
    try:
        sheet(args.n, args.size, args.seed).save(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
