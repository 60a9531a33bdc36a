"""The loss terms of LiteVAE training as pure functions of tensors; LPIPS is the only module.

Sources: LiteVAE (arXiv 2405.14477, Sec. 4.3, App. G) for the wavelet and Gaussian terms, LDM for L1 + LPIPS
+ KL. Images x and recon are (B, C, H, W) in [-1, 1].

What differs: every published system has its own reductions, so weights cannot be copied without conversion.
Here reconstruction terms are means over elements, KL is a mean over latent elements, LPIPS is a mean over
images, and adversarial terms are means over logits. Every function computes in fp32, also under autocast.
"""

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelets import dwt2

# total = sum of weight * term. The paper gives the terms but no weights; each line names the source of ours.
# fmt: off
DEFAULT_WEIGHTS = {
    "l1":       1.0,      # mean over elements         LDM
    "l2":       0.0,      # mean over elements         ft-mse only
    "lpips":    1.0,      # mean over images           LDM
    "kl":       6.25e-8,  # mean over latent elements  LDM's 1e-6 on sums at n_z 12: 1e-6 * 12 h w / (3 H W)
    "wavelet":  1.0,      # mean over elements         open-LiteVAE A2 (its reduction is not published)
    "gaussian": 0.5,      # mean over elements         open-LiteVAE A2 (same)
    "disc":     0.1,      # mean over logits           ours, as in TA-TiTok and REPA-E
}
# fmt: on

CHARBONNIER_EPS = 1e-3   # ours: the paper gives none
GAUSSIAN_SIGMA = 1.0     # ours: the paper gives neither sigma nor size; 5x5, reflect padding
GAUSSIAN_TAPS = torch.arange(-2.0, 3.0).square().div(-2 * GAUSSIAN_SIGMA**2).softmax(dim=0).tolist()


# ----------------------------------------------------------------------------
# reconstruction and regularisation


def l1_loss(x: Tensor, recon: Tensor) -> Tensor:
    """mean |x - recon|."""
    return (x.float() - recon.float()).abs().mean()


def l2_loss(x: Tensor, recon: Tensor) -> Tensor:
    """mean (x - recon)^2."""
    return (x.float() - recon.float()).square().mean()


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, mean over latent elements (LDM's sum / (Z h w))."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def wavelet_loss(x: Tensor, recon: Tensor) -> Tensor:
    """Charbonnier distance between level-1 Haar details (LH, HL, HH) divided by 2 (paper Sec. 4.3, App. G).

    mean sqrt(d^2 + eps^2), which is eps, not 0, for identical images. The transform is linear, so it runs
    only once, on x - recon.
    """
    channels = x.shape[1]
    details = dwt2(x.float() - recon.float())[:, channels:] / 2
    return (details.square() + CHARBONNIER_EPS**2).sqrt().mean()


def gaussian_loss(x: Tensor, recon: Tensor) -> Tensor:
    """mean |(x - h(x)) - (recon - h(recon))| with a Gaussian blur h (paper Sec. 4.3).

    The blur is linear, so it runs only once, on x - recon.
    """
    difference = x.float() - recon.float()
    return (difference - gaussian_blur(difference)).abs().mean()


def gaussian_blur(x: Tensor) -> Tensor:
    """5x5 Gaussian blur with sigma 1 and reflect padding, fp32 (B, C, H, W)."""
    H, W = x.shape[-2:]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = sum(tap * x[..., i : i + H, :] for i, tap in enumerate(GAUSSIAN_TAPS))
    return sum(tap * x[..., i : i + W] for i, tap in enumerate(GAUSSIAN_TAPS))


# ----------------------------------------------------------------------------
# adversarial terms. A discriminator returns a tuple of logit tensors (pixel and image heads, or one patch
# map). The loss of a head is the mean over its logits; heads are averaged


def disc_loss(kind: str, logits_real: tuple[Tensor, ...], logits_fake: tuple[Tensor, ...]) -> Tensor:
    """The loss that the discriminator minimises.

    hinge:    1/2 (mean relu(1 - D(x)) + mean relu(1 + D(recon))); 1 means chance
    logistic: 1/2 (mean softplus(-D(x)) + mean softplus(D(recon))); log 2 = 0.69 means chance
    """
    penalty = {"hinge": lambda t: F.relu(1 - t), "logistic": lambda t: F.softplus(-t)}[kind]
    terms = [
        0.5 * (penalty(real.float()).mean() + penalty(-fake.float()).mean())
        for real, fake in zip(logits_real, logits_fake, strict=True)
    ]
    return sum(terms) / len(terms)


def disc_health(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Diagnostics of a discriminator from its logits: the means, their gap, and the accuracy."""
    real, fake = real.detach().float(), fake.detach().float()
    return {
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
        "logit_gap": real.mean() - fake.mean(),
        "disc_accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
    }


def adv_loss(kind: str, logits_fake: tuple[Tensor, ...]) -> Tensor:
    """The adversarial loss of the autoencoder. hinge: -mean D(recon); logistic: mean softplus(-D(recon)).

    taming and LDM use -mean D(recon) with both; here "logistic" matches the discriminator's logistic loss.
    """
    value = {"hinge": lambda t: -t, "logistic": lambda t: F.softplus(-t)}[kind]
    return sum(value(fake.float()).mean() for fake in logits_fake) / len(logits_fake)


# ----------------------------------------------------------------------------
# LPIPS


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018; the lpips package): VGG16 features, v0.1 linear weights, mean over images.

    Frozen, and always in eval mode, since its dropout would make the loss random. The VGG may run under
    autocast; `dtype` is that of its weights: stored in bf16, they give the same numbers there as if autocast
    rounded them in every call. Normalisation, differences and linear layers are fp32. Inputs are in [-1, 1],
    with 1 or 3 channels and sides of at least 16 pixels. `vgg_weights` comes from runtime.weights.load_vgg.
    """

    def __init__(self, vgg_weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # the package's slices keep torchvision's layer numbers: slice2.5.weight is features.5.weight
        own = self.lpips.net.state_dict()
        self.lpips.net.load_state_dict({name: vgg_weights[name.split(".", 1)[1]] for name in own})
        self.lpips.net.to(dtype)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(x)
        total = 0.0
        for lin, a, b in zip(self.lpips.lins, target, self.features(recon), strict=True):
            with torch.autocast(x.device.type, enabled=False):
                total = total + lin((normalise(a) - normalise(b)).square()).mean()
        return total

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lpips.net(self.lpips.scaling_layer(x.expand(-1, 3, -1, -1)))


def normalise(features: Tensor) -> Tensor:
    """Scale to unit length over channels in fp32, like lpips.normalize_tensor (eps outside the root)."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
