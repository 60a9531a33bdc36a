"""Run: python -m pytest tests/test_optional_losses.py. Oracles: numbers by hand, scipy, numpy."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import generic_filter
from torch import Tensor, nn
from torchvision.models import resnet50

import losses
from variants import perceptual
from variants.perceptual import (
    IdentityLoss,
    VGG19Loss,
    artifact_map,
    ldl_loss,
    load_moco,
    load_vgg19,
    moco_net,
)

MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
STD = np.array([0.229, 0.224, 0.225])[:, None, None]


PREFIX = "module.encoder_q."


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """An image in [-1, 1] and a noisy copy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator) * 2 - 1
    return x, x + 0.2 * torch.randn(shape, generator=generator)


def wave(*shape: int, phase: float, size: float) -> Tensor:
    """A formula for weights: size * cos(i^2 / 7 + phase), which no two entries in a row share."""
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (size * torch.cos(i.square() / 7 + phase)).float().view(shape)


# ------------------------------------------------------------------------------------------------------------
# VGG19 before activation


STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))     # VGG19's convolutions; a pooling after each


def vgg19_weights() -> dict[str, Tensor]:
    """features.N.* of torchvision's file, by a formula."""
    weights, layer, channels = {}, 0, 3
    for width, convs in STAGES:
        for _ in range(convs):
            size = (4 / (9 * channels)) ** 0.5                 # cos has half the square of its size
            weights[f"features.{layer}.weight"] = wave(width, channels, 3, 3, phase=layer, size=size)
            weights[f"features.{layer}.bias"] = wave(width, phase=layer + 0.5, size=0.1)
            layer, channels = layer + 2, width
        layer += 1
    return weights


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(vgg19_weights() | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def vgg(vgg_file) -> VGG19Loss:
    return VGG19Loss(load_vgg19(str(vgg_file)))


def conv5_4(x: Tensor) -> Tensor:
    """Sixteen convolutions, a ReLU after each but the last, a pooling between stages; images by numpy."""
    weights, layer = vgg19_weights(), 0
    x = torch.from_numpy(((x.numpy() + 1.0) / 2 - MEAN) / STD).float()
    for stage, (_, convs) in enumerate(STAGES):
        x = F.max_pool2d(x, 2) if stage else x
        for _ in range(convs):
            x = F.relu(x) if layer else x
            x = F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], padding=1)
            layer += 2
        layer += 1
        x = F.relu(x) if stage < 4 else x
    return x


def test_vgg19_equals_its_layers(vgg):
    """The L1 mean between what plain convolutions, ReLUs and poolings give in front of the last ReLU."""
    x, recon = pair(2, 3, 32, 48)
    a, b = conv5_4(x), conv5_4(recon)
    assert a.shape == (2, 512, 2, 3) and a.min() < 0 < a.max()          # before the ReLU
    expected = (a.double() - b.double()).abs().mean().item()
    assert vgg(x, recon).item() == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert vgg(x, x).item() == 0.0


def test_vgg19_is_a_mean_and_takes_grey_images(vgg):
    """The same batch twice leaves it as it is; one channel counts three times."""
    x, recon = pair(2, 1, 16, 16)
    grey = vgg(x, recon).item()
    assert vgg(torch.cat([x, x]), torch.cat([recon, recon])).item() == pytest.approx(grey, rel=1e-5)
    assert vgg(x.repeat(1, 3, 1, 1), recon.repeat(1, 3, 1, 1)).item() == pytest.approx(grey, rel=1e-6)


def test_vgg19_gradient(vgg):
    """It reaches every pixel of recon and nothing else; the network is frozen and keeps no gradient."""
    x, recon = pair(1, 3, 32, 32)
    x.requires_grad_()
    recon.requires_grad_()
    vgg(x, recon).backward()
    assert recon.grad.isfinite().all() and (recon.grad != 0).float().mean() > 0.99 and x.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in vgg.parameters())


