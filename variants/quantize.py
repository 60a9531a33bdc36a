"""VQ-GAN's vector quantiser, which replaces the Gaussian posterior.

Sources: VQ-VAE (van den Oord et al. 2017; Eq. 2-3 and, for the moving-average codebook, App. A.1) and VQ-GAN
(Esser et al. 2021). Each latent vector is replaced by the nearest of K codebook entries; the decoder's
gradient passes straight through to the encoder.

What differs: every term is a mean over latent elements. Entries that no vector has chosen for REVIVE_AFTER
steps are replaced by encoder outputs; both papers leave this open. All entries start as unused, so the
codebook is drawn from the data within the first steps.

Each step updates the state from one table of sums (`statistics`). The caller adds the tables of all
micro-batches and processes and passes the total to `update`. The code here is independent of processes: one
process on the joined batch ends in the same state. In a training loop:

    slots = revival_slots(global_batch * h * w, codebook_size, generator).view(global_batch, h, w)
    recon, posterior = model(x)                                        # loss += vq_loss(posterior)
    table += model.quantizer.statistics(posterior, slots[rows])        # per micro-batch
    log(model.quantizer.update(distributed.sum_(table)))               # after the optimizer's step

B batch, Z latent channels, h w latent size, K entries, N vectors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelets import full_precision

COMMITMENT = 0.25         # VQ-VAE Eq. 3, VQ-GAN
EMA_DECAY = 0.99          # VQ-VAE App. A.1
REVIVE_AFTER = 100        # steps; ours
DISTANCES = 2**22         # computed at once, 32 MB in fp64; ours


class Quantized(NamedTuple):
    """Replaces the Gaussian posterior; `mean` is the code, and it is deterministic."""

    mean: Tensor          # (B, Z, h, w) codebook entries, with the gradient of z
    z: Tensor             # (B, Z, h, w) the encoder's output
    entries: Tensor       # (B, Z, h, w) the same entries, with the gradient of the codebook
    indices: Tensor       # (B, h, w) int64, the numbers of the entries

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean


def vq_loss(posterior: Quantized) -> Tensor:
    """mean (sg(z) - e)^2 + 0.25 mean (z - sg(e))^2, sg = stop-gradient, means over latent elements.

    With the moving-average codebook, the first term has no gradient and only shows in the log.
    """
    z, entries = posterior.z, posterior.entries
    codebook = (z.detach() - entries).square().mean()
    return codebook + COMMITMENT * (z - entries.detach()).square().mean()


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Number of the nearest entry: vectors (N, Z), codebook (K, Z) -> (N,) int64.

    Compares |e|^2 / 2 - z.e in fp64, where neither TF32 nor autocast rounds the product and where close
    entries far from 0 keep their digits; at most DISTANCES at a time.
    """
    vectors, codebook = vectors.double(), codebook.double()
    half = codebook.square().sum(dim=1) / 2
    parts = vectors.split(max(1, DISTANCES // len(codebook)))
    return torch.cat([torch.addmm(half, part, codebook.mT, alpha=-1).argmin(dim=1) for part in parts])


def revival_slots(vectors: int, size: int, generator: torch.Generator) -> Tensor:
    """The entry that each vector of the global batch may revive: (vectors,) int64, all different.

    A vector with slot k < size is the candidate for entry k; with a larger slot it is no candidate. If there
    are fewer vectors than entries, a random subset of entries gets candidates. The result depends only on the
    generator, so all ranks agree.
    """
    return torch.randperm(max(vectors, size), generator=generator)[:vectors]


class VectorQuantizer(nn.Module):
    """z (B, Z, h, w) -> Quantized, in fp32 or fp64; the codebook learns by gradient or by EMA.

    No operation here is rounded by autocast. The codebook (K, Z) is a parameter in both cases, so the average
    of the weights includes it. With update="ema" it has no gradient, and its state is N_k and m_k with
    e_k = m_k / N_k. forward changes no state. The codebook starts uniform in [-1/K, 1/K], as in taming.
    """

    def __init__(self, size: int, channels: int, update: str) -> None:
        super().__init__()
        self.ema = update == "ema"
        start = torch.empty(size, channels).uniform_(-1 / size, 1 / size)
        self.codebook = nn.Parameter(start, requires_grad=not self.ema)
        self.register_buffer("idle", torch.full((size,), REVIVE_AFTER))      # steps since an entry was chosen
        if self.ema:
            self.register_buffer("ema_count", torch.ones(size))
            self.register_buffer("ema_sum", start.clone())

    def forward(self, z: Tensor) -> Quantized:
        z = full_precision(z)
        codebook = self.codebook.to(z.dtype)
        vectors = z.detach().movedim(1, -1)                                  # (B, h, w, Z)
        indices = nearest(vectors.flatten(0, 2), codebook.detach()).view(vectors.shape[:3])
        entries = F.embedding(indices, codebook).movedim(-1, 1)              # (B, Z, h, w)
        # straight-through, and exactly an entry: the usual z + (e - z) equals it only up to rounding
        return Quantized(entries.detach() + (z - z.detach()), z, entries, indices)

    @torch.no_grad()
    def statistics(self, posterior: Quantized, slots: Tensor) -> Tensor:
        """Sums over one micro-batch, (K, 2 + 2Z): everything that `update` needs from it.

        Columns: number of vectors that chose the entry, their sum (Z), number of candidates for its revival
        (0 or 1), their sum (Z). slots (B, h, w) are this micro-batch's part of `revival_slots`.
        """
        size, channels = self.codebook.shape
        vectors = posterior.z.movedim(1, -1).flatten(0, 2)                   # (N, Z)
        rows = torch.cat([torch.ones_like(vectors[:, :1]), vectors], dim=1)
        chosen = rows.new_zeros(size, 1 + channels).index_add_(0, posterior.indices.flatten(), rows)
        candidates = rows.new_zeros(size + 1, 1 + channels)                  # last row: non-candidates
        candidates[slots.flatten().clamp(max=size)] = rows
        return torch.cat([chosen, candidates[:size]], dim=1)

    @torch.no_grad()
    def update(self, table: Tensor) -> dict[str, Tensor]:
        """Update the codebook (EMA), revive dead entries, return usage and perplexity for the log.

        table: the sum of `statistics` over micro-batches and processes. usage is the fraction of entries
        chosen in this step. perplexity is exp of the entropy of the choices, between 1 and the number of
        chosen entries.
        """
        channels = self.codebook.shape[1]
        count, total, offered, candidate = table.split([1, channels, 1, channels], dim=1)
        used = count > 0                                                     # (K, 1)
        if self.ema:
            self.ema_count.lerp_(count[:, 0], 1 - EMA_DECAY)
            self.ema_sum.lerp_(total, 1 - EMA_DECAY)
            # both averages of an unchosen entry decay alike, so the entry does not move
            self.codebook.copy_(torch.where(used, self.ema_sum / self.ema_count[:, None], self.codebook))
        self.idle.copy_(torch.where(used[:, 0], 0, self.idle + 1))
        self.revive((self.idle >= REVIVE_AFTER)[:, None] & (offered > 0), candidate)
        share = count / count.sum()
        return {"usage": used.float().mean(), "perplexity": torch.special.entr(share).sum().exp()}

    def revive(self, dead: Tensor, candidate: Tensor) -> None:
        """Set entries where `dead` (K, 1) to their candidates (K, Z), as if each was just chosen once."""
        self.codebook.copy_(torch.where(dead, candidate, self.codebook))
        self.idle.masked_fill_(dead[:, 0], 0)
        if self.ema:
            self.ema_count.masked_fill_(dead[:, 0], 1.0)
            self.ema_sum.copy_(torch.where(dead, candidate, self.ema_sum))
