"""Run: python -m pytest tests/test_eval.py. Scores of eval.py against scikit-image, by hand."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, torchrun, train_in, write_images
from diffusers import AutoencoderKL
from formulas import open_state, write_formula_file
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchvision.transforms.functional import center_crop

import checkpoint
import eval as script
from evaluation import fid, metrics
from runtime import listings, weights
from variants import foreign

SCORES = ("psnr", "ssim", "ssim_7x7", "psnr_std", "psnr_pooled", "n")
NAMES = ["a.png", "b/c.png", "b/d.PNG", "e.png", "f.png"]
QUICK = "--num-workers 0 --device cpu --metrics psnr,ssim"


@pytest.fixture(scope="module")
def origin(tmp_path_factory, parent) -> Path:
    """A folder with ckpt.pt, whose raw weights make brighter images, and five pictures of 64 x 72 to 76."""
    folder, whole = tmp_path_factory.mktemp("origin"), parent.state()
    state = {name: whole[name] for name in ("step", "config", "args", "model", "ema")}
    state["model"]["decoder.conv_out.bias"] += 0.2
    torch.save(state, folder / "ckpt.pt")
    write_images(folder / "pictures", NAMES)
    return folder


@pytest.fixture
def place(tmp_path, origin) -> Path:
    """A copy of it, to be changed at will."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    return tmp_path


def score(folder: Path, flags: str) -> dict:
    """What --json holds after eval.py with these flags."""
    (folder / "scores/out.json").unlink(missing_ok=True)
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
    for flags, raw, kind in (("", False, "EMA"), ("--raw", True, "raw")):
        report = score(place, f"ckpt.pt --data pictures --batch-size 2 {flags}")
        assert (report["psnr"], report["ssim"]) == pytest.approx(by_hand(place, NAMES, raw), abs=1e-4)
        assert (report["n"], report["res"], report["step"], report["weights"]) == (5, 64, 2, kind)
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
    assert all(report[name] == whole[name] for name in (*SCORES, "intervals"))
    assert (report["n"], report["broken"], whole["broken"]) == (5, 1, 0)
    assert report["names_sha256"] != whole["names_sha256"]


def test_two_processes_give_the_same_scores(place):
    """torchrun with 2 processes on 5 pictures: no picture counts twice, every number has the same bits."""
    alone = score(place, "ckpt.pt --data pictures --batch-size 2")
    done = torchrun(place, f"eval.py ckpt.pt --data pictures --batch-size 2 {QUICK} --json two.json")
    assert done.returncode == 0, done.stderr
    both = json.loads((place / "two.json").read_text())
    assert both["processes"] == 2 and both["names_sha256"] == alone["names_sha256"]
    assert all(both[name] == alone[name] for name in (*SCORES, "intervals"))
    assert done.stdout.count("PSNR, dB") == 1


def test_grey_checkpoint(tmp_path):
    """A model of grey images is scored on the BT.601 luma of coloured ones."""
    train_in(tmp_path, "--in-channels 1 --steps 1 --res 32")
    report = score(tmp_path, "run/ckpt.pt --data synthetic --limit 2")
    assert report["n"] == 2 and report["res"] == 32 and 3 < report["psnr"] < 40


def test_checkpoint_without_average(place):
    """Without EMA weights the raw ones are scored, and the report says so."""
    state = torch.load(place / "ckpt.pt", weights_only=True)
    torch.save(state | {"ema": None}, place / "no-ema.pt")
    report = score(place, "no-ema.pt --data pictures")
    assert report["weights"] == "raw"
    assert report["psnr"] == score(place, "ckpt.pt --data pictures --raw")["psnr"]


def test_odd_pictures(place, capsys):
    """A grey picture is scored as RGB, one of 20 x 3000 by its centre; both count."""
    grey, strip = Image.open(place / "pictures/a.png").convert("L"), Image.new("RGB", (20, 3000), "teal")
    grey.save(place / "pictures/grey.png"), strip.save(place / "pictures/strip.png")
    report = score(place, "ckpt.pt --data pictures --per-image values.csv")
    assert (report["n"], report["broken"]) == (7, 0)
    rows = list(csv.DictReader((place / "values.csv").open()))
    assert {row["file"] for row in rows} == {*NAMES, "grey.png", "strip.png"}
    picture = Image.fromarray(np.asarray(grey)[..., None].repeat(3, axis=2))
    picture.save(place / "pictures/grey.png")
    again = score(place, "ckpt.pt --data pictures")
    assert again["psnr"] == report["psnr"]


