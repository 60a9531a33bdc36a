"""Run: python -m pytest tests/test_diffusion_example.py. The example from outside, and its parts by hand."""

import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, equal, toy, write_images
from PIL import Image

import checkpoint
from downstream import pictures
from examples import diffusion
from examples.diffusion import Block, DiT, DiTConfig, draw_times, euler, flow
from model import LatentScaling

SCRIPT = "examples.diffusion"
SMALL = ("toy/ckpt.pt cache --width 16 --depth 1 --heads 2 --batch-size 2 --num-workers 0 --samples 3 "
         "--sample-steps 2 --device cpu --out dit")
CONFIG = DiTConfig(latent_shape=(3, 4, 4), classes=2, patch=2, width=16, depth=2, heads=2)


def encode(folder: Path, names: list[str]) -> None:
    """toy/ckpt.pt with its statistics, and the cache of these images in cache/."""
    toy(folder / "toy")
    write_images(folder / "photos", names, side=32)
    flags = "toy/ckpt.pt --data photos --num-workers 0 --device cpu"
    call("latents", folder, f"stats {flags}")
    call("latents", folder, f"cache {flags} --out cache")


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A checkpoint and the cache of two images in two classes; left as it is."""
    folder = tmp_path_factory.mktemp("ready")
    encode(folder, ["ant/0.png", "bee/0.png"])
    return folder


@pytest.fixture
def folder(ready, tmp_path) -> Path:
    for name in ("toy", "cache"):
        shutil.copytree(ready / name, tmp_path / name)
    return tmp_path


# ---- flow matching -----------------------------------------------------------------------------------------


def test_flow_by_hand():
    """x0 = 2, eps = -1: at t = 1/4 the path is at 1.25, at 1 at the noise, and its slope is -3 throughout."""
    x0, eps = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), -1.0)
    x, velocity = flow(x0, eps, torch.tensor([0.25, 1.0]))
    assert x.flatten().tolist() == [1.25, -1.0] and velocity.flatten().tolist() == [-3.0, -3.0]


def test_euler_by_hand():
    """velocity = x t from x = 8: one step ends at 8 - 8 = 0, two at 4 = 8 - 8/2, then 3 = 4 - 4/2/2."""
    x, seen = torch.full((1, 1, 1, 1), 8.0), []

    def velocity(x, t):
        seen.append(t.item())
        return x * t[:, None, None, None]

    assert (euler(velocity, x, 1).item(), euler(velocity, x, 2).item()) == (0.0, 3.0)
    assert seen == [1.0, 1.0, 0.5]


def test_euler_of_a_gaussian():
    """The exact velocity field of N(m, s^2) turns noise into m + s noise; Euler's error is of first order.

    x_t and eps - x_0 are jointly Gaussian, so the velocity is a linear regression on x_t.
    """
    m, s = 0.7, 0.3
    noise = torch.randn(2000, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def velocity(x, t):
        t = t[:, None, None, None]
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    ends = {steps: euler(velocity, noise, steps) for steps in (100, 200, 2000)}
    assert ends[2000].dtype == torch.float64
    assert math.isclose(ends[2000].mean(), m + s * noise.mean(), abs_tol=1e-4)
    assert math.isclose(ends[2000].std(), s * noise.std(), rel_tol=3e-3)
    errors = [(ends[steps] - m - s * noise).abs().max().item() for steps in (100, 200)]
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_best_velocity_is_the_regression():
    """Least squares on flow()'s pairs finds the slope of the exact field that the test above integrates."""
    m, s, t = 0.7, 0.3, 0.4
    draw = torch.randn(2, 200_000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, velocity = flow(m + s * draw[0], draw[1], torch.full((200_000,), t, dtype=torch.float64))
    slope, offset = np.polyfit(x.flatten(), velocity.flatten(), 1)
    exact = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    assert math.isclose(slope, exact, rel_tol=0.01)
    assert math.isclose(offset, -m - exact * (1 - t) * m, rel_tol=0.01)


def test_times():
    """Uniform times have mean 1/2 and deviation 1/sqrt(12); the logit of the others is N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    uniform, other = (draw_times(100_000, kind, generator) for kind in ("uniform", "logit-normal"))
    for t, deviation in ((uniform - 0.5, 12**-0.5), (other.double().logit(), 1.0)):
        assert abs(t.mean()) < 0.01 and abs(t.std() - deviation) < 0.01
    assert 0 <= uniform.min() and uniform.max() <= 1


# ---- the transformer ---------------------------------------------------------------------------------------


def test_starts_as_the_identity():
    """adaLN-zero: a new block returns its input bit for bit, so a new transformer predicts 0."""
    torch.manual_seed(0)
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 16)
    block = Block(16, heads=2)
    assert torch.equal(block(x, condition), x)
    torch.nn.init.ones_(block.modulation.bias)
    assert not torch.allclose(block(x, condition), x, atol=0.1)
    assert not DiT(CONFIG)(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1])).any()


def awake(config: DiTConfig = CONFIG) -> DiT:
    """A transformer with random weights everywhere."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_blocks_equal_torch():
    """Attention is torch's MultiheadAttention with the same weights."""
    block, x = awake().blocks[0], torch.randn(2, 5, 16)
    oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    oracle.in_proj_weight.copy_(block.qkv.weight)
    oracle.in_proj_bias.copy_(block.qkv.bias)
    oracle.out_proj.load_state_dict(block.proj.state_dict())
    torch.testing.assert_close(block.attention(x), oracle(x, x, x)[0])


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_patches_come_back_in_place(patch):
    """A head that inverts the patch embedding returns the input: pixels do not change places."""
    model = DiT(DiTConfig((3, 4, 6), 0, patch, width=16, depth=1, heads=2))
    model.positions.zero_()
    weight = torch.nn.init.orthogonal_(torch.empty(16, 3 * patch**2))
    model.patchify.weight.copy_(weight.view_as(model.patchify.weight))
    model.patchify.bias.zero_()
    model.head.weight.copy_(weight.T)
    x = torch.randn(2, 3, 4, 6)
    tokens = model.patchify(x).flatten(2).transpose(1, 2)             # of which the head sees a layer norm
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
    out = as_tokens(model(x, torch.rand(2), torch.zeros(2, dtype=torch.int64)), patch)
    torch.testing.assert_close(out * (variance + 1e-6).sqrt() + mean * weight.sum(0), as_tokens(x, patch))


def as_tokens(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches of x (B, Z, h, w), each as one row -> (B, N, Z p^2)."""
    return torch.nn.functional.unfold(x, patch, stride=patch).transpose(1, 2)


@torch.no_grad()
def test_time_label_and_position_matter():
    """The prediction depends on t and label, -1 is a class of its own, and tokens know their places."""
    model, x = awake(), torch.randn(1, 3, 4, 4).expand(5, -1, -1, -1)
    out = model(x, torch.tensor([0.5, 0.6, 0.5, 0.5, 0.5]), torch.tensor([0, 0, 1, -1, 0]))
    assert torch.allclose(out[0], out[4])
    for i, j in ((0, 1), (0, 2), (0, 3), (2, 3)):
        assert not torch.allclose(out[i], out[j], atol=1e-3)
    t, label = torch.tensor([0.5]), torch.tensor([0])
    moved = model(x[:1].roll(2, dims=-1), t, label).roll(-2, dims=-1)
    assert not torch.allclose(moved, out[:1], atol=1e-3)
    model.positions.zero_()
    moved = model(x[:1].roll(2, dims=-1), t, label).roll(-2, dims=-1)
    torch.testing.assert_close(moved, model(x[:1], t, label))


def test_positions_differ():
    """Rows and columns: each token has another embedding, and a cosine of 1 stands at the origin."""
    grid = diffusion.grid_positions(3, 5, 8)
    assert grid.shape == (15, 8) and len(grid.unique(dim=0)) == 15
    assert torch.equal(grid[0], torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]))
    third = [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]         # row 1, width 4
    torch.testing.assert_close(grid[5, :4], torch.tensor(third))


def test_average_of_weights():
    """decay 0.75: a quarter of the way from the average to the weights."""
    model, ema = DiT(CONFIG), DiT(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 8.0)
    for parameter in ema.parameters():
        torch.nn.init.constant_(parameter, 4.0)
    diffusion.update(ema, model, decay=0.75)
    assert all(torch.equal(p, torch.full_like(p, 5.0)) for p in ema.parameters())


# ---- from outside ------------------------------------------------------------------------------------------


def run(folder: Path, flags: str) -> dict:
    call(SCRIPT, folder, f"{SMALL} {flags}")
    return torch.load(folder / flags.split("--out ")[-1].split()[0] / "dit.pt", weights_only=True)


def test_end_to_end(folder, capsys):
    """A PNG that is not blank: the decoded, un-scaled samples of the average in dit.pt; as in the docs."""
    state = run(folder, "--patch 1 --steps 12 --save-every 6 --lr 1e-2 --ema-decay 0.5 --seed 3 --out dit")
    assert state["step"] == 12 and state["config"]["classes"] == 2
    vae, saved = checkpoint.load_model(folder / "toy/ckpt.pt")
    scaling = LatentScaling.of(saved["latents"], per_channel=True)
    model = DiT(DiTConfig(**state["config"]))
    model.load_state_dict(state["ema"])
    z = scaling.unscale(diffusion.sample(model, torch.tensor([0, 1, 0]), steps=2, seed=3))
    stored = pictures.read_latents(folder / "dit/samples.pt", vae)
    torch.testing.assert_close(stored.z, z)
    sheet = np.array(Image.open(folder / "dit/samples.png"))
    assert sheet.shape == (36, 104, 3)                                # 3 pictures of 32 px, gaps of 2
    first = ((vae.decode(z)[0] + 1) * 127.5).clamp(0, 255).detach().permute(1, 2, 0)
    np.testing.assert_allclose(sheet[2:34, 2:34], first, atol=1)
    assert sheet[2:34, 2:34].std() > 5
    said = capsys.readouterr().out
    assert "step 6: loss " in said and "step 12: loss " in said and "2 images, 2 classes" in said
    call("latents", folder, "decode toy/ckpt.pt dit/samples.pt --out big --device cpu")
    np.testing.assert_array_equal(np.array(Image.open(folder / "big/samples-0.png")), sheet[2:34, 2:34])


def test_two_latents_are_learned(folder, capsys):
    """The loss starts at 2, the mean square of eps - x_0, and falls below pi / 2.

    pi / 2 is the mean over t of 1 / ((1 - t)^2 + t^2), the least loss of a model that knows only the mean and
    the deviation of the data.
    """
    run(folder, "--patch 1 --width 32 --steps 300 --save-every 10 --lr 3e-3 --times uniform --out dit")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert 1.5 < losses[0] < 2.5 and np.mean(losses[-5:]) < math.pi / 2


def test_seed(folder):
    """The same seed gives the same weights and samples bit for bit, with loader processes too."""
    one, two, three = (run(folder, f"--steps 3 --lr 1e-2 --ema-decay 0 {flags}")
                       for flags in ("--out a", "--num-workers 1 --out b", "--seed 1 --out c"))
    assert equal(one, two) and not equal(one["ema"], three["ema"])
    sheets = [(folder / name / "samples.png").read_bytes() for name in "abc"]
    assert sheets[0] == sheets[1] != sheets[2]


def test_without_classes(tmp_path):
    """Pictures without folders have no label; the transformer then has one row for all."""
    encode(tmp_path, ["0.png", "1.png"])
    state = run(tmp_path, "--steps 1 --out dit")
    assert state["config"]["classes"] == 0 and state["ema"]["label.weight"].shape == (1, 16)


@pytest.mark.parametrize("changed", [False, True])
def test_note_on_other_weights(folder, capsys, changed):
    """A decoder that was trained further is accepted, with a note; the weights of the cache give none."""
    state = checkpoint.load(folder / "toy/ckpt.pt")
    state["model"]["decoder.conv_out.bias"] += changed
    checkpoint.write(folder / "toy/ckpt.pt", state)
    run(folder, "--steps 1 --out dit")
    assert ("was not encoded by the weights of toy/ckpt.pt" in capsys.readouterr().out) == changed


def damage(folder: Path, what: str) -> None:
    if what == "channels":
        state = checkpoint.load(folder / "toy/ckpt.pt")
        toy(folder / "toy", latent_channels=4)
        other = checkpoint.load(folder / "toy/ckpt.pt")
        other["latents"] = copy.deepcopy(state["latents"])
        checkpoint.write(folder / "toy/ckpt.pt", other)
    elif what == "statistics":
        toy(folder / "toy")
    elif what == "out":
        (folder / "dit").mkdir()
    elif what == "cache":
        shutil.rmtree(folder / "cache")
        write_images(folder / "cache", ["0.png"])


@pytest.mark.parametrize("what, flags, line", [
    ("cache", "", "cache/index.json is damaged or missing"),
    ("channels", "", "cache has 3 latent channels and toy/ckpt.pt has 4: name the checkpoint that encoded"),
    ("statistics", "", "compute them with latents.py stats"),
    ("out", "", "dit exists: choose another --out"),
    ("", "--width 18", "--width 18 must be a multiple of 4 and of --heads 2"),
    ("", "--heads 3", "--width 16 must be a multiple of 4 and of --heads 3"),
    ("", "--patch 4", "invalid choice: 4"),
    ("", "--ema-decay 1", "--ema-decay must be below 1, got 1.0"),
])
def test_wrong_input(folder, refused, what, flags, line):
    """One line with the value received, and nothing written."""
    damage(folder, what)
    assert line in refused(SCRIPT, f"{SMALL} {flags}")


def test_odd_latents():
    """Patches of 2 need even sides."""
    with pytest.raises(ValueError, match=r"--patch 2 does not divide latents of \(3, 4, 5\)"):
        DiTConfig((3, 4, 5), 0, 2, 16, 1, 2)


def test_torchrun(folder, refused, monkeypatch):
    """More than one process is refused."""
    monkeypatch.setattr("runtime.distributed.world_size", lambda: 2)
    assert "runs in one process, without torchrun" in refused(SCRIPT, SMALL)
