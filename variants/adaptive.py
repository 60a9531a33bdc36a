"""The adaptive adversarial weight of taming and LDM; LiteVAE replaces it by a constant (Table 8, Fig. 7).

The ratio is that of one micro-batch over all processes, as in LDM. Unlike all other terms it is not linear in
the batch, so that it changes a little with --micro-batch.
"""

import torch
from torch import Tensor, nn


def last_layer_gradient(loss: Tensor, recon: Tensor, features: Tensor, decoder: nn.Module) -> Tensor:
    """Gradient of `loss` with respect to the weight of decoder.conv_out.

    Backpropagates from the loss to recon, then through a second run of only the last layer on the stored
    features. There is no backward pass through the rest of the model, so this is cheap, works under
    torch.compile and fires no DDP hooks.
    """
    (grad_recon,) = torch.autograd.grad(loss, recon, retain_graph=True)
    output = decoder.head(features.detach())
    return torch.autograd.grad(output, decoder.conv_out.weight, grad_recon.to(output.dtype))[0]


def adaptive_weight(grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    """||grad L_rec|| / (||grad L_adv|| + 1e-4), clamped to [0, 1e4]; L_rec has LPIPS but no KL (LDM)."""
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(0.0, 1e4)