# ---- protocol, networks, availability ----------------------------------------------------------------------


def test_report_states_the_protocol(place, capsys):
    """JSON and output say what was done, on what and with what; intervals hold their means."""
    report = score(place, "ckpt.pt --data pictures --protocol lavinal712 --precision bf16")
    protocol = report["protocol"]
    assert (protocol["name"], protocol["resize"], protocol["crop"]) == ("lavinal712", "bilinear", "centre")
    assert protocol["sample"] and protocol["truncate"] and protocol["floats"]
    assert protocol["headline"]["ssim"] == "ssim_7x7" and report["precision"] == "bf16"
    assert report["versions"]["torch"] == version("torch") and report["versions"]["clean-fid"] == "0.1.35"
    names = "\n".join(sorted(Path(name).name for name in NAMES))
    assert report["names_sha256"] == hashlib.sha256(names.encode()).hexdigest()
    digest = hashlib.sha256((place / "ckpt.pt").read_bytes()).hexdigest()
    assert report["checkpoint_sha256"] == digest and report["training"]["args"]["res"] == 64
    for name, (low, high) in report["intervals"].items():
        assert low <= report[name] <= high
    assert report.keys() >= {"config", "seconds", "device", "batch_size"} and "complete" not in report
    printed = capsys.readouterr().out
    for words in ("lavinal712", "bilinear", "posterior sample", "truncated", "floats", "EMA weights",
                  "bf16", "64 px", report["names_sha256"][:16], "* SSIM, uniform 7x7", "img/s"):
        assert words in printed


def test_protocols_differ_where_they_should(place):
    """The same pictures: a sample scores below the mean, resizing otherwise changes what is scored."""
    scores = {name: score(place, f"ckpt.pt --data pictures --res 40 --protocol {name}")
              for name in metrics.PROTOCOLS}
    assert len({report["psnr"] for report in scores.values()}) == 4
    again = score(place, "ckpt.pt --data pictures --res 40 --protocol lavinal712 --batch-size 2")
    assert again["psnr"] == pytest.approx(scores["lavinal712"]["psnr"], abs=1e-4)    # noise is per image


def test_lpips_through_the_offline_path(place, monkeypatch, capsys):
    """A file in TORCH_HOME is used, its sha256 reported; a warning says that it is not the published one."""
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    path = write_formula_file("squeeze", place / "torch")
    report = score(place, "ckpt.pt --data pictures --metrics lpips-squeeze --per-image values.csv")
    file = report["files"]["lpips_squeeze"]
    assert file["path"] == str(path) and not file["published"]
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "is not the published file" in capsys.readouterr().out
    values = [float(row["lpips_squeeze"]) for row in csv.DictReader((place / "values.csv").open())]
    assert report["lpips_squeeze"] == pytest.approx(np.mean(values), rel=1e-8) and min(values) > 0
    small = score(place, "ckpt.pt --data pictures --res 16,32 --metrics psnr")
    assert [part["unavailable"] for part in small["curve"]] == [{}, {}]


@pytest.mark.parametrize("flags, names, code", [
    ("", {"lpips_vgg", "lpips_alex", "rfid"}, None),
    ("--metrics psnr,lpips-alex", {"lpips_alex"}, 3),
    ("--metrics rfid", {"rfid"}, 3),
    ("--vgg-file no/vgg.pth --alex-file no/alex.pth --inception-file no/inception.pth",
     {"lpips_vgg", "lpips_alex", "rfid"}, None),
])  # fmt: skip
def test_missing_weights(place, monkeypatch, capsys, flags, names, code):
    """The metric is unavailable with the reason and the others are written; named, it ends with code 3."""
    def fail(url: str, path: str, hash_prefix: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(place))
    command = f"{QUICK.split(' --metrics')[0]} ckpt.pt --data pictures --json out.json {flags}"
    if code:
        with pytest.raises(SystemExit) as stop:
            call("eval", place, command)
        assert stop.value.code == code
    else:
        call("eval", place, command)
    report = json.loads((place / "out.json").read_text())
    assert report["unavailable"].keys() == names and report["psnr"] > 0
    for metric, reason in report["unavailable"].items():
        file = f"no/{script.NETWORK_METRICS[metric]}.pth"
        assert ("No such file" in reason and file in reason) if "-file" in flags else "no route" in reason
    assert capsys.readouterr().out.count("is unavailable: cannot load") == len(names)


