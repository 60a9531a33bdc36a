"""Discriminator regularisers: R1 (Mescheder et al. 2018), LeCam (Tseng et al. 2021) and CutMix consistency.

They are terms of the discriminator's loss. LiteVAE uses none of them. StyleGAN2 and GigaGAN were published
with R1, the U-Net discriminator with CutMix, and several autoencoder trainers use LeCam.

What differs: if a discriminator has many logits per image, D(x) is the mean over each head's logits and then
over heads, as in the adversarial losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelets import full_precision

LECAM_DECAY = 0.999      # ours: the formula leaves it open


def r1_loss(disc: nn.Module, x: Tensor) -> Tensor:
    """1/2 mean over images of ||grad_x D(x)||^2, with squares summed over pixels; x are real images; fp32.

    The published penalty, gamma/2 E ||grad||^2 times k in every k-th step, is gamma * k times this value in
    every k-th step. Call it with the bare discriminator, since a compiled network cannot be differentiated
    twice, and use one backward pass for it and the other terms: DDP averages every gradient that reaches the
    parameters in that pass. If layers couple the images of a batch (batch norm, minibatch standard
    deviation), the gradient of the batch's sum is used in place of each image's own gradient.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = full_precision(x.detach()).requires_grad_()
        logits = disc(x)
        score = sum(head.flatten(1).mean(1) for head in logits) / len(logits)      # (B,)
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return 0.5 * gradient.flatten(1).square().sum(1).mean()


def head_means(logits: tuple[Tensor, ...]) -> Tensor:
    """The mean logit of each head, (heads,), without gradient; LeCam averages it over steps."""
    return torch.stack([head.detach().float().mean() for head in logits])


class LeCam(nn.Module):
    """mean relu(D(x) - a_F)^2 + mean relu(a_R - D(recon))^2 (Tseng et al. 2021), averaged over heads.

    a_R and a_F are averages over steps of each head's mean logit for real and for reconstructed images. They
    are buffers and belong in the checkpoint; before the first update they are 0. Everything is fp32.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(heads))
        self.register_buffer("fake", torch.zeros(heads))
        self.register_buffer("updates", torch.tensor(0))

    def forward(self, logits_real: tuple[Tensor, ...], logits_fake: tuple[Tensor, ...]) -> Tensor:
        terms = [
            F.relu(real.float() - a_fake).square().mean() + F.relu(a_real - fake.float()).square().mean()
            for real, fake, a_real, a_fake in zip(logits_real, logits_fake, self.real, self.fake, strict=True)
        ]
        return sum(terms) / len(terms)

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Call once per step with its `head_means`, averaged over micro-batches and processes.

        The first 1 / (1 - decay) steps are weighted equally, so the initial 0 has no effect; after that the
        average is exponential.
        """
        self.updates += 1
        share = (1 / self.updates).clamp(min=1 - LECAM_DECAY)
        self.real.lerp_(real, share)
        self.fake.lerp_(fake, share)


def cutmix_mask(uniform: Tensor, height: int, width: int) -> Tensor:
    """One box per image; 1 where the mixed image is real (Schonfeld et al. 2020): (B, 4) -> (B, 1, H, W).

    The columns of `uniform`, each in [0, 1), are lambda, box centre y, box centre x and a coin flip. Before
    clipping, the box covers 1 - lambda of the image. The coin inverts half of the masks.
    """
    lam, cy, cx, coin = uniform.unbind(1)
    half = 0.5 * (1 - lam).sqrt()[:, None]
    y = (torch.arange(height, device=uniform.device) + 0.5) / height
    x = (torch.arange(width, device=uniform.device) + 0.5) / width
    rows, columns = (y - cy[:, None]).abs() < half, (x - cx[:, None]).abs() < half
    box = rows[:, :, None] & columns[:, None, :]
    return (box ^ (coin < 0.5)[:, None, None]).float()[:, None]


def cutmix_loss(mask: Tensor, mixed: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Consistency of pixel logits: mean (D(mix) - mix of D(x) and D(recon))^2 (Schonfeld et al. 2020)."""
    target = mask * real.float() + (1 - mask) * fake.float()
    return (mixed.float() - target).square().mean()
