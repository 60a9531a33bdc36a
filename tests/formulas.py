"""The inputs of known_answers.json: images, noise and network weights made by integer formulas."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision

from runtime import weights
from variants.build import build
from variants.sizes import PRESETS

VECTORS = Path(__file__).parent / "known_answers.json"
NETWORKS = {
    "vgg": torchvision.models.vgg16,
    "alex": torchvision.models.alexnet,
    "squeeze": torchvision.models.squeezenet1_1,
    # pytorch-fid's changes to it leave every key and shape alone
    "inception": lambda: torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False),
}


def known_answers() -> dict:
    """Facts measured on the peers' own code, and on exact formulas."""
    return json.loads(VECTORS.read_text())


def hash32(i: np.ndarray, seed: int) -> np.ndarray:
    mask = np.uint64(0xFFFFFFFF)
    h = (i.astype(np.uint64) * 2654435761 + seed * 2246822519) & mask
    h = (h ^ (h >> 15)) * 2246822519 & mask
    h = (h ^ (h >> 13)) * 3266489917 & mask
    return h ^ (h >> 16)


def u01(count: int, seed: int) -> np.ndarray:
    return hash32(np.arange(count), seed) / 2.0**32


def image_a(height: int, width: int) -> np.ndarray:
    y, x, c = np.mgrid[:height, :width, :3]
    return ((4 * x + 3 * y + 40 * c + (x * x + 2 * y * y) // 16) % 256).astype(np.uint8)


def image_b(height: int, width: int, amplitude: int = 16, seed: int = 1) -> np.ndarray:
    index = np.arange(height * width * 3).reshape(height, width, 3)
    noise = (hash32(index, seed) % (2 * amplitude + 1)).astype(np.int64) - amplitude
    return (image_a(height, width) + noise).clip(0, 255).astype(np.uint8)


def image_c(height: int, width: int) -> np.ndarray:
    padded = np.pad(image_a(height, width).astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    return (total // 9).astype(np.uint8)


def tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def formula_state(name: str) -> dict[str, torch.Tensor]:
    """The checkpoint of a network, every value a formula of its key and index."""
    with torch.device("meta"):
        shapes = NETWORKS[name]().state_dict()
    return {key: formula_weight(key, value) for key, value in shapes.items()}


def formula_weight(key: str, like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    q = u01(like.numel(), zlib.crc32(key.encode()))
    if like.ndim >= 2:
        value = (2 * q - 1) * np.sqrt(6 / like[0].numel())
    elif key.endswith("running_var"):
        value = 0.75 + 0.5 * q
    elif key.endswith("running_mean"):
        value = 0.1 * (2 * q - 1)
    else:
        scale, offset = (0.1, 1) if ".bn.weight" in key else (0.05, 0)
        value = offset + scale * (2 * q - 1)
    return torch.from_numpy(value.astype(np.float32)).view(like.shape)


def write_formula_file(name: str, torch_home: Path) -> Path:
    """The formula's weights under the name that the real loader looks for below TORCH_HOME."""
    path = torch_home / "hub" / "checkpoints" / Path(weights.URLS[name]).name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(formula_state(name), path)
    return path


def open_state(scale: str = "s", **options) -> dict[str, torch.Tensor]:
    """Random weights under open-LiteVAE's names, behind a small decoder."""
    torch.manual_seed(0)
    net = build(replace(PRESETS[f"open-litevae-{scale}"], decoder_channels=4, **options))
    words = {"encoder": "residual_conv", "decoder": "nin_shortcut"}
    state = {key.replace("skip", words[key[:7]]): tensor for key, tensor in net.state_dict().items()}
    return {key: tensor.reshape(1) if key.endswith("gain") else tensor for key, tensor in state.items()}