def test_rfid_of_a_small_network(place, monkeypatch, capsys):
    """With any feature network: both conventions, the jackknife's intervals, and the warning about N."""
    class Features(nn.Module):
        dims = 40

        def __init__(self, state: dict) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(x, 60, 59).flatten(1)[:, :40]

    monkeypatch.setattr(weights, "load", lambda name, file: weights.Weights({}, "here", "0", True))
    monkeypatch.setattr(fid, "Inception", Features)
    report = score(place, "ckpt.pt --data synthetic --limit 20 --res 32 --metrics rfid --jackknife")
    assert "rFID of 20 images is biased upwards" in capsys.readouterr().out
    for name in ("rfid_pytorch", "rfid_clean"):
        low, high = report["intervals"][name]
        assert 0 < low < report[name] < high
        half = fid.T_QUANTILE * report[f"{name}_se"]
        assert (low, high) == pytest.approx((report[name] - half, report[name] + half))


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
        assert (shown == np.asarray(first)).all()
        below = np.asarray(grid.crop((2, 68, 66, 132)), dtype=int)
        assert np.abs(below - np.asarray(first)).mean() > 1


def test_curve(place, capsys):
    """Several --res: a report for each, one table, one plot, files with the resolution in their name."""
    both = score(place, "ckpt.pt --data pictures --res 64,32,32 --plot plots/curve.png --grid grids/g.png")
    alone = score(place, "ckpt.pt --data pictures --res 32")
    assert [part["res"] for part in both["curve"]] == [32, 64]
    assert all(both["curve"][0][name] == alone[name] for name in SCORES)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["32", "5"])
    assert f"{alone['psnr']:.3f}" in line
    assert Image.open(place / "plots/curve.png").size == (640, 240)      # PSNR and SSIM
    assert Image.open(place / "grids/g-32.png").height == 2 * 34 + 2
    assert Image.open(place / "grids/g-64.png").height == 2 * 66 + 2


def test_extremes(place):
    """--extremes: the lowest and the highest PSNR, as --per-image has them, above what became of them."""
    score(place, "ckpt.pt --data pictures --extremes worst.png --extremes-count 1 --per-image values.csv")
    rows = sorted(csv.DictReader((place / "values.csv").open()), key=lambda row: float(row["psnr"]))
    sheet, side, block = Image.open(place / "worst.png"), 64, 3 * 16 + 2 * 66
    for b, row in enumerate((rows[0], rows[-1])):
        top = 2 + b * block + 3 * 16
        expected = center_crop(Image.open(place / "pictures" / row["file"]), side)
        shown, below = (np.asarray(sheet.crop((2, y, 66, y + side))) for y in (top, top + 66))
        assert (shown == np.asarray(expected)).all()
        assert peak_signal_noise_ratio(shown, below) == pytest.approx(float(row["psnr"]), abs=1e-8)


def test_ctrl_c_ends_it(place):
    """Loader processes do not outlive the program or keep it from ending, whatever ends it."""
    flags = "ckpt.pt --data synthetic --limit 100000 --num-workers 2 --metrics psnr --device cpu"
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *flags.split()], cwd=place, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seen = ""
    while seen.count("it/s") < 3 and process.poll() is None:      # until batches come
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]


# ---- arguments ---------------------------------------------------------------------------------------------


