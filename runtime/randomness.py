"""Random streams that are pure functions of (seed, step, purpose), so that resuming needs only the step."""

import numpy as np
import torch

# purposes; DROPOUT is last, since a row number is added to it
CUTMIX, REVIVAL, EQUIVARIANCE, DROPOUT = range(4)


def seeded(seed: int, step: int, purpose: int) -> torch.Generator:
    """A CPU generator for one purpose in one step."""
    key = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(key[0]))


def seeded_numpy(seed: int, step: int, purpose: int) -> np.random.Generator:
    """A NumPy generator of the same kind, for numbers by which Python decides."""
    return np.random.default_rng([seed, step, purpose])