@pytest.mark.parametrize("content", ["missing", "VGG16", "garbage"])
def test_bad_vgg19_files_are_one_clear_line(content, tmp_path):
    """A ValueError in one line that names the file and both flags; VGG16's weights are refused."""
    path = tmp_path / "vgg.pth"
    if content == "garbage":
        path.write_bytes(b"<html>404</html>")
    elif content == "VGG16":
        layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
        names = [f"features.{i}.{kind}" for i in layers for kind in ("weight", "bias")]
        torch.save({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(ValueError) as error:
        load_vgg19(str(path))
    text = str(error.value)
    assert "\n" not in text and text.startswith("the VGG19 loss needs VGG19 weights and could not load ")
    assert all(words in text for words in (str(path), "--vgg19-file FILE", "--vgg19-weight 0"))


def test_vgg19_comes_from_the_hub(tmp_path, monkeypatch, vgg_file):
    """Without a file: torchvision's address, its hash checked, into the hub's cache, as for LPIPS."""
    def fetch(url: str, path: str, hash_prefix: str) -> None:
        assert url.endswith("/vgg19-dcbb9e9d.pth") and hash_prefix == "dcbb9e9d"
        Path(path).write_bytes(vgg_file.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert torch.equal(load_vgg19()["34.bias"], vgg19_weights()["features.34.bias"])


# ------------------------------------------------------------------------------------------------------------
# LDL


def test_ldl_by_hand():
    """One pixel is off by 1, 1/2 in [0, 1]: var(r) = 1/4 / 256, var_7x7 = 1/4 / 49, loss their M / 2 / 256.

    n values with a single e among zeros have the unbiased variance (e^2 - e^2 / n) / (n - 1) = e^2 / n.
    """
    x = torch.zeros(1, 1, 16, 16)
    recon = x.clone()
    recon[..., 8, 7] = 1.0
    expected = (0.25 / 256) ** 0.2 * 0.25 / 49 * 0.5 / 256
    assert ldl_loss(x, recon, x).item() == pytest.approx(expected, rel=1e-5)
    assert ldl_loss(x, recon, recon).item() == pytest.approx(expected, rel=1e-5)      # a tie counts
    assert ldl_loss(x, recon, 1.1 * recon).item() == 0.0                              # the EMA model is worse


def test_ldl_equals_scipy():
    """The map by scipy's sliding variance with mirrored borders, cut where the EMA model is worse."""
    x, recon = (t.double() for t in pair(2, 3, 12, 9))
    recon_ema = x + 0.8 * (recon - x).roll(3, dims=3)
    expected = []
    for a, b, c in zip(x.numpy() / 2, recon.numpy() / 2, recon_ema.numpy() / 2, strict=True):
        r, r_ema = np.abs(a - b).sum(0), np.abs(a - c).sum(0)
        local = generic_filter(r, lambda window: window.var(ddof=1), size=7, mode="mirror")
        m = r.var(ddof=1) ** 0.2 * local * (r >= r_ema)
        assert 0.2 < (m > 0).mean() < 0.8
        expected.append(np.abs(m * a - m * b))
    assert ldl_loss(x, recon, recon_ema).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_ldl_gradient():
    """M sign(recon - x) over the number of values and the two of [0, 1]; 0 for a perfect image, never NaN."""
    x, recon = pair(2, 3, 12, 12)
    recon_ema = x + 0.8 * (recon - x).roll(3, dims=3)
    recon.requires_grad_()
    ldl_loss(x, recon, recon_ema).backward()
    with torch.no_grad():
        m = artifact_map(x / 2, recon / 2, recon_ema / 2)
        torch.testing.assert_close(recon.grad, m * (recon - x).sign() / (2 * x.numel()))
    assert m.shape == (2, 1, 12, 12) and recon.grad.any()
    same = x.clone().requires_grad_()
    ldl_loss(x, same, x).backward()
    assert not same.grad.any()


# ------------------------------------------------------------------------------------------------------------
# identity


def moco_state() -> dict[str, Tensor]:
    """A MoCo v2 checkpoint's state_dict under its real names, by a formula."""
    with torch.device("meta"):
        net = resnet50(num_classes=128)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    bias, weight = shapes.pop("fc.bias"), shapes.pop("fc.weight")
    shapes |= {"fc.0.weight": (2048, 2048), "fc.0.bias": (2048,), "fc.2.weight": weight, "fc.2.bias": bias}
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(5)
        elif name.endswith("running_var"):
            value = wave(*shape, phase=i, size=0.5) + 1
        elif len(shape) > 1:
            value = wave(*shape, phase=i, size=(4 / np.prod(shape[1:])) ** 0.5)
        else:
            value = wave(*shape, phase=i, size=0.3) + (0.5 if name.endswith("weight") else 0)
        state[PREFIX + name] = value
    return state | {"module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7), "module.queue": torch.zeros(8),
                    "module.queue_ptr": torch.zeros(1)}


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": moco_state()}, path)
    return path


@pytest.fixture(scope="module")
def identity(moco_file) -> IdentityLoss:
    return IdentityLoss(load_moco(str(moco_file))[0])


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2, which antialiased resizing uses."""
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def resize_matrix(size: int) -> np.ndarray:
    """(224, size): centres at scale (i + 1/2), the kernel stretched by the scale where it shrinks."""
    scale = (size - 1) / 223
    centres = scale * (np.arange(224) + 0.5)
    weights = cubic((np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def embedding(x: Tensor) -> np.ndarray:
    """torchvision's ResNet-50 without its head on images resized by two matrices; MoCo's head in numpy."""
    state = {name.removeprefix(PREFIX): value for name, value in moco_state().items()
             if name.startswith(PREFIX)}
    net = resnet50()
    net.fc = nn.Identity()
    net.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    rows, columns = resize_matrix(x.shape[2]), resize_matrix(x.shape[3])
    resized = ((rows @ x.double().numpy() @ columns.T + 1) / 2 - MEAN) / STD
    with torch.no_grad():
        features = net.eval()(torch.from_numpy(resized).float()).double().numpy()
    head = {name: value.double().numpy() for name, value in state.items() if name.startswith("fc.")}
    hidden = np.maximum(features @ head["fc.0.weight"].T + head["fc.0.bias"], 0)
    return hidden @ head["fc.2.weight"].T + head["fc.2.bias"]


def test_moco_parameters():
    """ResNet-50 without its classifier 23,508,032, with MoCo's head 27,966,656."""
    with torch.device("meta"):
        net = moco_net()
    head = sum(p.numel() for p in net.fc.parameters())
    assert sum(p.numel() for p in net.parameters()) == 27_966_656 == 23_508_032 + head


@pytest.mark.parametrize("size", [(64, 48), (256, 320)], ids=str)
def test_identity_equals_numpy(identity, size):
    """Mean square over 128 outputs, not normalised, of images resized larger or smaller by numpy."""
    x, recon = pair(1, 3, *size)
    x, recon = F.avg_pool2d(x, 5, 1, 2), F.avg_pool2d(recon, 5, 1, 2)
    expected = np.square(embedding(x) - embedding(recon)).mean()
    assert identity(x, recon).item() == pytest.approx(expected, rel=2e-4) and expected > 1e-6
    assert identity(x, x).item() == 0.0


def test_identity_stays_frozen_in_eval_mode(identity):
    """parent.train() leaves batch norm on its stored statistics: no image's embedding knows another."""
    nn.ModuleList([identity]).train()
    assert not any(module.training for module in identity.modules())
    assert not any(parameter.requires_grad for parameter in identity.parameters())
    tracked = identity.net.bn1.running_mean.clone()
    x, recon = pair(2, 1, 32, 32)
    together = identity(x, recon).item()
    apart = [identity(x[i : i + 1], recon[i : i + 1]).item() for i in range(2)]
    assert together == pytest.approx(np.mean(apart), rel=1e-4)
    assert torch.equal(identity.net.bn1.running_mean, tracked)


def test_identity_gradient(identity):
    """It reaches every pixel of recon, through the resizing, and leaves x alone."""
    x, recon = pair(1, 3, 32, 32)
    x.requires_grad_()
    recon.requires_grad_()
    identity(x, recon).backward()
    assert recon.grad.isfinite().all() and (recon.grad != 0).float().mean() > 0.99 and x.grad is None


def test_load_moco_reads_the_query_encoder(moco_file):
    """Keys without the prefix, both layers of the head, and the file's md5; nothing of the key encoder."""
    weights, md5 = load_moco(str(moco_file))
    assert md5 == hashlib.md5(moco_file.read_bytes()).hexdigest() != perceptual.MOCO_MD5
    assert weights.keys() == moco_net().state_dict().keys() and {"fc.0.weight", "fc.2.bias"} <= weights.keys()
    assert torch.equal(weights["conv1.weight"], moco_state()[PREFIX + "conv1.weight"])


def moco_file_with(change: str) -> dict:
    """A checkpoint of the right names and shapes but for one thing; its tensors share one zero."""
    with torch.device("meta"):
        shapes = {PREFIX + name: tensor.shape for name, tensor in moco_net().state_dict().items()}
    state = {name: torch.tensor(0.0).expand(shape) for name, shape in shapes.items()}
    if change == "MoCo v1":
        state = {name: value for name, value in state.items() if not name.startswith(PREFIX + "fc.")}
        state[PREFIX + "fc.weight"] = torch.zeros(128, 2048)
    elif change == "a wider conv1":
        state[PREFIX + "conv1.weight"] = torch.zeros(128, 3, 7, 7)
    elif change == "supervised":
        return {name.removeprefix(PREFIX): value for name, value in state.items()}
    elif change == "another network":
        state = {"encoder.conv_in.weight": torch.zeros(3)}
    return {"state_dict": state}


BAD_FILES = {
    "MoCo v1": f"5 tensors do not fit: {PREFIX}fc.0.weight is absent, expected (2048, 2048); {PREFIX}fc.0.b",
    "a wider conv1": f"1 tensors do not fit: {PREFIX}conv1.weight is (128, 3, 7, 7), expected (64, 3, 7, 7)",
    "supervised": "it has no entry state_dict",
    "another network": f"322 tensors do not fit: {PREFIX}conv1.weight is absent, expected (64, 3, 7, 7); ",
    "missing": "No such file or directory",
    "garbage": "",
    "None": "no file given",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_moco_files_are_one_clear_line(content, tmp_path):
    """A ValueError in one line: the file, the first tensors that do not fit, and both flags."""
    path = tmp_path / "moco.pth.tar"
    if content == "garbage":
        path.write_bytes(b"<html>404</html>")
    elif content not in ("missing", "None"):
        torch.save(moco_file_with(content), path)
    with pytest.raises(ValueError) as error:
        load_moco(None if content == "None" else str(path))
    text = str(error.value)
    assert "\n" not in text and text.startswith("the identity loss needs MoCo v2 weights and could not load ")
    assert BAD_FILES[content] in text and (content == "None" or str(path) in text)
    assert all(words in text for words in ("--moco-file FILE", "--identity-weight 0"))


# ------------------------------------------------------------------------------------------------------------
# what holds for all


def test_terms_are_fp32_under_autocast(vgg, identity):
    """bf16 autocast changes no bit of any term, on a recon in bf16 as a network in autocast returns it."""
    x, recon = pair(1, 3, 16, 16)
    recon = recon.bfloat16()
    terms = (vgg, identity, lambda x, recon: ldl_loss(x, recon, 0.5 * recon))
    outside = [term(x, recon) for term in terms]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [term(x, recon) for term in terms]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_logistic_loss_by_hand():
    """The paper's other adversarial loss: log(1 + e^-1) and log(1 + e^2), halved, and log(1 + e^-2)."""
    real, fake = (torch.tensor([1.0]),), (torch.tensor([2.0]),)
    assert losses.disc_loss("logistic", real, fake).item() == pytest.approx((0.31326169 + 2.12692801) / 2)
    assert losses.adv_loss("logistic", fake).item() == pytest.approx(0.12692801)
