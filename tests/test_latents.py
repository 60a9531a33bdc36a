"""Run: pytest tests/test_latents.py. The commands, but for `cache` (downstream/test_cache.py)."""

import math
import re
import resource
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, equal, toy, write_images
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from test_cache import forked
from torch import Tensor

import checkpoint
import data
import latents
from downstream import pictures
from downstream.tiling import encode_tiled
from evaluation import metrics
from model import GROUP, Autoencoder, Posterior
from runtime import distributed
from runtime.sources import open_source
from synthetic import dead_leaves

STATS = "stats toy/ckpt.pt --data photos --num-workers 0 --device cpu"


@pytest.fixture
def model(tmp_path) -> Autoencoder:
    """The model of toy/ckpt.pt in the test's folder."""
    return toy(tmp_path / "toy")


def run(folder: Path, flags: str) -> None:
    command, *rest = flags.split()
    call("latents", folder, " ".join([command, "toy/ckpt.pt", *rest, "--device cpu"]))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(dead_leaves(3, 0, max(height, width, 8))[:height, :width])


def to_input(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1], H and W multiples of 8 by torch's reflection."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return F.pad(x, (0, -image.width % 8, 0, -image.height % 8), mode="reflect")


def shown(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


# ---- stats -------------------------------------------------------------------------------------------------


def test_known_distribution():
    """Posteriors with known means and deviations: both are found within 1e-3, per channel and together."""
    mean, sigma = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.25, 0.5, 0.125])

    class Encoder:
        config = type("config", (), {"latent_channels": 3})

        def encode(self, x: Tensor) -> Posterior:
            moments = (part[:, None, None].expand(len(x), 3, 512, 512) for part in (mean, 2 * sigma.log()))
            return Posterior(*moments)

    numbers = [torch.arange(4), torch.arange(4, 7), torch.arange(0), torch.arange(7, 12)]
    batches = [(part, torch.zeros(len(part), 3, 8, 8, dtype=torch.uint8)) for part in numbers]
    found = latents.statistics(latents.latent_sums(Encoder(), batches, torch.device("cpu")))
    np.testing.assert_allclose(found["latents_mean"], mean, atol=1e-3)
    np.testing.assert_allclose(found["latents_std"], sigma, atol=1e-3)
    assert abs(found["shift_factor"] - 0.5) < 1e-3                    # of all channels together
    spread = math.sqrt((sigma.square().mean() + mean.square().mean() - 0.25).item())
    assert abs(1 / found["scaling_factor"] - spread) < 1e-3


def test_statistics_of_a_folder(tmp_path, model, capsys):
    """NumPy's, in float64, of one sample of each image, for any batches; scaled samples have 0 and 1."""
    write_images(tmp_path / "photos", [f"{i}.png" for i in range(7)], side=40)
    images = data.ValSet(open_source(str(tmp_path / "photos")), 40, 5)
    posterior = model.encode(data.to_float(torch.stack([images[i][0] for i in range(5)])))
    z = posterior.sample(metrics.noise(torch.arange(5), (3, 5, 5))).double().numpy()
    for batch in (2, 5):
        call("latents", tmp_path, f"{STATS} --res 40 --count 5 --batch-size {batch}")
        found = checkpoint.load(tmp_path / "toy/ckpt.pt")["latents"]
        np.testing.assert_allclose(found["latents_mean"], z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["latents_std"], z.std((0, 2, 3)), rtol=1e-5)
        assert math.isclose(found["shift_factor"], z.mean(), rel_tol=1e-5)
        assert math.isclose(found["scaling_factor"], 1 / z.std(), rel_tol=1e-5)
        assert (found["count"], found["res"], found["weights"]) == (5, 40, "raw")
        assert found["data"]["images"] == 7 and found["data"]["spec"] == "photos"
    said = capsys.readouterr().out
    assert f"scaling_factor  {found['scaling_factor']:.4f}\n" in said and "stored in toy/ckpt.pt" in said
    assert said.count("replacing the statistics of 5 images of photos, 40 px\n") == 1      # the second time
    scaled = latents.find_scaling("channel", {"latents": found}).scale(torch.from_numpy(z).float())
    np.testing.assert_allclose(scaled.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 2, 3), correction=0), 1, atol=1e-5)


