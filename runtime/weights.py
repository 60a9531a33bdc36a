"""Published network weights: finding a file, downloading it once, and its sha256.

vgg, alex and squeeze are torchvision's ImageNet classifiers, which LPIPS builds on; inception is the port of
the 2015 graph that pytorch-fid and clean-fid share. A file is read from the given path, else from torch hub's
cache, in checkpoints/ of $TORCH_HOME/hub, else $XDG_CACHE_HOME/torch/hub, else ~/.cache/torch/hub. A file
missing from the cache is downloaded atomically, and its hash is checked.
"""

import hashlib
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cleanfid.inception_pytorch import FID_WEIGHTS_URL
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights, vgg16

URLS = {
    "vgg": VGG16_Weights.IMAGENET1K_V1.url,
    "alex": AlexNet_Weights.IMAGENET1K_V1.url,
    "squeeze": SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
    "inception": FID_WEIGHTS_URL,
}


class Weights(NamedTuple):
    """The tensors of a file, its path and its sha256; published: the hash matches the published file name."""

    state: dict[str, Tensor]
    path: str
    sha256: str
    published: bool


def load(name: str, file: str | None = None) -> Weights:
    """Loads the weights `name` of URLS and their hash; ValueError, one line with the path, if that fails."""
    path = find(URLS[name], file)
    try:
        state, digest = read(URLS[name], file), sha256(path)
    except Exception as error:      # torch raises almost any type on a wrong file
        raise ValueError(f"cannot load {path} ({one_line(error)})") from error
    return Weights(state, str(path), digest, digest.startswith(hash_prefix(URLS[name])))


def find(url: str, file: str | None = None) -> Path:
    """Local path of the weights published at `url`."""
    return Path(file or Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1])


def read(url: str, file: str | None = None, timeout: float = 30.0) -> dict[str, Tensor]:
    """Reads the tensors of `file`, else of the cached file, which is downloaded if missing.

    Errors are not caught. torchvision's classifiers lose their last layers and the prefix "features." (keys
    "0.weight", ...).
    """
    path = find(url, file)
    if not file and not path.exists():
        download(url, path, timeout)
    state = torch.load(path, map_location="cpu", weights_only=True)
    kept = [key for key in state if not key.startswith("classifier.")]
    return {key.removeprefix("features."): state[key].clone() for key in kept}    # copies, not views


def download(url: str, path: Path, timeout: float) -> None:
    """Downloads url to path atomically and checks the hash; torch hub itself has no timeout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix(url))
    finally:
        socket.setdefaulttimeout(previous)


def hash_prefix(url: str) -> str:
    """The first digits of the sha256, found at the end of each of these file names."""
    return Path(url).stem.rsplit("-", 1)[1]


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError | EOFError | KeyError):        # what torch.load makes of text
        return "not a file of torch.save"
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_vgg(vgg_file: str | None = None, timeout: float = 30.0) -> dict[str, Tensor]:
    """VGG16's convolution weights, keys "0.weight" to "28.bias".

    They are read from vgg_file (torchvision's vgg16 file, or a features-only one of 59 MB), else from torch
    hub's cache, else downloaded there. If that fails, raises ValueError with one line that gives the path and
    a remedy.
    """
    need, advice = "LPIPS needs VGG16", "pass --vgg-file FILE, or train without LPIPS: --lpips-weight 0"
    return load_features(vgg16, URLS["vgg"], vgg_file, timeout, need, advice)


def load_features(build: Callable[[], nn.Module], url: str, file: str | None, timeout: float,
                  need: str, advice: str) -> dict[str, Tensor]:
    """Loads torchvision's weights of build().features; `file`, cache and errors as in `load_vgg`."""
    path = find(url, file)
    try:
        with torch.device("meta"):
            net = build().features
        net.load_state_dict(read(url, file, timeout), assign=True)
    except Exception as error:      # torch raises almost any type on a wrong file
        raise ValueError(
            f"{need} weights and could not load {path} ({one_line(error)}): "
            f"{'' if file else f'put {path.name} there, '}{advice}"
        ) from error
    return net.state_dict()