def test_both_orders_of_arguments():
    """CKPT may stand before or behind --imagenet-val, with or without a folder."""
    first = script.parse_args(["c.pt", "--imagenet-val"])
    assert vars(first) == vars(script.parse_args(["--imagenet-val", "c.pt"]))
    assert (first.ckpt, first.imagenet_val) == ("c.pt", script.DEFAULT)
    for words in (["c.pt", "--imagenet-val", "folder"], ["--imagenet-val", "folder", "c.pt"]):
        args = script.parse_args(words)
        assert (args.ckpt, args.imagenet_val) == ("c.pt", "folder")
    alone = script.parse_args(["--imagenet-val", "folder"])
    assert (alone.ckpt, alone.imagenet_val) == (str(checkpoint.SHIPPED), "folder")
    other = script.parse_args("--diffusers vae --imagenet-val folder --res 64".split())
    assert (other.ckpt, other.imagenet_val) == (None, "folder")


def test_diffusers(place):
    """--diffusers scores an AutoencoderKL as diffusers itself reconstructs, under the same protocol."""
    torch.manual_seed(0)
    widths = (32, 64, 128, 128)
    theirs = AutoencoderKL(
        block_out_channels=widths, down_block_types=4 * ("DownEncoderBlock2D",), layers_per_block=2,
        up_block_types=4 * ("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=32,
    ).eval()  # fmt: skip
    theirs.save_pretrained(place / "vae")
    report = score(place, "--diffusers vae --data pictures --res 64 --limit 1")
    image = np.asarray(center_crop(Image.open(place / "pictures/a.png"), 64))
    x = torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        recon = metrics.to_uint8(theirs.decode(theirs.encode(x).latent_dist.mean).sample)[0].permute(1, 2, 0)
    assert report["psnr"] == pytest.approx(peak_signal_noise_ratio(image, recon.numpy()), abs=1e-3)
    file = place / "vae/diffusion_pytorch_model.safetensors"
    assert report["checkpoint_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["checkpoint"] == "vae" and report["config"]["latent_channels"] == 4


def test_open_litevae(place):
    """--open-litevae scores a file under the public names as the model that load_open_litevae makes of it."""
    torch.save({"state_dict": open_state()}, place / "public.ckpt")
    report = score(place, "--open-litevae public.ckpt --data pictures --res 64 --limit 1")
    net, _ = foreign.load_open_litevae(place / "public.ckpt")
    image = np.asarray(center_crop(Image.open(place / "pictures/a.png"), 64))
    x = torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        recon = metrics.to_uint8(net.decode(net.encode(x).mean))[0].permute(1, 2, 0)
    assert report["psnr"] == pytest.approx(peak_signal_noise_ratio(image, recon.numpy()), abs=1e-3)


def test_model_of_the_user(place, monkeypatch):
    """--model scores any callable: one that darkens by 2/255 has the PSNR of an error of 1/255."""
    (place / "mine.py").write_text("def darker(x):\n    return x - 2 / 255\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    report = score(place, "--model mine:darker --data pictures --res 64 --limit 1")
    image = np.asarray(center_crop(Image.open(place / "pictures/a.png"), 64)).astype(int)
    error = np.mean((image - np.clip(image - 1, 0, 255)) ** 2)
    assert report["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)


@pytest.mark.parametrize("protocol", ["default", "taming"])
def test_reconstructions_that_are_not_finite(place, monkeypatch, capsys, protocol):
    """They are counted and named in a warning; NaN has the score of black."""
    black, nan = "def black(x):\n    return x * 0 - 1\n\n", "def nan(x):\n    return x / 0 * 0\n"
    (place / "nan.py").write_text(black + nan)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = f"--data pictures --res 64 --limit 2 --protocol {protocol}"
    report, black = score(place, f"--model nan:nan {flags}"), score(place, f"--model nan:black {flags}")
    assert (report["nonfinite"], black["nonfinite"]) == (2, 0) and report["psnr"] == black["psnr"]
    assert capsys.readouterr().out.count("2 reconstructions have NaN or infinite pixels") == 1


@pytest.mark.parametrize("flags", ["--imagenet-val", "--imagenet-val pictures"])
def test_imagenet_val(place, monkeypatch, capsys, flags):
    """Alone it means $IMAGENET/val, else the folder given: class folders at any depth."""
    shutil.copytree(place / "pictures", place / "imagenet/val")
    monkeypatch.setenv("IMAGENET", "imagenet")
    report = score(place, f"ckpt.pt {flags} --limit 1")
    assert report["n"] == 1 and report["data"] == ("pictures" if "pictures" in flags else "imagenet/val")
    assert report["complete"] is False
    assert "1 images, not ImageNet's 50,000: not comparable with published scores" in capsys.readouterr().out


@pytest.mark.parametrize("flags, expected", [
    ("missing.pt --data pictures", "no checkpoint at missing.pt"),
    ("pictures --data pictures", "pictures is a folder: name its checkpoint, e.g. pictures/ckpt.pt"),
    ("ckpt.pt --data pictures --grid g.txt", "--grid g.txt is no picture: its name has to end in .png or"),
    ("ckpt.pt --data pictures --json pictures", "--json pictures is a folder: name a file"),
    ("ckpt.pt --data pictures --per-image text.pt/a.csv", "text.pt/a.csv cannot be written: a part of"),
    ("text.pt --data pictures", "text.pt is damaged or not a checkpoint"),
    ("cut.pt --data pictures", "cut.pt is damaged or not a checkpoint"),
    ("ckpt.pt --data missing", "'missing' not found; give folders"),
    ("ckpt.pt --data empty", "contains no images"),
    ("ckpt.pt --data text.pt", "is not a folder, .tar, .zip or image"),
    ("ckpt.pt --imagenet-val", "no folder datasets/imagenet/val; set IMAGENET"),
    ("ckpt.pt --data pictures --res 100", "--res 100 is not a multiple of 8"),
    ("ckpt.pt --data pictures --device tpu", "no device 'tpu'"),
    ("ckpt.pt --data pictures --res 8", "--res 8 is below 16"),
    ("ckpt.pt --data broken", "broken/0.png"),
    ("ckpt.pt --data pictures --metrics psnr,fid", "unknown metric 'fid'; choose from psnr, ssim, lpips"),
    ("ckpt.pt --data pictures --res 32,x", "invalid resolutions value: '32,x'"),
    ("--diffusers empty --data pictures --res 64", "in empty: only safetensors files are read"),
    ("--diffusers text.pt --data pictures --res 64", "text.pt is not a safetensors file"),
    ("--diffusers empty --data pictures", "give --res; only checkpoints from train.py"),
    ("--diffusers empty --data pictures --res 64 --raw", "--raw needs a checkpoint from train.py"),
    ("--open-litevae text.pt --data pictures --res 64", "text.pt is damaged, or would execute code"),
    ("--model nowhere:f --data pictures --res 64", "cannot import nowhere: no such module"),
    ("--model builtins:id --data pictures --res 64", "builtins:id"),
    ("--model os:getcwd --data pictures --res 64 --protocol lavinal712", "--model has none"),
    ("ckpt.pt --data pictures --jackknife", "--jackknife is the interval of rFID, which --metrics leaves"),
    ("ckpt.pt --diffusers empty --data pictures", "give one of a checkpoint, --diffusers"),
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


def test_without_a_model(place, capsys):
    """The model in weights/ is scored, and a line says so."""
    report = score(place, "--data pictures")
    assert "no model is named: scoring weights/litevae-tiny.pt" in capsys.readouterr().out
    assert report["checkpoint"] == str(checkpoint.SHIPPED) and report["psnr"] > 15


def test_listing_cache(place, monkeypatch):
    """A long listing is kept for the next time, but not with --no-listing-cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr(listings, "MIN_IMAGES", 1)
    monkeypatch.setattr(listings, "SETTLED", 0)
    for images in ("--data pictures", "--imagenet-val pictures"):
        shutil.rmtree(place / "cache", ignore_errors=True)
        without = score(place, f"ckpt.pt {images} --no-listing-cache")
        assert not (place / "cache").exists()
        for _ in range(2):
            assert score(place, f"ckpt.pt {images}")["names_sha256"] == without["names_sha256"]
            assert len(list((place / "cache/litevae").iterdir())) == 1
