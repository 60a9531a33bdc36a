"""Loss terms from the paper's comparisons and from related work that LiteVAE itself does not use.

Sources: ESRGAN (Wang et al. 2018) for the VGG term, LiteVAE Table 14; LDL (Liang et al. 2022), LiteVAE
Table 15; Transfusion's VAE for the identity term on MoCo v2. As in losses.py, images x and recon are (B, C,
H, W) in [-1, 1]; every term is a mean and computes in fp32, also under autocast.

What differs is noted at each term.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG19_Weights, resnet50, vgg19

from losses import l1_loss, l2_loss
from runtime.weights import load_features, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetNormalise(nn.Module):
    """(B, 1 or 3, H, W) in [-1, 1] -> (B, 3, H, W), fp32, normalised as torchvision's classifiers expect."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x.float() + 1) / 2 - self.mean) / self.std


# ----------------------------------------------------------------------------
# VGG19 before activation


class VGG19Loss(nn.Module):
    """mean |f(x) - f(recon)|, where f is the output of VGG19's conv5_4 before its ReLU (ESRGAN, Sec. 3.2).

    Frozen. Sides are at least 16 pixels; a single channel is repeated three times. Images are normalised as
    for ImageNet, features are not rescaled, and the mean is over images, channels and positions. `weights`
    comes from load_vgg19.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):
            features = vgg19().features
        features.load_state_dict(weights, assign=True)
        self.features = features[:35]                         # 34 is conv5_4, 35 its ReLU
        self.normalise = ImageNetNormalise()
        self.requires_grad_(False)

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = self.features(self.normalise(x))
            return l1_loss(target, self.features(self.normalise(recon)))


def load_vgg19(file: str | None = None, timeout: float = 30.0) -> dict[str, Tensor]:
    """VGG19's convolution weights, "0.weight" to "34.bias"; otherwise like runtime.weights.load_vgg."""
    need = "the VGG19 loss needs VGG19"
    advice = "pass --vgg19-file FILE, or train without the VGG19 loss: --vgg19-weight 0"
    return load_features(vgg19, VGG19_Weights.IMAGENET1K_V1.url, file, timeout, need, advice)


# ----------------------------------------------------------------------------
# LDL


def ldl_loss(x: Tensor, recon: Tensor, recon_ema: Tensor) -> Tensor:
    """mean |M x - M recon| with images in [0, 1] and the artifact map M (Liang et al. 2022, Sec. 3)."""
    x, recon, recon_ema = (image.float() / 2 for image in (x, recon, recon_ema))
    return (artifact_map(x, recon, recon_ema) * (x - recon).abs()).mean()


@torch.no_grad()
def artifact_map(x: Tensor, recon: Tensor, recon_ema: Tensor) -> Tensor:
    """M = var(r)^(1/5) * var_7x7(r), and 0 where r < r_ema: three (B, C, H, W) -> (B, 1, H, W).

    r = |x - recon| summed over channels; r_ema is the same for the EMA model's reconstruction. var(r) is over
    the image, var_7x7 is around each pixel with reflected borders; both are unbiased. Scaling the images by s
    scales M by s^2.4, so the size of the loss depends on the range of the images, here [0, 1].
    """
    # differs from the paper: no gradient passes through M, since it would be infinite for a perfect image
    r, r_ema = ((x - image).abs().sum(dim=1, keepdim=True) for image in (recon, recon_ema))
    patches = F.unfold(F.pad(r, (3, 3, 3, 3), mode="reflect"), 7)                  # (B, 49, H W)
    local = patches.var(dim=1).view_as(r)
    overall = r.var(dim=(1, 2, 3), keepdim=True) ** 0.2
    return overall * local * (r >= r_ema)


# ----------------------------------------------------------------------------
# identity


MOCO_MD5 = "a04e12f8b0e44fdcac1fb4e06f33727b"   # the file that Transfusion's VAE uses
MOCO_PREFIX = "module.encoder_q."


def moco_net() -> nn.Module:
    """MoCo v2's query encoder: ResNet-50 with the head 2048 -> 2048, ReLU, -> 128 (27,966,656 parameters)."""
    net = resnet50(num_classes=128)
    net.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), net.fc)
    return net


class IdentityLoss(nn.Module):
    """mean (e(x) - e(recon))^2, where e is MoCo v2's head, 128 outputs, not normalised (Transfusion's VAE).

    Images are resized bicubically to 224 x 224 and normalised as for ImageNet. Frozen, and always in eval
    mode, so batch norm uses its stored statistics. `weights` comes from load_moco.
    """

    # differs from Transfusion's VAE: there batch norm used batch statistics, by an accident of its trainer

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.net = moco_net()
        self.net.load_state_dict(weights, assign=True)
        self.normalise = ImageNetNormalise()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "IdentityLoss":
        return super().train(False)

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = self.embed(x)
            return l2_loss(target, self.embed(recon))

    def embed(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) -> (B, 128)."""
        # both flags are as in the source; together they only change the scale, to (H - 1) / 223
        x = F.interpolate(x.float(), (224, 224), mode="bicubic", align_corners=True, antialias=True)
        return self.net(self.normalise(x))


def load_moco(file: str | None) -> tuple[dict[str, Tensor], str]:
    """Load the query encoder of a MoCo v2 checkpoint, with the keys of `moco_net`, and the file's md5.

    Reads {"state_dict": {"module.encoder_q.conv1.weight": ...}} and ignores the key encoder and the queue.
    Raises a one-line ValueError that says what is wrong with the file and what to do.
    """
    try:
        if not file:
            raise ValueError("no file given")
        with open(file, "rb") as opened:
            md5 = hashlib.file_digest(opened, "md5").hexdigest()
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "state_dict" not in state:
            raise ValueError("it has no entry state_dict, so it is not a checkpoint of MoCo's training")
        weights = {name.removeprefix(MOCO_PREFIX): tensor for name, tensor in state["state_dict"].items()
                   if name.startswith(MOCO_PREFIX)}
        check_moco(weights)
    except Exception as error:      # a wrong file makes torch raise almost any exception
        raise ValueError(
            f"the identity loss needs MoCo v2 weights and could not load {file or 'them'} "
            f"({one_line(error)}): pass moco_v2_800ep_pretrain.pth.tar of facebookresearch/moco as "
            "--moco-file FILE, or train without the identity loss: --identity-weight 0"
        ) from error
    return weights, md5


def check_moco(weights: dict[str, Tensor]) -> None:
    """Raise ValueError with the first two tensors in which `weights` differ from `moco_net`, if any."""
    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in moco_net().state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{MOCO_PREFIX}{name} is {theirs.get(name, 'absent')}, expected {own.get(name, 'absent')}"
             for name in dict.fromkeys([*own, *theirs]) if own.get(name) != theirs.get(name)]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit: " + "; ".join(wrong[:2]))
