"""Images in. Run: python -m pytest tests/test_data.py"""

import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import image_a
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

import data
import eval as eval_script
import latents
import train
from data import GlobalBatchSampler, TrainSet, ValSet
from examples import diffusion
from runtime import sources
from runtime.listings import Listing
from runtime.sources import BrokenImage, load_reduced, load_rgb, open_source
from synthetic import dead_leaves

SHARED = Path(__file__).parents[2] / "shared"      # photographs, where there are some
KNOWN = Path(__file__).parent / "known_answers.json"
NAMES = ["a.png", "b/c.PNG", "b/d/e.bmp", "b/d/f.tiff", "g.webp", "h.TIF"]


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tree(root: Path, names: list[str] = NAMES) -> Path:
    """Lossless pictures 0, 1, 2, ... under these names."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return root


def write_tar(path: Path, root: Path, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name in reversed(NAMES):
            tar.add(root / name, arcname=name)
    return path


def write_zip(path: Path, root: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in reversed(NAMES):
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = compression, b"UT\x01\x00\x00"    # as Info-ZIP adds a time
            archive.writestr(info, (root / name).read_bytes())
    return path


def contents(source: sources.Source, side: int = 0) -> list[bytes]:
    return [source.read(i, side).tobytes() for i in range(min(len(source), 100))]


def names(source: sources.Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def listed(folder: str, files: list[str]) -> sources.FileSource:
    """A source with these names, whether there are such files or not."""
    table = np.array([(0, -1, 0)] * len(files))
    return sources.FileSource("x", Listing([(folder, "")], np.array([os.fsencode(f) for f in files]), table))


def grey_folder(root: Path, n: int) -> str:
    """n even pictures, picture i of grey level i: a batch then shows which samples it is made of."""
    root.mkdir(exist_ok=True)
    for i in range(n):
        Image.new("L", (16, 16), i).save(root / f"{i:03d}.png")
    return str(root)


def levels(batch: torch.Tensor) -> list[int]:
    return batch[:, 0, 0, 0].tolist()


PICTURES = [picture(seed).tobytes() for seed in range(len(NAMES))]


# ---- one image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_rgb_is_unchanged(tmp_path, kind):
    """8-bit RGB comes out as it went in, from bytes, path or open file, also under a wrong extension."""
    file = tmp_path / "wrong.jpg"
    file.write_bytes(encode(picture(0), kind, **({"lossless": True} if kind == "WEBP" else {})))
    expected = Image.open(file).tobytes() if kind == "JPEG" else picture(0).tobytes()
    with open(file, "rb") as opened:
        loaded = [load_rgb(file.read_bytes()), load_rgb(file), load_rgb(str(file)), load_rgb(opened)]
    assert [image.mode for image in loaded] == ["RGB"] * 4
    assert [image.tobytes() for image in loaded] == [expected] * 4


@pytest.mark.parametrize("mode, colour, kind, expected", [
    ("L", 77, "PNG", (77, 77, 77)),
    ("L", 77, "TIFF", (77, 77, 77)),
    ("1", 1, "PNG", (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
    ("CMYK", (0, 0, 0, 127), "TIFF", (128, 128, 128)),
    ("RGBA", (10, 20, 30, 255), "PNG", (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), "PNG", (255, 255, 255)),
    ("RGBA", (0, 100, 255, 51), "TIFF", (204, 224, 255)),    # 0.2 c + 0.8 * 255
    ("RGBA", (0, 100, 255, 51), "PNG", (204, 224, 255)),
    ("LA", (100, 51), "PNG", (224, 224, 224)),
    ("I;16", 65535, "PNG", (255, 255, 255)),
    ("I;16", 128 * 257, "PNG", (128, 128, 128)),
    ("I;16", 300, "TIFF", (1, 1, 1)),
    ("I;16B", 200 * 257, "TIFF", (200, 200, 200)),
    ("I", 200 * 257, "TIFF", (200, 200, 200)),
])
def test_mode_is_converted(mode, colour, kind, expected):
    """Grey, CMYK, 16-bit and transparent pixels take values worked out by hand; 16 bits are not clipped."""
    image = load_rgb(encode(Image.new(mode, (4, 3), colour), kind))
    assert image.mode == "RGB" and image.size == (4, 3)
    assert image.getpixel((1, 1)) == expected


def test_palette_is_converted():
    """A palette gives its colours, a transparent entry gives white, in palette and colour-keyed files."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    plain, keyed = load_rgb(encode(image, "PNG")), load_rgb(encode(image, "PNG", transparency=b"\xff\x00"))
    assert [plain.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (40, 50, 60)]
    assert [keyed.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]
    rgb = load_rgb(encode(plain, "PNG", transparency=(40, 50, 60)))
    assert [rgb.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


def test_cmyk_jpeg_is_not_inverted():
    """A CMYK JPEG, stored inverted as Adobe does, comes out in its own colours."""
    red = load_rgb(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() <= 3


def test_exif_orientation_is_ignored():
    """A photo that asks to be shown turned is not turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_rgb(encode(picture(0), "PNG", exif=exif)).tobytes() == picture(0).tobytes()


def photo(seed: int = 0, width: int = 500, height: int = 375, **options) -> bytes:
    """A dead-leaves JPEG of quality 90."""
    image = Image.fromarray(dead_leaves(3, seed, max(width, height))[:height, :width])
    return encode(image.convert(options.pop("mode", "RGB")), "JPEG", quality=90, **options)


@pytest.mark.parametrize("least, expected", [
    (0, (500, 375)), (188, (500, 375)), (187, (250, 188)), (94, (250, 188)), (93, (125, 94)),
    (46, (63, 47)), (1, (63, 47)),
])  # fmt: skip
def test_reduced_size(least, expected):
    """The smallest of 1/1, 1/2, 1/4, 1/8 whose short side, before rounding up, has `least` pixels."""
    image, size = load_reduced(photo(), least)
    assert image.size == expected and size == (500, 375) and image.mode == "RGB"


@pytest.mark.parametrize("options", [
    {}, {"mode": "L"}, {"mode": "CMYK"}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True},
    {"exif": bytes.fromhex("45786966000049492a0008000000010012010300010000000600000000000000")},
], ids=["RGB", "grey", "CMYK", "4:4:4", "4:2:2", "progressive", "turned by EXIF"])
def test_reduced_image_is_the_full_one(options):
    """Fewer pixels of the same picture: grey, CMYK and EXIF as in load_rgb; in full, equal to it."""
    file = photo(width=256, height=192, **options)
    full = load_rgb(file)
    assert load_reduced(file, 97)[0].tobytes() == full.tobytes()
    for least, scale in ((96, 2), (48, 4), (24, 8)):
        image, size = load_reduced(file, least)
        assert size == full.size == (256, 192) and image.size == (256 // scale, 192 // scale)
        assert psnr(np.asarray(full.reduce(scale)), np.asarray(image)) > 36
        assert options.get("mode") != "L" or np.ptp(np.asarray(image), axis=2).max() == 0


def test_other_formats_are_never_reduced():
    """Only JPEGs have a fast way to fewer pixels."""
    for kind in ("PNG", "BMP", "TIFF", "WEBP"):
        file = encode(picture(0, 200, 160), kind)
        image, size = load_reduced(file, 10)
        assert image.size == size == (200, 160) and image.tobytes() == load_rgb(file).tobytes()


BROKEN = {
    "empty": b"",
    "text": b"not an image\n" * 50,
    "html": b"<!DOCTYPE html><html>404</html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",    # Pillow would run gs
    "gif": encode(picture(0), "GIF"),
    "jpeg cut": encode(picture(0, 200, 200), "JPEG")[:2000],
    "png cut": encode(picture(0), "PNG")[:400],
    "webp cut": encode(picture(0), "WEBP")[:100],
    "bmp cut": encode(picture(0), "BMP")[:500],
    "tiff cut": encode(picture(0), "TIFF")[:500],
    "png flipped": encode(picture(0), "PNG").replace(b"IDAT", b"IDAX", 1),
    "float": encode(Image.new("F", (4, 4), 0.5), "TIFF"),
    "32 bit": encode(Image.new("I", (4, 4), 70000), "TIFF"),
    "header": encode(picture(0), "JPEG")[:20],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_bytes_are_refused(kind):
    """Each kind of broken file raises BrokenImage, whose message is one line without a memory address."""
    messages = set()
    for least in (0, 1):
        with pytest.raises(BrokenImage) as error:
            load_reduced(BROKEN[kind], least)
        messages.add(re.sub(r"\d+", "N", str(error.value)))
    (message,) = messages                                 # in full and reduced, but for a count of bytes
    assert message.strip() and "\n" not in message and "0x" not in message


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""
    file = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


def test_decompression_bomb_is_refused():
    """Above 89 M pixels, where Pillow warns, and above 179 M, where it stops, a picture is never decoded."""
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BrokenImage, match="10000 x 9000"):
        load_rgb(bomb(10_000, 9_000))
    with pytest.raises(BrokenImage, match="decompression bomb"):
        load_rgb(bomb(20_000, 20_000))
    with pytest.raises(BrokenImage, match="truncated"):    # small enough, so it is decoded
        load_rgb(bomb(100, 100))


def test_damaged_bytes_raise_nothing_else():
    """Files with random bytes changed either load or raise BrokenImage, whatever Pillow makes of them."""
    rng, broken = np.random.default_rng(0), 0
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        good = encode(picture(0), kind)
        for _ in range(60):
            bad = np.frombuffer(good, dtype=np.uint8).copy()
            bad[rng.integers(0, 200, 8)] = rng.integers(0, 256, 8)
            try:
                load_reduced(bad.tobytes(), 8 * (len(bad) % 2))
            except BrokenImage:
                broken += 1
    assert broken > 100


# ---- transforms --------------------------------------------------------------------------------------------


def test_val_transform_has_the_known_pixels():
    """The 40 x 60 test picture at 32 has the pixels and the sum of vectors.json."""
    known = json.loads(KNOWN.read_text())["resize"]["PIL bicubic -> 32"]
    y, x, c = np.ogrid[:40, :60, :3]
    image = Image.fromarray(((4 * x + 3 * y + 40 * c + (x * x + 2 * y * y) // 16) % 256).astype(np.uint8))
    pixels = np.asarray(data.val_transform(image, 32))
    for y, x in ((0, 0), (16, 16), (31, 31)):
        assert pixels[y, x].tolist() == known[f"[{y},{x}]"]
    assert pixels.astype(int).sum() == known["sum"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == known["sha256 (Pillow 13.0.0)"]


def test_bilinear_resize_has_the_known_pixels():
    """val_transform with resize="bilinear", against vectors.json."""
    known = json.loads(KNOWN.read_text())["resize"]["PIL bilinear -> 32"]
    pixels = np.asarray(data.val_transform(Image.fromarray(image_a(40, 60)), 32, "bilinear"))
    assert pixels.astype(int).sum() == known["sum"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == known["sha256 (Pillow 13.0.0)"]


def test_adm_resize():
    """ADM's rule by hand: 70 x 200 to 16 is 35 x 100, 17 x 50 (boxes), 16 x 47 (bicubic), rows 15 to 31."""
    image = picture(3, 70, 200)
    halved = image.resize((35, 100), Image.Resampling.BOX).resize((17, 50), Image.Resampling.BOX)
    expected = halved.resize((16, 47), Image.Resampling.BICUBIC).crop((0, 15, 16, 31))
    assert data.val_transform(image, 16, "adm").tobytes() == expected.tobytes()


def test_opencv_resize():
    """Two taps with half-pixel centres and no antialiasing, by hand: half is the mean of 2 x 2 pixels."""
    image = picture(4, 8, 12)
    pixels = np.asarray(image).astype(float)
    expected = pixels.reshape(6, 2, 4, 2, 3).mean(axis=(1, 3))[1:5]
    assert np.abs(np.asarray(data.val_transform(image, 4, "opencv")) - expected).max() <= 0.5
    wide = Image.fromarray(np.asarray(picture(4, 32, 32)))    # a quarter: 2 x 2 of each 4 x 4 pixels count
    middle = np.asarray(wide).astype(float).reshape(8, 4, 8, 4, 3)[:, 1:3, :, 1:3].mean(axis=(1, 3))
    assert np.abs(np.asarray(data.val_transform(wide, 8, "opencv")) - middle).max() <= 0.5


@pytest.mark.parametrize("resize", data.RESIZES)
@pytest.mark.parametrize("width, height", [(20, 3000), (3000, 20), (33, 32), (1, 1), (200, 131)])
def test_every_resize_gives_a_square(resize, width, height):
    """Strips and dots too, and a strip of 90 megapixels when resized is refused."""
    assert data.val_transform(picture(0, width, height), 48, resize).size == (48, 48)
    with pytest.raises(BrokenImage, match="is too thin"):
        data.val_transform(picture(0, 1, 3000), 512, resize)


@pytest.mark.parametrize("width, height", [
    (32, 32), (33, 32), (35, 32), (32, 47), (500, 375), (375, 500), (101, 67), (20, 3000), (3000, 20), (1, 1),
])
def test_val_transform_equals_torchvision(width, height):
    """Bicubic resize and centre crop are torchvision's on PIL images, bit for bit, strips and dots too."""
    image = picture(0, width, height)
    oracle = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    assert data.val_transform(image, 32).tobytes() == oracle(image).tobytes()


def test_train_transform_is_a_crop_of_the_resized_image():
    """A crop at short side 32 is a window of the picture resized to it, and it can be any window."""
    image, rng = picture(0, 60, 40), np.random.default_rng(0)
    resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    windows = {resized[:, x:x + 32].tobytes(): x for x in range(17)}
    crops = [data.train_transform(image, 32, 32, False, rng).tobytes() for _ in range(300)]
    assert {windows[crop] for crop in crops} == set(range(17))


def window(size: tuple[int, int], res: int, side: int, seed: int) -> tuple[int, int, bool, tuple[int, int]]:
    """(left, top, mirrored, size of the resized image): what the stream of this seed stands for."""
    rng, short = np.random.default_rng(seed), min(size)
    width, height = (int(side * length / short) for length in size)
    left, top = rng.integers(width - res + 1), rng.integers(height - res + 1)
    return int(left), int(top), bool(rng.random() < 0.5), (width, height)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return peak_signal_noise_ratio(a, b, data_range=255)


def reduced_crop(file: bytes, res: int, side: int, flip: bool, seed: int) -> np.ndarray:
    """A crop (res, res, 3) of fewer pixels, as in training."""
    image, size = load_reduced(file, math.ceil(1.4 * side))
    assert image.size != size
    rng = np.random.default_rng(seed)
    crop = data.reduced_transform(data.to_tensor(image), size, res, side, flip, rng)
    assert crop.shape == (3, res, res) and crop.dtype == torch.uint8 and crop.is_contiguous()
    return crop.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("width, height, side, mean, worst", [
    (500, 375, 128, 40, 33),       # 1/2, 1.46 times the side
    (375, 500, 94, 44, 38),        # 1/2, 1.99
    (333, 500, 50, 41, 33),        # 1/4, 1.67
    (500, 333, 29, 38, 33),        # 1/8, 1.44
])  # fmt: skip
def test_reduced_crop_is_nearly_the_full_one(width, height, side, mean, worst):
    """Against full decoding, PIL's resize and the crop that the stream stands for: PSNR in dB, 8 images."""
    scores, res = [], side - 8
    for seed in range(8):
        file = photo(seed, width, height)
        left, top, mirrored, resized = window((width, height), res, side, seed)
        full = load_rgb(file).resize(resized, Image.Resampling.BICUBIC)
        full = full.crop((left, top, left + res, top + res))
        expected = np.asarray(ImageOps.mirror(full) if mirrored else full)
        scores.append(psnr(expected, reduced_crop(file, res, side, True, seed)))
    assert np.mean(scores) > mean and min(scores) > worst


@pytest.mark.parametrize("width, height", [(500, 375), (501, 377), (383, 509), (391, 390)])
def test_reduced_crop_is_not_shifted(width, height):
    """A smooth ramp comes out the same within two levels, also where 1/2 or 1/8 of a side is no integer."""
    ramp = np.linspace(0, 255, width)[None, :, None] * [1, 0, 0] + (
        np.linspace(255, 0, height)[:, None, None] * [0, 1, 0]) + [0, 0, 77]
    file = encode(Image.fromarray(ramp.round().astype(np.uint8)), "JPEG", quality=98, subsampling=0)
    for side in (130, 65, 33):
        left, top, _, resized = window((width, height), side, side, 0)
        full = np.asarray(load_rgb(file).resize(resized, Image.Resampling.BICUBIC)).astype(int)
        difference = reduced_crop(file, side, side, False, 0) - full[top:top + side, left:left + side]
        assert np.abs(difference).max() <= 2


def test_resize_of_reduced_images_equals_pil():
    """Of the same pixels, torch's bicubic differs from PIL's by two levels at most, and in few values.

    The pixels are soft, because Pillow 13 begins with the columns of tall images, which shows where it clips.
    """
    rng, differences = np.random.default_rng(0), []
    for _ in range(30):
        width, height = (2 * int(n) for n in rng.integers(80, 260, 2))
        side = int(rng.integers(40, min(width, height) // 2 / 1.4))
        image = picture(1, width // 2, height // 2).point(lambda level: 64 + level // 2)    # seen at 1/2
        crop = data.reduced_transform(data.to_tensor(image), (width, height), side, side, False,
                                      np.random.default_rng(0))
        left, top, _, resized = window((width, height), side, side, 0)
        expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        differences.append((crop.permute(1, 2, 0).numpy() - np.asarray(expected).astype(int)).ravel())
    difference = np.abs(np.concatenate(differences))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_oversampling(tmp_path):
    """Decoding with fewer pixels changes neither crops nor flips; 0 decodes all; validation always does."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(photo(i, 400, 300))
    source, read = open_source(str(tmp_path)), []
    real = sources.load_reduced

    def load(content: bytes, least: int):
        image, size = real(content, least)
        read.append((min(image.size), least))
        return image, size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load_reduced", load)
        for channels in (3, 1):
            options = dict(res=64, seed=4, rescale=(1, 1.5), channels=channels)
            full, fast = (TrainSet(source, **options, oversampling=times) for times in (0, 1.4))
            for k in range(12):
                a, b = (np.squeeze(samples[k][0].numpy()) for samples in (full, fast))
                assert a.shape == b.shape and psnr(a, b) > 33
                assert psnr(a, b[..., ::-1]) < 30 and psnr(a, np.roll(b, 3, axis=-1)) < 30
        assert {short for short, least in read[::2]} == {300}
        assert {short for short, least in read[1::2]} == {150} and read[1][1] >= 1.4 * 64
        read.clear()
        ValSet(source, 64)[0]
        assert read == [(300, 0)]
    with pytest.raises(ValueError, match="oversampling is 0.5, but must be 0 or at least 1"):
        TrainSet(source, 64, 0, oversampling=0.5)


def test_flip_happens_half_the_time():
    """Of 400 samples about half are mirrored (5 sigma), and none without the flag."""
    image, rng = picture(0, 8, 8), np.random.default_rng(0)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    flips = [data.train_transform(image, 8, 8, True, rng).tobytes() == mirrored for _ in range(400)]
    assert 150 < sum(flips) < 250
    assert all(data.train_transform(image, 8, 8, False, rng).tobytes() == image.tobytes() for _ in range(50))


def test_rescale_draws_every_short_side(tmp_path, monkeypatch):
    """With rescale 1 2 the short side takes every value from res to 2 res about equally often, else res."""
    sides = []

    def spy(image, res, side, flip, rng):
        sides.append(side)
        return image

    monkeypatch.setattr(data, "train_transform", spy)
    source = open_source(grey_folder(tmp_path / "grey", 2))
    samples = TrainSet(source, 8, 0, rescale=(1, 2))
    for k in range(900):
        samples[k]
    counts = np.bincount(sides)
    assert set(sides) == set(range(8, 17))
    assert counts[8:].min() > 60 and counts[8:].max() < 140    # 100, sigma 9.4
    sides.clear()
    TrainSet(source, 8, 0)[0]
    assert sides == [8]


@pytest.mark.parametrize("size", [(20, 3000), (3000, 20), (1, 1), (5, 4)])
def test_extreme_sizes_train(tmp_path, size):
    """Thin strips and single pixels give full-sized samples."""
    picture(0, *size).save(tmp_path / "x.png")
    image, _, broken = TrainSet(open_source(str(tmp_path)), 64, 0, rescale=(1, 2))[3]
    assert image.shape == (3, 64, 64) and broken == ()


def test_hopeless_strip_is_broken(tmp_path):
    """A 1 x 60000 line, whose resized form would fill the memory, counts as a broken file."""
    Image.new("RGB", (60_000, 1)).save(tmp_path / "line.png")
    image, broken = ValSet(open_source(str(tmp_path)), 64)[0]
    assert image is None and "is too thin" in broken[0]


def test_float_range_is_minus_one_to_one():
    """0 and 255 become -1 and 1 exactly; pixels that are no longer uint8 are refused (washed-out colours)."""
    assert data.to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    with pytest.raises(ValueError, match="float32"):
        data.to_float(torch.zeros(1))


# ---- sources -----------------------------------------------------------------------------------------------


def test_every_kind_of_source_holds_the_same_images(tmp_path):
    """Folder, tar, stored and deflated zip: the same names in the same sorted order, the same pixels."""
    root = write_tree(tmp_path / "tree")
    folder = open_source(str(root))
    archives = [open_source(str(path)) for path in (
        write_tar(tmp_path / "x.tar", root), write_tar(tmp_path / "gnu.tar", root, format=tarfile.GNU_FORMAT),
        write_zip(tmp_path / "x.zip", root), write_zip(tmp_path / "y.zip", root, zipfile.ZIP_STORED))]
    assert names(folder) == NAMES
    assert contents(folder) == PICTURES
    assert folder.path(1) == str(root / "b/c.PNG")
    for source in archives:
        archive = os.path.basename(source.spec)
        assert names(source) == [f"{archive}/{name}" for name in NAMES]
        assert contents(source) == PICTURES
        assert source.path(0) == f"{source.spec}/a.png"


def test_specs_are_expanded(tmp_path, monkeypatch):
    """Commas, globs, {0..3} and {00..12} ranges, single files, ~ and names that only look like these work."""
    flat = write_tree(tmp_path / "flat", [f"{i:02d}.png" for i in range(13)])
    odd = write_tree(tmp_path / "a,b {0..1} [x]", ["a.png"])
    monkeypatch.setenv("HOME", str(tmp_path))

    def expanded(spec: str) -> list[str]:
        return names(open_source(spec))

    assert expanded(f"{flat}") == expanded(f"{flat}/") == expanded(f"{flat}/*.png") == expanded("~/flat")
    assert expanded(f"{flat}/{{03..11}}.png") == [f"{i:02d}.png" for i in range(3, 12)]
    assert expanded(f"{flat}/{{0..1}}{{1..2}}.png") == ["01.png", "02.png", "11.png", "12.png"]
    assert expanded(f"{flat}/12.png, {flat}/0?.png") == ["12.png"] + [f"{i:02d}.png" for i in range(10)]
    assert expanded(f"{tmp_path}/**/1*.png") == ["10.png", "11.png", "12.png"]
    assert expanded(f"{odd}") == ["a.png"]
    monkeypatch.chdir(flat)
    assert expanded("05.png") == ["05.png"] and len(expanded(".")) == 13


def test_hidden_files_are_skipped_and_links_followed_once(tmp_path):
    """Hidden files and folders do not count; a linked folder does, a link back up does not go in circles."""
    root = write_tree(tmp_path / "root", ["a.png", ".b.png", ".trash/c.png", "sub/._d.png", "sub/e.png"])
    write_tree(tmp_path / "elsewhere", ["f.png"])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "loop").symlink_to(root)
    source = open_source(str(root))
    assert names(source) == ["a.png", "link/f.png", "sub/e.png"]


def test_hidden_link_does_not_hide_a_folder(tmp_path):
    """A hidden link to a folder of the tree does not count as that folder's first appearance."""
    root = write_tree(tmp_path / "root", ["a.png", "sub/b.png"])
    (root / ".sub").symlink_to("sub")
    assert names(open_source(str(root))) == ["a.png", "sub/b.png"]


def test_dotted_members_of_a_tar_are_found(tmp_path):
    """Members called ./a.png, as tar -C folder . writes them, are images and not hidden files."""
    root = write_tree(tmp_path / "tree", ["a.png"])
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(root, arcname=".")
    assert contents(open_source(str(tmp_path / "x.tar"))) == PICTURES[:1]


def bad_sources(root: Path) -> dict[str, str]:
    """Specs that must be refused, by the words that the message has to hold."""
    write_tree(root / "tree")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("hello")
    (root / "noise.tar").write_bytes(b"\xa5" * 5000)
    (root / "noise.zip").write_bytes(b"\xa5" * 5000)
    (root / "void.tar").touch()
    cut = write_tar(root / "cut.tar", root / "tree")
    cut.write_bytes(cut.read_bytes()[:3000])
    gz = root / "gz.tar"
    gz.write_bytes(gzip.compress(cut.read_bytes()))
    bz = write_zip(root / "bz.zip", root / "tree", zipfile.ZIP_BZIP2)
    middle = write_tar(root / "middle.tar", root / "tree")
    with tarfile.open(middle) as tar, open(middle, "r+b") as file:
        file.seek(tar.getmembers()[2].offset)
        file.write(b"\xa5" * 512)
    return {
        "": "'' not found",
        "synthetic,x": "only synthetic",
        f"{root}/missing": "missing' not found",
        f"{root}/tree,": "'' not found",
        f"{root}/*.jpg": "*.jpg",
        f"{root}/cut-{{0..3}}.tar": "cut-0.tar",
        f"{root}/empty": "contains no images",
        f"{root}/notes.txt": "is not a folder",
        f"{root}/noise.tar": "noise.tar' is not a plain .tar",
        f"{root}/noise.zip": "not a zip file",
        f"{root}/void.tar": "empty file",
        f"{cut}": "unexpected end",
        f"{gz}": "gz.tar' is not a plain .tar",
        f"{bz}": "not deflated",
        f"{middle}": "is damaged at byte",
    }


def test_bad_source_is_one_clear_line(tmp_path):
    """What is missing, empty, damaged or of a wrong kind ends in a ValueError, one line with the spec."""
    for spec, words in bad_sources(tmp_path).items():
        with pytest.raises(ValueError) as error:
            open_source(spec)
        message = str(error.value)
        assert words in message and repr(spec) in message and "\n" not in message


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    """A folder that may not be listed is named, not skipped."""
    write_tree(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        open_source(str(tmp_path))


def test_source_is_small(tmp_path):
    """100,000 files of ImageNet's names take under 8 MB, pickled for a spawned worker too."""
    files = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(100_000)]
    assert len(pickle.dumps(listed("imagenet/train", files))) < 8e6


# ---- held-out images and defaults --------------------------------------------------------------------------


def split_names(source: sources.Source, n: int = 256) -> tuple[set[str], set[str]]:
    train, val = data.split_val(source, n)
    return set(names(train)), set(names(val))


def test_held_out_images_are_not_trained_on(tmp_path):
    """Training and held-out images are disjoint and together all; place and order do not matter."""
    files = [f"{i % 7}/{i}.png" for i in range(60)]
    here, there = write_tree(tmp_path / "here", files), write_tree(tmp_path / "there" / "deeper", files)
    train, val = split_names(open_source(str(here)), n=10)
    assert len(val) == 10 and not train & val and train | val == set(files)
    assert split_names(open_source(str(there)), n=10) == (train, val)
    backwards = ",".join(f"{here}/{name}" for name in reversed(files))
    assert split_names(open_source(backwards), n=10) == split_names(open_source(f"{here}/*/*.png"), n=10)
    kept, held = data.split_val(open_source(str(here)), n=10)
    assert set(contents(kept)).isdisjoint(contents(held))


@pytest.mark.parametrize("count, held", [(2, 1), (7, 1), (8, 2), (39, 9), (41, 10), (100, 10)])
def test_small_sources_give_a_quarter(count, held):
    """Ten images are held out where there are 40, a quarter below, and one at least."""
    train, val = data.split_val(listed("", [f"{i}.png" for i in range(count)]), 10)
    assert (len(train), len(val)) == (count - held, held)


def test_one_image_cannot_be_split(tmp_path):
    """A single image has none to hold out: the error says to give --val-data."""
    picture(0).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="--val-data"):
        data.split_val(open_source(str(tmp_path)))


def test_synthetic_source_is_pure_and_split():
    """Synthetic images are functions of seed and number, at the side asked for; held-out ones are others."""
    train, val = data.split_val(open_source("synthetic"), 4)
    assert len(train) == 1_000_000 and len(val) == 4 and val.name(0) != train.name(0)
    assert train.read(5, 32).size == (32, 32)
    assert contents(train, 32) == contents(open_source("synthetic"), 32)
    assert len(set(contents(train, 32) + contents(val, 32))) == 104
    assert contents(val, 32) == contents(open_source("synthetic", held_out=True), 32)[:4]
    image, _, broken = TrainSet(train, 32, 0, rescale=(1, 2))[7]
    assert image.shape == (3, 32, 32) and broken == ()


def test_default_folders(tmp_path, monkeypatch):
    """$IMAGENET comes before datasets/imagenet; without both, one line names the ways out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    for default, ways in ((data.default_train_spec, ["IMAGENET", "datasets/imagenet", "--data synthetic"]),
                          (data.imagenet_val_spec, ["IMAGENET", "datasets/imagenet", "--imagenet-val DIR"])):
        with pytest.raises(ValueError) as error:
            default()
        assert all(way in str(error.value) for way in ways) and "\n" not in str(error.value)
    for folder in ("datasets/imagenet/train", "datasets/imagenet/val", "other/train", "other/validation"):
        (tmp_path / folder).mkdir(parents=True)
    assert data.default_train_spec() == "datasets/imagenet/train"
    assert data.imagenet_val_spec() == "datasets/imagenet/val"
    monkeypatch.setenv("IMAGENET", str(tmp_path / "other"))
    assert data.default_train_spec() == str(tmp_path / "other/train")
    assert data.imagenet_val_spec() == "datasets/imagenet/val"    # other/ has none


@pytest.mark.parametrize("layout, found", [
    ("val/n{k}/v_{i}.JPEG", "val"),
    ("ILSVRC/Data/CLS-LOC/val/v_{i}.JPEG", "ILSVRC/Data/CLS-LOC/val"),
    ("Data/CLS-LOC/val/v_{i}.JPEG", "Data/CLS-LOC/val"),
    ("ILSVRC2012_validation/data/n{k}/v_{i}.JPEG", "ILSVRC2012_validation/data"),
    ("imagenet-val-000{k}.tar", "imagenet-val-*.tar"),
    ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_val.tar"),
    ("n{k}/v_{i}.JPEG", ""),
    ("v_{i}.JPEG", ""),
])  # fmt: skip
def test_imagenet_val_layouts(tmp_path, layout, found):
    """Each layout that users have is found below its root; by bare file name all list the same order."""
    root, files = tmp_path / "in", tmp_path / "files"
    names = [f"v_{i}.JPEG" for i in range(6)]
    write_tree(files, names)
    write_tree(root / "train", ["n0/t.JPEG"] if found else [])
    for i, name in enumerate(names):
        path = root / layout.format(i=i, k=(5 - i) % 2)    # classes in another order than the file names
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            with tarfile.open(path, "a") as tar:
                tar.add(files / name, arcname=name)
        else:
            path.write_bytes((files / name).read_bytes())
    spec = data.imagenet_val_spec(str(root))
    assert spec == os.path.join(root, found).rstrip("/")
    source = data.by_file_name(open_source(spec))
    assert [os.path.basename(source.name(i)) for i in range(6)] == names
    assert source.read(2, 0).tobytes() == load_rgb(files / names[2]).tobytes()


def test_imagenet_val_in_ldms_cache(tmp_path, monkeypatch):
    """Without a root, $IMAGENET or datasets/: $XDG_CACHE_HOME/autoencoders/data, as LDM has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache/autoencoders/data/ILSVRC2012_validation/data"
    folder.mkdir(parents=True)
    assert data.imagenet_val_spec() == str(folder)


def test_numbered_loader(tmp_path):
    """Batches carry the numbers of their images; a broken one is left out and its number with it."""
    root = write_tree(tmp_path / "x", [f"{i}.png" for i in range(7)])
    (root / "4.png").write_bytes(b"")
    images = ValSet(open_source(str(root)), 16)
    loader = data.numbered_loader(images, 2, 0, "cpu", 0, 2)    # 0, 2 | 4, 6
    batches = list(data.report_broken(loader, set()))
    assert [numbers.tolist() for numbers, _ in batches] == [[0, 2], [6]]
    for numbers, pictures in batches:
        assert all(torch.equal(p, images[i][0]) for i, p in zip(numbers.tolist(), pictures, strict=True))
    assert images.name(6) == "6.png" and ValSet(open_source(str(root)), 16, 3).name(1) == "2.png"


def test_val_folder_beside_train(tmp_path):
    """val or validation is found beside a folder named train, and nowhere else."""
    for folder in ("a/train", "a/val", "b/train", "b/validation", "c/train", "d/photos", "d/val"):
        (tmp_path / folder).mkdir(parents=True)
    assert data.default_val_spec(f"{tmp_path}/a/train/") == str(tmp_path / "a/val")
    assert data.default_val_spec(f"{tmp_path}/b/train") == str(tmp_path / "b/validation")
    for spec in (f"{tmp_path}/c/train", f"{tmp_path}/d/photos", "synthetic", f"{tmp_path}/a/*.tar"):
        assert data.default_val_spec(spec) is None


# ---- numbered samples --------------------------------------------------------------------------------------


def loaded(samples: TrainSet, workers: int, batches: GlobalBatchSampler | None = None) -> list[torch.Tensor]:
    batches = batches or GlobalBatchSampler(3, 1, 0, 1, 0, steps=4)
    return [images for (images, _), _ in data.train_loader(samples, batches, workers, "cpu")]


def test_sample_is_a_pure_function_of_seed_and_number(tmp_path):
    """Sample k is the same in a fresh set, in any order, in 0 or 2 workers; other seeds give others."""
    root = str(write_tree(tmp_path))
    options = dict(res=12, seed=5, rescale=(1, 1.5))
    forward = [TrainSet(open_source(root), **options)[k][0] for k in range(12)]
    samples = TrainSet(open_source(root), **options)
    backward = [samples[k][0] for k in reversed(range(12))][::-1]
    assert all(map(torch.equal, forward, backward))
    for workers in (0, 2):
        batches = loaded(TrainSet(open_source(root), **options), workers)
        assert torch.equal(torch.cat(batches), torch.stack(forward))
    assert len({image.numpy().tobytes() for image in forward}) == 12    # 6 images, two epochs, other crops
    assert not torch.equal(TrainSet(open_source(root), **options | {"seed": 6})[0][0], forward[0])


def test_noise_belongs_to_its_sample(tmp_path):
    """Sample k has its own N(0, 1) noise, the same in any order and worker; other seeds give others."""
    source = open_source(grey_folder(tmp_path / "grey", 4))
    samples = TrainSet(source, 8, seed=5, latent_shape=(12, 16, 16))
    noise = torch.stack([samples[k][1] for k in reversed(range(12))]).flip(0)
    batches = GlobalBatchSampler(3, 1, 0, 1, 0, steps=4)
    for workers in (0, 2):
        loader = data.train_loader(samples, batches, workers, "cpu")
        assert torch.equal(torch.cat([drawn for (_, drawn), _ in loader]), noise)
    assert len({row.numpy().tobytes() for row in noise}) == 12          # 4 images, three epochs
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02    # 36,864 numbers: 6 sigma
    other = TrainSet(source, 8, seed=6, latent_shape=(12, 16, 16))[0][1]
    assert abs(torch.corrcoef(torch.stack([other.flatten(), *noise.flatten(1)])) - torch.eye(13)).max() < 0.1


def test_epoch_shows_every_image_once(tmp_path):
    """Each epoch is a permutation of all images, another one each time and for each seed."""
    source = open_source(grey_folder(tmp_path / "grey", 20))
    samples = TrainSet(source, 16, seed=0, flip=False)
    epochs = [[int(samples[k][0][0, 0, 0]) for k in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert TrainSet(source, 16, seed=1).order(0).tolist() != samples.order(0).tolist()


def test_broken_files_give_way_to_others(tmp_path):
    """With broken files of every kind in a folder the same samples come each time, and all are named."""
    write_tree(tmp_path, [f"{i:02d}.png" for i in range(30)])
    for i, content in enumerate(BROKEN.values()):
        (tmp_path / f"broken{i:02d}.jpg").write_bytes(content)
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = open_source(str(tmp_path))
    items = [TrainSet(source, 12, seed=0)[k] for k in range(len(source))]
    named = {message.split(": ")[0] for _, _, broken in items for message in broken}
    assert named == {str(path) for path in tmp_path.glob("broken*")} | {str(tmp_path / "dangling.jpg")}
    again = [TrainSet(source, 12, seed=0)[k] for k in range(len(source))]
    assert all(torch.equal(a[0], b[0]) and a[2] == b[2] for a, b in zip(items, again, strict=True))
    (batch, _), broken = data.collate_train(items[:5])
    assert batch.shape == (5, 3, 12, 12) and broken == [m for _, _, messages in items[:5] for m in messages]


def test_file_deleted_during_the_run_is_reported(tmp_path):
    """A file that goes after the listing is a broken one, in a folder and in an archive alike."""
    root = write_tree(tmp_path / "tree")
    tar, archive = write_tar(tmp_path / "x.tar", root), write_zip(tmp_path / "x.zip", root)
    for path, doomed in ((root, root / "a.png"), (tar, tar), (archive, archive)):
        source = open_source(str(path))
        doomed.unlink()
        assert ValSet(source, 12)[0] == (None, (f"{source.path(0)}: No such file or directory",))


def test_cut_archives_are_reported(tmp_path):
    """Members that a tar or zip no longer holds, as it was cut after the listing, are broken files."""
    root = write_tree(tmp_path / "tree")
    for path in (write_tar(tmp_path / "x.tar", root), write_zip(tmp_path / "x.zip", root)):
        source = open_source(str(path))
        os.truncate(path, 700)
        broken = [ValSet(source, 12)[i][1] for i in range(len(source))]
        assert sum(map(len, broken)) >= len(source) - 1


def test_nothing_but_broken_files_is_an_error_before_the_first_batch(tmp_path):
    """If no file can be read the loader is not even made: one line that names a file and the reason."""
    for i in range(120):
        (tmp_path / f"{i}.jpg").write_bytes(b"text")
    samples = TrainSet(open_source(str(tmp_path)), 16, 0)
    with pytest.raises(ValueError, match=r"100 broken images in a row.*\.jpg: not one of JPEG") as error:
        data.train_loader(samples, GlobalBatchSampler(1, 1, 0, 1, 0, 1), 2, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rescale", [(0.5, 1), (2, 1), (float("nan"), 1)])
def test_bad_rescale_is_refused(rescale):
    """A short side below the crop, or a range upside down, is an error that shows the values."""
    with pytest.raises(ValueError, match=f"rescale is {rescale[0]} {rescale[1]}"):
        TrainSet(open_source("synthetic"), 16, 0, rescale)


def test_channels(tmp_path):
    """One channel is the grey of BT.601, three are RGB, others are refused."""
    Image.new("RGB", (16, 16), (10, 200, 60)).save(tmp_path / "x.png")
    source = open_source(str(tmp_path))
    grey, rgb = TrainSet(source, 16, 0, channels=1)[0][0], ValSet(source, 16)[0][0]
    assert grey.shape == (1, 16, 16) and int(grey[0, 0, 0]) == round(0.299 * 10 + 0.587 * 200 + 0.114 * 60)
    assert rgb[:, 0, 0].tolist() == [10, 200, 60] and rgb.dtype == torch.uint8 and rgb.is_contiguous()
    with pytest.raises(ValueError, match="not 4"):
        TrainSet(source, 16, 0, channels=4)[0]


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 2)])
def test_samples_per_step_do_not_depend_on_the_processes(world, accumulate):
    """At global batch 8 step s is samples 8s .. 8s + 7, each in one micro-batch of one rank."""
    micro_batch, steps = 8 // world // accumulate, 5
    ranks = [list(GlobalBatchSampler(micro_batch, accumulate, rank, world, 2, steps))
             for rank in range(world)]
    for step in range(2, steps):
        turn = slice((step - 2) * accumulate, (step - 1) * accumulate)
        samples = [k for batches in ranks for batch in batches[turn] for k in batch]
        assert sorted(samples) == list(range(8 * step, 8 * step + 8))
    assert all(len(batches) == (steps - 2) * accumulate for batches in ranks)


def test_rows_are_the_samples_in_the_global_batch():
    """What is drawn for the global batch and cut with rows(micro) goes with that micro-batch's samples."""
    for rank in range(2):
        batches = GlobalBatchSampler(3, 2, rank, 2, start_step=4, steps=5)
        global_batch = np.arange(48, 60)
        assert [global_batch[batches.rows(micro)].tolist() for micro in range(2)] == list(batches)
        assert len(batches) == 2


def test_fault_14_resumed_sampler_goes_on_where_it_stopped():
    """Steps 0..9 are steps 0..3 and then 4..9, and a finished run has none left."""
    def batches(start, steps):
        return list(GlobalBatchSampler(2, 3, 1, 2, start, steps))
    assert batches(0, 10) == batches(0, 4) + batches(4, 10)
    assert batches(10, 10) == batches(12, 10) == [] and len(GlobalBatchSampler(2, 3, 1, 2, 12, 10)) == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fault_20_validation_shards_hold_every_image_once(tmp_path, world):
    """Seven images on 1, 2 or 3 ranks: none twice, none missing, no padding (peers A3 #20, #21)."""
    samples = ValSet(open_source(grey_folder(tmp_path / "grey", 7)), 16)
    seen = []
    for rank in range(world):
        for batch, _ in data.val_loader(samples, 2, 0, "cpu", rank, world):
            seen += levels(batch)
    assert sorted(seen) == list(range(7))


def test_fault_18_validation_is_deterministic(tmp_path):
    """Two passes through 2 workers give the same crops in the same order (peers A3 #18)."""
    loader = data.val_loader(ValSet(open_source(str(write_tree(tmp_path))), 12), 4, 2, "cpu", 0, 1)
    first, second = ([batch for batch, _ in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 2]
    assert all(map(torch.equal, first, second))


def test_limit_is_spread_over_the_source(tmp_path):
    """Of 20 sorted images a limit of 5 takes every fourth; a limit above 20 takes all."""
    source = open_source(grey_folder(tmp_path / "grey", 20))
    samples = ValSet(source, 16, limit=5)
    assert levels(torch.stack([samples[i][0] for i in range(5)])) == [0, 4, 8, 12, 16]
    assert len(ValSet(source, 16, limit=50)) == 20


def test_broken_validation_images_are_left_out(tmp_path):
    """A broken file leaves its batch smaller and is named; a batch of broken ones alone has length 0."""
    root = grey_folder(tmp_path / "grey", 4)
    for name in ("001.png", "002.png", "003.png"):
        (Path(root) / name).write_bytes(b"")
    batches = list(data.val_loader(ValSet(open_source(root), 16), 2, 0, "cpu", 0, 1))
    assert [len(batch) for batch, _ in batches] == [1, 0]
    assert [len(broken) for _, broken in batches] == [1, 2]
    assert batches[0][1][0].startswith(f"{root}/001.png: not one of JPEG")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_archives_however_they_start(tmp_path, method):
    """Forked and spawned workers read the same samples from a tar and a zip as the main process does."""
    root = write_tree(tmp_path / "tree")
    source = open_source(f"{write_tar(tmp_path / 'x.tar', root)},{write_zip(tmp_path / 'x.zip', root)}")
    expected = loaded(TrainSet(source, 12, 0), 0)
    loader = data.train_loader(TrainSet(source, 12, 0), GlobalBatchSampler(3, 1, 0, 1, 0, 4), 1, "cpu")
    loader.multiprocessing_context = method
    assert all(torch.equal(batch, other) for ((batch, _), _), other in zip(loader, expected, strict=True))


@pytest.mark.parametrize("cores, workers", [(1, 1), (3, 3), (4, 4), (64, 4)])
def test_default_workers_follow_the_cores(tmp_path, monkeypatch, cores, workers):
    """4, or the cores that the process may use if they are fewer; torch warns of more, and not of these."""
    source = open_source(str(write_tree(tmp_path)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert train.parse_args([]).num_workers == workers
    assert eval_script.parse_args(["ckpt.pt", "--data", "x"]).num_workers == workers
    assert latents.parse_args(["cache", "ckpt.pt", "--data", "x", "--out", "y"]).num_workers == workers
    assert diffusion.parse_args(["ckpt.pt", "cache", "--out", "y"]).num_workers == workers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.val_loader(ValSet(source, 12), 2, data.default_workers(), "cpu", 0, 1)
    if cores < 4:
        with pytest.warns(UserWarning, match=f"suggested max number of worker .* is {cores}"):
            data.val_loader(ValSet(source, 12), 2, 4, "cpu", 0, 1)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert data.default_workers() == workers


def test_workers_outlive_ctrl_c(tmp_path):
    """SIGINT, sent to a worker as to the whole process group, leaves the run its batches."""
    samples = TrainSet(open_source(str(write_tree(tmp_path))), 12, 0)
    batches = iter(data.train_loader(samples, GlobalBatchSampler(1, 1, 0, 1, 0, 40), 1, "cpu"))
    next(batches)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39


def test_dead_worker_is_an_error(tmp_path):
    """A worker that is killed ends the run with an error that says so, instead of waiting for ever."""
    samples = TrainSet(open_source(str(write_tree(tmp_path))), 12, 0)
    batches = iter(data.train_loader(samples, GlobalBatchSampler(1, 1, 0, 1, 0, 1000), 1, "cpu"))
    next(batches)
    worker, = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="worker .* is killed by signal"):
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(5)    # cut short: torch raises as soon as the worker's death is reported
        list(batches)


def test_photos_tar():
    """The shared photographs are 2000 in a tar, 160 pixels on the short side; two ranks share a step."""
    tar = SHARED / "photos" / "train160-0.tar"
    if not tar.exists():
        pytest.skip("no shared/photos")
    source = open_source(str(tar))
    assert len(source) == 2000 and min(source.read(77, 0).size) == 160
    samples = TrainSet(source, 128, 0)
    whole, = loaded(samples, 0, GlobalBatchSampler(8, 1, 0, 1, 3, 4))
    halves = [loaded(samples, 0, GlobalBatchSampler(4, 1, rank, 2, 3, 4))[0] for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
    assert whole.float().std() > 30    # photographs, not blanks
