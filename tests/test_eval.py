"""Run: python -m pytest tests/test_eval.py. Scores of eval.py against scikit-image, by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, torchrun, train_in, write_images
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.transforms.functional import center_crop

import checkpoint
import eval as script

NAMES = ["a.png", "b/c.png", "b/d.PNG", "e.png", "f.png"]
QUICK = "--num-workers 0 --device cpu"


@pytest.fixture
def place(tmp_path, parent) -> Path:
    """A folder with ckpt.pt, whose raw weights make brighter images, and five pictures of 64 x 72 to 76."""
    state = {name: parent.state()[name] for name in ("step", "config", "args", "model", "ema")}
    state["model"]["decoder.conv_out.bias"] += 0.2
    torch.save(state, tmp_path / "ckpt.pt")
    write_images(tmp_path / "pictures", NAMES)
    return tmp_path


def score(folder: Path, flags: str) -> dict:
    """What --json holds after eval.py with these flags."""
    call("eval", folder, f"{QUICK} --json scores/out.json {flags}")
    return json.loads((folder / "scores/out.json").read_text())


def by_hand(folder: Path, files: list[str], raw: bool = False) -> tuple[float, float]:
    """PSNR and SSIM from the definition: 64 px centre crop, posterior mean, rounded pair, scikit-image."""
    net, _ = checkpoint.load_model(folder / "ckpt.pt", raw)
    scores = []
    for file in files:
        image = np.asarray(center_crop(Image.open(folder / "pictures" / file), 64))
        x = torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = net.decode(net.encode(x).mean)[0].permute(1, 2, 0).numpy()
        recon = np.clip(np.rint((out.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
        scores.append((peak_signal_noise_ratio(image, recon), structural_similarity(
            image, recon, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)))
    return tuple(np.mean(scores, axis=0))


# ---- scores ------------------------------------------------------------------------------------------------


def test_scores_are_those_by_hand(place):
    """psnr and ssim are scikit-image's on the same pairs, for EMA weights and, with --raw, the model's."""
    for flags, raw, weights in (("", False, "EMA"), ("--raw", True, "raw")):
        report = score(place, f"ckpt.pt --data pictures --batch-size 2 {flags}")
        assert (report["psnr"], report["ssim"]) == pytest.approx(by_hand(place, NAMES, raw), abs=1e-4)
        assert (report["n"], report["res"], report["step"], report["weights"]) == (5, 64, 2, weights)
        assert (report["data"], report["checkpoint"]) == ("pictures", "ckpt.pt")
    assert abs(report["psnr"] - score(place, "ckpt.pt --data pictures")["psnr"]) > 0.1


def test_limit(place):
    """--limit 2 of 5 pictures scores the first and the third, spread over the sorted set."""
    report = score(place, "ckpt.pt --data pictures --limit 2")
    assert report["n"] == 2
    assert report["psnr"] == pytest.approx(by_hand(place, [NAMES[0], NAMES[2]])[0], abs=1e-4)


def test_broken_file_is_counted_and_left_out(place, capsys):
    """A file that is cut short changes no score but n, and is counted in the output."""
    whole = score(place, "ckpt.pt --data pictures")
    (place / "pictures/broken.png").write_bytes((place / "pictures/a.png").read_bytes()[:2000])
    report = score(place, "ckpt.pt --data pictures")
    printed = capsys.readouterr()
    assert "1 broken images left out" in printed.out and printed.err.count("pictures/broken.png") == 1
    assert report == whole and report["n"] == 5


def test_two_processes_give_the_same_scores(place):
    """torchrun with 2 processes on 5 pictures: no picture counts twice, and every number is the same."""
    alone = score(place, "ckpt.pt --data pictures --batch-size 1")
    done = torchrun(place, "eval.py ckpt.pt --data pictures --batch-size 1 --num-workers 0 --json two.json")
    assert done.returncode == 0, done.stderr
    both = json.loads((place / "two.json").read_text())
    for name in ("psnr", "ssim", "psnr_std", "psnr_pooled", "n"):
        assert both[name] == pytest.approx(alone[name], rel=1e-12)
    assert done.stdout.count("PSNR") == 1


def test_grey_checkpoint(tmp_path):
    """A model of grey images is scored on the BT.601 luma of coloured ones."""
    train_in(tmp_path, "--in-channels 1 --steps 1 --res 32")
    report = score(tmp_path, "run/ckpt.pt --data synthetic --limit 2")
    assert report["n"] == 2 and report["res"] == 32 and 3 < report["psnr"] < 40


# ---- pictures and sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, count, res", [("", 5, 64), ("--limit 3 --res 40", 3, 40)])
def test_grid(place, flags, count, res):
    """--grid: inputs above reconstructions, 2 px of white between; --res sets the size of both files."""
    report = score(place, f"ckpt.pt --data pictures --grid pictures.out/grid.png {flags}")
    grid = Image.open(place / "pictures.out/grid.png")
    assert report["res"] == res and report["n"] == count
    assert grid.size == (count * (res + 2) + 2, 2 * (res + 2) + 2)
    if not flags:
        first = center_crop(Image.open(place / "pictures/a.png"), 64)
        shown = np.asarray(grid.crop((2, 2, 66, 66)), dtype=int)
        assert np.abs(shown - np.asarray(first)).max() <= 1           # torchvision rounds its own way
        below = np.asarray(grid.crop((2, 68, 66, 132)), dtype=int)
        assert np.abs(below - np.asarray(first)).mean() > 1


# ---- arguments ---------------------------------------------------------------------------------------------


def test_both_orders_of_arguments():
    """CKPT may stand before or behind --imagenet-val, with or without a folder."""
    first = script.parse_args(["c.pt", "--imagenet-val"])
    assert vars(first) == vars(script.parse_args(["--imagenet-val", "c.pt"]))
    assert (first.ckpt, first.imagenet_val) == ("c.pt", script.DEFAULT)
    for words in (["c.pt", "--imagenet-val", "folder"], ["--imagenet-val", "folder", "c.pt"]):
        args = script.parse_args(words)
        assert (args.ckpt, args.imagenet_val) == ("c.pt", "folder")


@pytest.mark.parametrize("flags", ["--imagenet-val", "--imagenet-val pictures"])
def test_imagenet_val(place, monkeypatch, flags):
    """Alone it means $IMAGENET/val, else the folder given: class folders at any depth."""
    shutil.copytree(place / "pictures", place / "imagenet/val")
    monkeypatch.setenv("IMAGENET", "imagenet")
    report = score(place, f"ckpt.pt {flags} --limit 1")
    assert report["n"] == 1 and report["data"] == ("pictures" if "pictures" in flags else "imagenet/val")


@pytest.mark.parametrize("flags, expected", [
    ("missing.pt --data pictures", "no checkpoint at missing.pt"),
    ("text.pt --data pictures", "text.pt is damaged or no checkpoint"),
    ("cut.pt --data pictures", "cut.pt is damaged or no checkpoint"),
    ("ckpt.pt --data missing", "no 'missing'; give folders"),
    ("ckpt.pt --data empty", "holds no image"),
    ("ckpt.pt --data text.pt", "is no folder, .tar, .zip or image"),
    ("ckpt.pt --imagenet-val", "no folder datasets/imagenet/val; set IMAGENET"),
    ("ckpt.pt --data pictures --res 100", "--res 100 is not a multiple of 8"),
    ("ckpt.pt --data pictures --device tpu", "no device 'tpu'"),
    ("ckpt.pt --data pictures --res 8", "--res 8 is below 16"),
    ("ckpt.pt --data broken", "broken/0.png"),
])
def test_user_errors(place, refused, flags, expected):
    """Each is one line and exit code 2, and neither scores nor a grid are written."""
    for name in ("empty", "broken"):
        (place / name).mkdir()
    for i in range(3):
        (place / f"broken/{i}.png").write_bytes(b"")
    (place / "text.pt").write_text("# not a checkpoint\n")
    (place / "cut.pt").write_bytes((place / "ckpt.pt").read_bytes()[:100_000])
    assert expected in refused("eval", f"{QUICK} --json out/scores.json --grid out/grid.png {flags}")
