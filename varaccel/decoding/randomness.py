"""The one source of randomness: a generator per picture, spent by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.errors import InputError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Randomness:
    """Uniform numbers for every position of every picture, drawn ahead.

    A draw belongs to a picture and a position, not to a moment. So a picture depends neither on its batch nor
    on the order in which positions are decided: with the same laws, every order gives the same picture. And
    nothing is drawn inside the decoding loop.

    Attributes:
        uniforms: [B, N] float64 in [0, 1), one number per position.
    """

    uniforms: Tensor

    @classmethod
    def draw(
        cls, generators: Sequence[torch.Generator], positions: int, device: torch.device | str = "cpu"
    ) -> Randomness:
        """Draw `positions` numbers from each picture's own generator, on the generator's device."""
        rows = [
            torch.rand(positions, dtype=torch.float64, generator=g, device=g.device).to(device)
            for g in generators
        ]
        return cls(torch.stack(rows))

    def at(self, positions: Tensor) -> Tensor:
        """The numbers of `positions` ([P] or [B, P], -1 = padding): [B, P]."""
        if positions.dim() == 1:
            return self.uniforms[:, positions]
        return self.uniforms.gather(1, positions.clamp(min=0))


def picture_generators(
    count: int,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[torch.Generator]:
    """One CPU generator per picture.

    Args:
        count: number of pictures.
        seed: picture i gets seed + i, so that it can be made again alone with that seed.
        generator: instead of a seed, a generator per picture, or one generator from which the pictures'
            seeds are drawn.

    Raises:
        InputError: both given, a wrong number of generators, or a seed that is no integer in [0, 2**63).
    """
    if seed is not None and generator is not None:
        raise InputError("pass either seed or generator, not both.")
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise InputError(f"{count} pictures need {count} generators, one each; got {len(generator)}.")
        return list(generator)
    if generator is not None:
        draws = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        return [torch.Generator().manual_seed(int(s)) for s in draws]
    if seed is None:
        fresh = torch.Generator()
        first = fresh.seed() % 2**62
        return [torch.Generator().manual_seed(first + i) for i in range(count)]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED - count:
        raise InputError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}.")
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]
