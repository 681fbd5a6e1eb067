"""Random generators of seeds of 63 bits."""

from __future__ import annotations

import numpy as np
import torch

MAX_SEED = 2**63 - 1

_STATE = slice(24, 24 + 624 * 8)
"""Where the state of a CPU generator holds the 624 words of the Mersenne Twister, each in 8 bytes."""


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator whose numbers depend on all bits of a seed from 0 to 2**63 - 1.

    Below 2**32 it is torch's own. torch takes no more bits than these for its CPU generators (pytorch#87509), so larger
    seeds are spread over the whole state by numpy's `SeedSequence`.
    """
    generator = torch.Generator().manual_seed(seed)
    if seed < 2**32:
        return generator
    state = generator.get_state()
    words = np.random.MT19937(seed).state["state"]["key"].astype(np.uint64)
    state[_STATE] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)
