"""Run: python -m pytest tests/runtime/test_randomness.py. The random streams of a step."""

import torch

from runtime.randomness import seeded


def test_seeded_is_pure():
    """The stream depends on (seed, step, purpose) alone, on each of them, and leaves torch's own alone."""
    before = torch.get_rng_state()
    streams = {key: torch.rand(4, generator=seeded(*key)).tolist()
               for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0))}
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    again = torch.rand(4, generator=seeded(0, 1, 0)).tolist()
    assert again == streams[0, 1, 0] and len({tuple(stream) for stream in streams.values()}) == 5