def test_sums_of_two_processes(tmp_path, model):
    """The images of two processes, each with a sample that depends on its number, add up to those of one."""
    write_images(tmp_path / "photos", [f"{i}.png" for i in range(5)], side=32)
    images, cpu = data.ValSet(open_source(str(tmp_path / "photos")), 32), torch.device("cpu")

    def sums(rank: int, world: int) -> Tensor:
        loader = data.numbered_loader(images, 2, 0, cpu, rank, world)
        return latents.latent_sums(model, data.report_broken(loader, set()), cpu)

    torch.testing.assert_close(sums(0, 2) + sums(1, 2), sums(0, 1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "model.pt"])
def test_only_the_statistics_change(parent, tmp_path, name):
    """Every file of a run takes them; the rest of it stays bit for bit, and train.py goes on from ckpt.pt."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/ckpt.pt").write_bytes((parent.folder / name).read_bytes())
    write_images(tmp_path / "photos", ["0.png", "1.png"], side=64)
    before = checkpoint.load(tmp_path / "toy/ckpt.pt")
    call("latents", tmp_path, STATS)
    after = checkpoint.load(tmp_path / "toy/ckpt.pt")
    found = after.pop("latents")
    assert equal(before, after) and (found["weights"], found["res"], found["count"]) == ("ema", 64, 2)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["ckpt.pt"]
    if name == "ckpt.pt":
        call("latents", tmp_path, f"{STATS} --raw")
        raw = checkpoint.load(tmp_path / "toy/ckpt.pt")["latents"]
        assert raw["weights"] == "raw" and raw["latents_std"] != found["latents_std"]


def test_full_disk_leaves_the_checkpoint(tmp_path, model):
    """No room for the new file: one line, exit code 1, and the old file is as it was."""
    write_images(tmp_path / "photos", ["0.png", "1.png"], side=32)
    before = (tmp_path / "toy/ckpt.pt").read_bytes()
    code, said = forked(tmp_path, STATS, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    assert code == 1 and "Traceback" not in said
    assert "error: cannot write" in said and "File too large; the checkpoint is unchanged" in said
    assert (tmp_path / "toy/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("squares", [(16.0, 4.0), (math.nan, 20.0)])
def test_latents_that_cannot_be_scaled(squares):
    """A channel without spread, or with NaN: ValueError instead of infinities in the checkpoint."""
    sums = torch.tensor([(4.0, 4.0), (4.0, 4.0), squares], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"standard deviations \[.*\] cannot be scaled to 1"):
        latents.statistics(sums)


# ---- encode and decode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 32), (37, 53), (9, 40), (100, 21)])
def test_any_size(tmp_path, model, height, width):
    """Odd sizes are reflected up to multiples of 8; decoding gives the model's pixels, cropped back."""
    picture(height, width).save(tmp_path / "a.png")
    run(tmp_path, "encode a.png --out z.pt")
    content = torch.load(tmp_path / "z.pt", weights_only=True)
    z = model.encode(to_input(picture(height, width))).mean
    assert content["size"] == [height, width] and content["scaling"] == "none"
    torch.testing.assert_close(content["z"], z[0], rtol=0, atol=1e-5)
    run(tmp_path, "decode z.pt --out b.png")
    expected = (model.decode(content["z"][None])[0] * 127.5 + 127.5).round().clamp(0, 255)
    expected = expected.permute(1, 2, 0).numpy()[:height, :width]
    assert shown(tmp_path / "b.png").shape == (height, width, 3)
    assert np.abs(shown(tmp_path / "b.png") - expected).max() <= 1    # .5 may be rounded either way


@pytest.mark.parametrize("height, width", [(1, 1), (1, 30), (8, 3)])
def test_smallest_sizes(tmp_path, model, height, width):
    """A picture smaller than its reflection is reflected again and again, up to 2 x 2 latents."""
    picture(height, width).save(tmp_path / "a.png")
    run(tmp_path, "encode a.png --out z.pt")
    run(tmp_path, "decode z.pt --out b.png")
    assert torch.load(tmp_path / "z.pt")["z"].shape[-2:] == (2, max(2, -(-width // 8)))
    assert shown(tmp_path / "b.png").shape == (height, width, 3)


def test_reflection():
    """a b c | b a b, down to a single pixel; multiples of f stay."""
    row = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.uint8)
    padded = pictures.pad(row, 4)
    assert padded.shape == (1, 8, 8) and padded[0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert padded[0, :, 0].tolist() == [1, 4, 1, 4, 1, 4, 1, 4]
    assert pictures.pad(row[:, :1, :1], 4).tolist() == [[[1] * 8] * 8]
    same = torch.zeros(3, 8, 12, dtype=torch.uint8)
    assert pictures.pad(same, 4).shape == same.shape


def test_alpha_grey_and_palette(tmp_path, model):
    """Alpha goes over white; grey, 16-bit grey and palette give the latents of the RGB picture they show."""
    rgb = np.array(picture(24, 24))
    alpha = np.full((24, 24, 1), 255, dtype=np.uint8)
    alpha[:, 12:] = 0
    white = rgb.copy()
    white[:, 12:] = 255
    grey = Image.fromarray(rgb).convert("L")
    palette = Image.fromarray(rgb).quantize(16)
    pairs = {
        "alpha": (Image.fromarray(np.concatenate([rgb, alpha], axis=2)), Image.fromarray(white)),
        "grey": (grey, grey.convert("RGB")),
        "deep": (Image.fromarray(np.array(grey).astype(np.uint16) * 257), grey.convert("RGB")),
        "palette": (palette, palette.convert("RGB")),
    }
    for name, (given, meant) in pairs.items():
        given.save(tmp_path / f"{name}.png")
        run(tmp_path, f"encode {name}.png --out {name}.pt")
        z = torch.load(tmp_path / f"{name}.pt", weights_only=True)["z"]
        torch.testing.assert_close(z, model.encode(to_input(meant)).mean[0], rtol=0, atol=1e-5)


def test_grey_model(tmp_path):
    """A model of one channel takes a colour picture's luma and gives a grey picture."""
    model = toy(tmp_path / "toy", in_channels=1)
    picture(16, 24).save(tmp_path / "a.png")
    run(tmp_path, "encode a.png --out z.pt")
    run(tmp_path, "reconstruct a.png --out pair.png")
    x = torch.from_numpy(np.array(picture(16, 24).convert("L")))[None, None].float() / 127.5 - 1
    z = torch.load(tmp_path / "z.pt", weights_only=True)["z"]
    torch.testing.assert_close(z, model.encode(x).mean[0], rtol=0, atol=1e-5)
    pair = shown(tmp_path / "pair.png")
    assert (pair[..., 0] == pair[..., 1]).all()
    assert (pair[2:18, 2:26, 0] == np.array(picture(16, 24).convert("L"))).all()


@pytest.mark.parametrize("scaling", ["scalar", "channel"])
def test_scaled_latents(tmp_path, model, scaling, refused):
    """Without statistics: refused. With them z is scaled, the file says so, and decode undoes it."""
    picture(24, 32).save(tmp_path / "a.png")
    words = "compute them with latents.py stats"
    assert words in refused("latents", f"encode toy/ckpt.pt a.png --out z.pt --scaling {scaling}")
    found = dict(scaling_factor=0.5, shift_factor=3.0, latents_mean=[1, 2, 0], latents_std=[4, 0.5, 1])
    state = checkpoint.load(tmp_path / "toy/ckpt.pt")
    checkpoint.write(tmp_path / "toy/ckpt.pt", state | {"latents": found})
    run(tmp_path, "encode a.png --out raw.pt")
    run(tmp_path, f"encode a.png --out z.pt --scaling {scaling}")
    raw, content = (torch.load(tmp_path / name, weights_only=True) for name in ("raw.pt", "z.pt"))
    rows = zip(raw["z"], found["latents_mean"], found["latents_std"], strict=True)
    expected = (raw["z"] - 3) / 2 if scaling == "scalar" else torch.stack([(z - m) / s for z, m, s in rows])
    torch.testing.assert_close(content["z"], expected)
    assert content["scaling"] == scaling
    torch.save(content["z"], tmp_path / "bare.pt")                    # what a diffusion model gives
    for flags in ("decode raw.pt --out raw.png", "decode z.pt --out z.png",
                  f"decode bare.pt --scaling {scaling} --out bare.png"):
        run(tmp_path, flags)
    pixels = [shown(tmp_path / name).astype(int) for name in ("raw.png", "z.png", "bare.png")]
    assert (pixels[1] == pixels[2]).all() and np.abs(pixels[0] - pixels[1]).max() <= 1
    other = {"scalar": "channel", "channel": "scalar"}[scaling]
    line = refused("latents", f"decode toy/ckpt.pt z.pt --scaling {other} --out c.png")
    assert f"z.pt has --scaling {scaling}, not {other}" in line
    checkpoint.write(tmp_path / "toy/ckpt.pt", state)
    assert words in refused("latents", "decode toy/ckpt.pt z.pt --out c.png")


def test_raw_weights(tmp_path, parent):
    """--raw takes the weights without averaging: other latents."""
    (tmp_path / "toy").symlink_to(parent.folder)
    picture(16, 16).save(tmp_path / "a.png")
    run(tmp_path, "encode a.png --out ema.pt")
    run(tmp_path, "encode a.png --raw --out raw.pt")
    ema, raw = (torch.load(tmp_path / name, weights_only=True)["z"] for name in ("ema.pt", "raw.pt"))
    assert not torch.equal(ema, raw)


# ---- folders -----------------------------------------------------------------------------------------------


def test_folders(tmp_path, model, capsys):
    """Folders and archives keep their structure; a batch of latents gives numbered pictures."""
    write_images(tmp_path / "photos", ["a/0.png", "b/0.jpg", "1.png"], side=24)
    run(tmp_path, "encode photos --out z")
    assert {str(p.relative_to(tmp_path / "z")) for p in (tmp_path / "z").rglob("*.pt")} == {
        "a/0.pt", "b/0.pt", "1.pt"}
    run(tmp_path, "decode z --out back")
    for name in ("a/0", "b/0", "1"):
        sizes = [next((tmp_path / folder).glob(f"{name}.*")) for folder in ("photos", "back")]
        assert Image.open(sizes[0]).size == Image.open(sizes[1]).size
    torch.save(torch.randn(11, 3, 2, 3), tmp_path / "many.pt")
    run(tmp_path, "decode many.pt --out many")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [f"many-{i:02}.png" for i in range(11)]
    z = torch.load(tmp_path / "many.pt")[10:]
    expected = metrics.to_uint8(model.decode(z))[0].permute(1, 2, 0).numpy()
    assert (shown(tmp_path / "many/many-10.png") == expected).all()
    assert "many.pt: 24 x 16 in many/many-10.png" in capsys.readouterr().out


def test_broken_picture_in_a_folder(tmp_path, model, capsys):
    """It is named, the others are written, and the exit code is 1."""
    folder = write_images(tmp_path / "photos", ["0.png", "1.png", "2.png"], side=16)
    (folder / "1.png").write_bytes(b"broken")
    for command, suffix in (("encode", "pt"), ("reconstruct", "png")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, f"{command} photos --out {command}")
        said = capsys.readouterr()
        assert stop.value.code == 1 and "broken image: photos/1.png: not one of" in said.err
        assert "error: 1 of 3 pictures are broken and were left out" in said.err
        assert sorted(p.name for p in (tmp_path / command).iterdir()) == [f"0.{suffix}", f"2.{suffix}"]


# ---- reconstruct -------------------------------------------------------------------------------------------


def test_reconstruct(tmp_path, model, capsys):
    """Input and reconstruction side by side; the PSNR is scikit-image's of the two halves."""
    names = ["0.png", "1.png"]
    write_images(tmp_path / "photos", names, side=30)
    run(tmp_path, "reconstruct photos --out pairs")
    said, scores = capsys.readouterr().out, []
    for name in names:
        original, pair = shown(tmp_path / "photos" / name), shown(tmp_path / "pairs" / name)
        height, width = original.shape[:2]
        left, right = pair[2 : 2 + height, 2 : 2 + width], pair[2 : 2 + height, 4 + width : 4 + 2 * width]
        assert (left == original).all() and not (right == original).all()
        scores.append(peak_signal_noise_ratio(left, right))
        assert f"{name}: {width} x {height}, PSNR {scores[-1]:.2f} dB, in pairs/{name}" in said
    assert f"mean PSNR of 2 pictures: {sum(scores) / 2:.2f} dB" in said


# ---- tiles -------------------------------------------------------------------------------------------------


def test_tiles_equal_the_whole(tmp_path, model, monkeypatch):
    """--tile, and by default pictures above TILE pixels: only rounding differs from --tile 0."""
    picture(150, 210).save(tmp_path / "a.png")
    run(tmp_path, "encode a.png --out z.pt")
    monkeypatch.setattr(latents, "TILE", 96)
    for flags in ("--tile 0 --out whole.png", "--tile 64 --out tiled.png", "--out default.png"):
        run(tmp_path, f"decode z.pt {flags}")
    whole, *tiled = (shown(tmp_path / f"{name}.png").astype(int) for name in ("whole", "tiled", "default"))
    for pixels in tiled:
        assert np.abs(pixels - whole).max() <= 1 and (pixels != whole).mean() < 1e-3
    run(tmp_path, "reconstruct a.png --tile 64 --out pair.png")
    assert np.abs(shown(tmp_path / "pair.png")[2:-2, -212:-2] - whole).max() <= 1


def test_tiled_encoding(tmp_path, model):
    """--encode-tile is encode_tiled with a quarter of overlap, and the whole where one tile covers it."""
    picture(80, 200).save(tmp_path / "a.png")
    for flags in ("--out whole.pt", "--encode-tile 64 --out tiled.pt", "--encode-tile 200 --out one.pt"):
        run(tmp_path, f"encode a.png {flags}")
    whole, tiled, one = (torch.load(tmp_path / f"{name}.pt")["z"] for name in ("whole", "tiled", "one"))
    torch.testing.assert_close(one, whole, rtol=0, atol=1e-5)
    expected = encode_tiled(model, to_input(picture(80, 200)), 64, 16).mean[0]
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-5)
    assert (tiled - whole).abs().max() > 1e-3


def test_tiles_of_group_normalised_decoders(tmp_path, refused):
    """By default they decode as a whole, whatever the size; --tile is refused."""
    model = toy(tmp_path / "toy", **GROUP)
    torch.save(torch.randn(3, 20, 4), tmp_path / "z.pt")
    words = "tiles cannot be exact: a pixel depends on the whole image through Attention and GroupNorm"
    assert words in refused("latents", "decode toy/ckpt.pt z.pt --tile 64 --out a.png")
    run(tmp_path, "decode z.pt --out a.png")
    expected = metrics.to_uint8(model.decode(torch.load(tmp_path / "z.pt")[None]))[0].permute(1, 2, 0)
    assert (shown(tmp_path / "a.png") == expected.numpy()).all()


# ---- refused -----------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path, model, refused, capsys):
    """Outputs that exist are named before the first is written; --force replaces them."""
    write_images(tmp_path / "photos", ["0.png", "1.png"], side=16)
    for command, source, out in (("encode", "photos", "z"), ("decode", "z", "back"),
                                 ("reconstruct", "photos", "pairs")):
        run(tmp_path, f"{command} {source} --out {out}")
        first, last = sorted((tmp_path / out).iterdir())
        first.unlink()
        last.write_bytes(b"mine")
        capsys.readouterr()
        line = refused("latents", f"{command} toy/ckpt.pt {source} --out {out}")
        assert f"{out}/{last.name} exists: choose another --out, or overwrite it with --force" in line
        assert last.read_bytes() == b"mine" and not first.exists()
        run(tmp_path, f"{command} {source} --out {out} --force")
        assert first.exists() and last.read_bytes() != b"mine"


def test_full_disk(tmp_path, model):
    """One line and exit code 1; no half-written file, and the file that was there is the old one."""
    write_images(tmp_path / "photos", ["0.png"], side=64)
    (tmp_path / "pair.png").write_bytes(b"old")
    code, said = forked(tmp_path, "reconstruct toy/ckpt.pt photos/0.png --device cpu --out pair.png --force",
                        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert code == 1 and said.count("\n") == 1 and "cannot write pair.png: [Errno 27] File too large" in said
    assert (tmp_path / "pair.png").read_bytes() == b"old" and not [*tmp_path.glob("*.tmp")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Checkpoints, pictures and latents, right and wrong ones."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "photos", ["0.png", "1.png"], side=16)
    write_images(folder / "twins", ["0.png", "0.jpg"], side=16)
    (folder / "bad.png").write_bytes(b"bad")
    torch.save(torch.randn(4, 2, 2), folder / "four.pt")
    torch.save(torch.ones(3, 2, 2, dtype=torch.int64), folder / "whole.pt")
    torch.save(torch.ones(3, 2, 2), folder / "good.pt")
    torch.save(torch.full((3, 2, 2), torch.nan), folder / "nan.pt")
    model = toy(folder / "toy")
    toy(folder / "vq", codebook_size=4)
    toy(folder / "vit", aggregator="vit", resolution=32)
    checkpoint.save(folder / "foreign", dict(step=0, config=asdict(model.config), args={}, ema=None,
                                             model=model.state_dict()), keep=0)
    return folder


@pytest.mark.parametrize("flags, words", [
    ("encode toy/ckpt.pt nowhere.png --out z.pt", "'nowhere.png' not found"),
    ("encode toy/ckpt.pt synthetic --out z", "must be a picture, a folder or an archive, got synthetic"),
    ("encode toy/ckpt.pt bad.png --out z.pt", "bad.png: not one of JPEG"),
    ("encode toy/ckpt.pt photos --out z.pt", "--out z.pt must end in .pt, or be a folder"),
    ("encode toy/ckpt.pt photos/0.png --out z.png", "--out z.png must end in .pt"),
    ("encode toy/ckpt.pt twins --out z", "0.jpg and 0.png would both become z/0.pt: rename one of them"),
    ("encode toy/ckpt.pt photos --out z --encode-tile 20", "--encode-tile 20 must be a multiple of 8"),
    ("encode toy/ckpt.pt photos --out z --encode-tile 8", "must be a multiple of 8, of at least 16"),
    ("encode toy/ckpt.pt photos --out z --scaling std", "invalid choice: 'std'"),
    ("encode nowhere.pt photos --out z", "no checkpoint at nowhere.pt"),
    ("encode toy/ckpt.pt photos", "the following arguments are required: --out"),
    ("decode toy/ckpt.pt nowhere.pt --out a.png", "no latent file nowhere.pt"),
    ("decode toy/ckpt.pt bad.png --out a.png", "bad.png is damaged or not a file of torch.save"),
    ("decode toy/ckpt.pt toy/ckpt.pt --out a.png", "toy/ckpt.pt must have floats of shape (3, h, w)"),
    ("decode toy/ckpt.pt four.pt --out a.png", "but has torch.float32 (4, 2, 2)"),
    ("decode toy/ckpt.pt whole.pt --out a.png", "but has torch.int64 (3, 2, 2)"),
    ("decode toy/ckpt.pt nan.pt --out a.png", "nan.pt has latents that are NaN or infinite"),
    ("decode toy/ckpt.pt photos --out a", "no .pt files in photos"),
    ("decode toy/ckpt.pt good.pt --out a.jpg", "--out a.jpg must end in .png"),
    ("decode toy/ckpt.pt good.pt --tile 20 --out a.png", "--tile 20 is not a multiple of 8"),
    ("decode toy/ckpt.pt good.pt --tile -8 --out a.png", "must not be negative, got -8"),
    ("reconstruct toy/ckpt.pt photos --out photos", "photos/0.png exists"),
    ("reconstruct toy/ckpt.pt photos --out a --tile 12", "--tile 12 is not a multiple of 8"),
    ("reconstruct vq/ckpt.pt photos --out a --encode-tile 16", "--encode-tile 16 needs a Gaussian posterior"),
    ("encode vit/ckpt.pt photos --out z", "a ViT aggregator, which takes 32x32 only"),
    ("stats toy/ckpt.pt --data photos --res 20", "image size 20x20 is not divisible by 8"),
    ("stats toy/ckpt.pt --data photos --res 40 --count 1", "statistics need at least 2 images, got 1"),
    ("stats toy/ckpt.pt --data nowhere", "'nowhere' not found"),
    ("stats foreign/ckpt.pt --data photos", "foreign/ckpt.pt does not record its resolution: give --res"),
    ("stats toy/ckpt.pt --data photos --raw --batch-size 0", "must be at least 1, got 0"),
    ("measure toy/ckpt.pt", "invalid choice: 'measure'"),
])  # fmt: skip
def test_wrong_input(inputs, tmp_path, refused, flags, words):
    """One line with the value received, exit code 2, nothing written."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert words in refused("latents", flags)


def test_names_that_leave_the_folder(tmp_path):
    """A name in an archive cannot lead out of --out."""
    for name in ("../a.png", "/a.png"):
        with pytest.raises(ValueError, match=re.escape(f"{name!r} would be written outside of z")):
            pictures.targets(["b.png", name], "z", ".pt", force=True)


def test_one_process_only(tmp_path, model, refused, monkeypatch):
    """Pictures are the work of one process; torchrun is for stats and cache."""
    picture(16, 16).save(tmp_path / "a.png")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    line = refused("latents", "encode toy/ckpt.pt a.png --out z.pt --device cpu")
    assert "encode runs in one process, without torchrun" in line
