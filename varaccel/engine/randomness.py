"""The one source of randomness: a generator per image, spent by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical, Distribution
from varaccel.engine.options import as_integer
from varaccel.engine.seeds import MAX_SEED, seeded_generator
from varaccel.errors import InputError
from varaccel.nn.devices import real_type

ValueT = TypeVar("ValueT")


@dataclass
class Randomness:
    """Uniform numbers for every position of every image, drawn ahead.

    A draw belongs to an image and a position, not to a moment. So an image depends neither on its batch nor
    on the order in which positions are decided: with the same distributions, every order gives the same image. And
    nothing is drawn inside the decoding loop.

    Speculation needs more: draft tokens are drawn, verified and drawn again, pass after pass. Those numbers come
    from `stream` and `gumbel`, each with generators of its own, which the images' generators seed: what one
    of them spends changes nothing for the other.

    Attributes:
        uniforms: [B, N] in [0, 1), one number per position; float64, or what `real_type` says of the device.
        stream_seeds, noise_seeds: of each image.
    """

    uniforms: Tensor
    stream_seeds: tuple[int, ...] = field(default=(), repr=False)
    noise_seeds: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def draw(
        cls, generators: Sequence[torch.Generator], positions: int, device: torch.device | str = "cpu"
    ) -> Randomness:
        """Draw `positions` numbers from each image's own generator, on the generator's device."""
        rows = [uniform_numbers((positions,), g, device) for g in generators]
        seeds = [torch.randint(2**62, (2,), generator=g, device=g.device).tolist() for g in generators]
        return cls(torch.stack(rows), tuple(s[0] for s in seeds), tuple(s[1] for s in seeds))

    def part(self, images: Sequence[int]) -> Randomness:
        """The numbers of some images."""
        index = torch.tensor(images, device=self.uniforms.device)
        return Randomness(
            self.uniforms[index],
            tuple(self.stream_seeds[i] for i in images),
            tuple(self.noise_seeds[i] for i in images),
        )

    def put_rows(self, rows: Tensor, other: Randomness) -> None:
        """Rows `rows` [n] become those of `other`, in order; streams and noise that were opened stay as they are."""
        self.uniforms = self.uniforms.index_copy(0, rows, other.uniforms)
        self.stream_seeds = tuple(_with_rows(self.stream_seeds, rows, other.stream_seeds))
        self.noise_seeds = tuple(_with_rows(self.noise_seeds, rows, other.noise_seeds))

    def keep_rows(self, rows: Tensor) -> None:
        """Only rows `rows` [n] stay, in this order; streams and noise that were opened stay as they are."""
        kept = self.part(rows.tolist())
        self.uniforms, self.stream_seeds, self.noise_seeds = (
            kept.uniforms,
            kept.stream_seeds,
            kept.noise_seeds,
        )

    def at(self, positions: Tensor) -> Tensor:
        """The numbers of `positions` ([P] or [B, P], -1 = padding): [B, P]."""
        if positions.dim() == 1:
            return self.uniforms[:, positions]
        return self.uniforms.gather(1, positions.clamp(min=0))

    def sample(self, distribution: Distribution, positions: Tensor) -> Tensor:
        """Draw the values of `positions` ([P] or [B, P], -1 = padding) from their distribution: [B, P] or [B, P, C]."""
        return distribution.sample(self.at(positions))

    def orders(self) -> Tensor:
        """[B, N] int64, a random order of the positions for each image, for schedules that need one."""
        seeds = [(seed + 2**61) % 2**62 for seed in self.noise_seeds]  # apart from the Gumbel noise
        return random_orders(_seeded(seeds), self.uniforms.shape[1], self.uniforms.device)

    def generators(self) -> list[torch.Generator]:
        """New generators, one per image, for what follows the tokens, such as the noise of a diffusion decoder."""
        return _seeded([(seed + 2**60) % 2**62 for seed in self.noise_seeds])  # apart from noise and orders

    def stream(self, width: int) -> Stream:
        """Numbers for the passes to come, `width` per image and pass."""
        return Stream(_seeded(self.stream_seeds), width, self.uniforms.device)

    def gumbel(self, vocab_size: int) -> GumbelNoise:
        """Gumbel noise for every position and each of `vocab_size` tokens."""
        return GumbelNoise(
            _seeded(self.noise_seeds), self.uniforms.shape[1], vocab_size, self.uniforms.device
        )


def uniform_numbers(shape: Sequence[int], generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Numbers in [0, 1), drawn in float64 on the generator's device: on `device`, in its `real_type`."""
    drawn = torch.rand(*shape, dtype=torch.float64, generator=generator, device=generator.device)
    real = real_type(device)
    if real == torch.float64:
        return drawn.to(device)
    # rounded down, or the largest would become 1
    return drawn.clamp(max=1 - torch.finfo(real).eps / 2).to(real).to(device)


def random_orders(
    generators: Sequence[torch.Generator], positions: int, device: torch.device | str = "cpu"
) -> Tensor:
    """[B, N] int64, a permutation of the positions from each image's own generator, on the generator's device."""
    rows = [torch.randperm(positions, generator=g, device=g.device).to(device) for g in generators]
    return torch.stack(rows)


def _seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    return [seeded_generator(seed) for seed in seeds]


def _with_rows(values: Sequence[ValueT], rows: Tensor, others: Sequence[ValueT]) -> list[ValueT]:
    """`values` with those of `others` at `rows`."""
    found = list(values)
    for row, value in zip(rows.tolist(), others, strict=True):
        found[row] = value
    return found


class Stream:
    """Uniform numbers per image and pass, drawn some passes ahead in one copy to the device.

    Every image passes through the same number of passes from its own point of view, alone or in a batch, or in a place
    of one that another image has left, so its numbers do not depend on the batch.
    """

    AHEAD = 16

    def __init__(self, generators: Sequence[torch.Generator], width: int, device: torch.device) -> None:
        self.generators, self.width, self.device = list(generators), width, device
        self._block = torch.empty(0, dtype=torch.float32, device=device)
        self._next = self.AHEAD

    def next(self) -> Tensor:
        """[B, width] in [0, 1) for the next pass, of the type of `Randomness.uniforms`."""
        if self._next == self.AHEAD:
            self._block = self._drawn(self.generators, self.AHEAD)
            self._next = 0
        self._next += 1
        return self._block[self._next - 1]

    def put_rows(self, rows: Tensor, other: Stream) -> None:
        """Rows `rows` [n] become those of `other`, in order, of which nothing was asked yet."""
        self.generators = _with_rows(self.generators, rows, other.generators)
        left = self.AHEAD - self._next
        if left:  # numbers of a generator are the same in one block or several
            self._block[self._next :, rows] = self._drawn(other.generators, left)

    def keep_rows(self, rows: Tensor) -> None:
        """Only rows `rows` [n] stay, in this order."""
        self.generators = [self.generators[row] for row in rows.tolist()]
        if self._next < self.AHEAD:
            self._block = self._block[:, rows]

    def _drawn(self, generators: Sequence[torch.Generator], passes: int) -> Tensor:
        """[passes, B, width]."""
        rows = [uniform_numbers((passes, self.width), g, self.device) for g in generators]
        return torch.stack(rows, dim=1)


class GumbelNoise:
    """Standard Gumbel noise that belongs to an image, a position and a code.

    Adding it to log-probabilities and taking the largest draws from them (the Gumbel-max trick). Since a
    position keeps its noise, distributions that differ little draw the same code at it. Drawn in blocks of positions
    when they are first asked for: 4 bytes per position and code.
    """

    BLOCK = 64

    def __init__(
        self, generators: Sequence[torch.Generator], positions: int, vocab_size: int, device: torch.device
    ) -> None:
        self.generators, self.positions, self.vocab_size, self.device = (
            list(generators),
            positions,
            vocab_size,
            device,
        )
        self._noise = torch.empty(len(generators), 0, vocab_size, dtype=torch.float32, device=device)

    def at(self, positions: Tensor, before: int | None = None) -> Tensor:
        """Noise of `positions` [B, P]: [B, P, V] float32.

        Args:
            positions: places outside the image get the noise of its border; their draws are not used.
            before: a position that is beyond all of them; None to ask the device, which synchronises with it.
        """
        wanted = min(int(positions.max()) + 1 if before is None else before, self.positions)
        self._draw(wanted)
        batch = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
        return self._noise[batch, positions.clamp(0, wanted - 1)]

    def part(self, images: Sequence[int]) -> GumbelNoise:
        """The noise of some images, before any was asked for."""
        generators = [self.generators[i] for i in images]
        return GumbelNoise(generators, self.positions, self.vocab_size, self.device)

    def put_rows(self, rows: Tensor, other: GumbelNoise) -> None:
        """Rows `rows` [n] become those of `other`, in order."""
        self._draw(other._noise.shape[1])
        other._draw(self._noise.shape[1])
        self.generators = _with_rows(self.generators, rows, other.generators)
        self._noise[rows] = other._noise

    def keep_rows(self, rows: Tensor) -> None:
        """Only rows `rows` [n] stay, in this order."""
        self.generators = [self.generators[row] for row in rows.tolist()]
        self._noise = self._noise[rows]

    def _draw(self, wanted: int) -> None:
        """Draw block after block until there are `wanted` positions."""
        while self._noise.shape[1] < wanted:
            shape = (min(self.BLOCK, self.positions - self._noise.shape[1]), self.vocab_size)
            rows = [
                torch.empty(shape, dtype=torch.float32, device=g.device).exponential_(generator=g)
                for g in self.generators
            ]
            block = torch.stack(rows).to(self.device).log_().neg_()
            self._noise = torch.cat([self._noise, block], dim=1)


class RasterNoise:
    """Draws of raster order, one position a pass, with Gumbel noise: those of every loop that drafts with it.

    Args:
        noise: of the call.
        randomness: of the call; position 0 is drawn with its number, as where drafts are verified.
    """

    def __init__(self, noise: GumbelNoise, randomness: Randomness) -> None:
        self.noise, self.randomness = noise, randomness
        self._decided = 0

    def sample(self, distribution: Categorical, positions: Tensor) -> Tensor:
        """Token ids [B, 1] of the next position, which `positions` [1] names."""
        self._decided += 1
        if self._decided == 1:
            return self.randomness.sample(distribution, positions)
        everywhere = positions.expand(len(self.noise.generators), -1)
        return distribution.perturbed(self.noise.at(everywhere, self._decided)).argmax(dim=-1)


def image_generators(
    count: int,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[torch.Generator]:
    """One CPU generator per image.

    Args:
        count: number of images.
        seed: image i gets seed + i, so that it can be made again alone with that seed.
        generator: instead of a seed, a generator per image, or one generator from which the images'
            seeds are drawn.

    Raises:
        InputError: both given, a wrong number of generators, what is no generator, or a seed that is no integer in
            [0, 2**63) for every image.
    """
    if seed is not None and generator is not None:
        raise InputError("pass either seed or generator, not both.")
    if isinstance(generator, Sequence) and not isinstance(generator, str):
        if len(generator) != count:
            raise InputError(f"{count} images need {count} generators, one each; got {len(generator)}.")
        wrong = next((g for g in generator if not isinstance(g, torch.Generator)), None)
        if wrong is not None or None in generator:
            raise InputError(f"generator must hold a torch.Generator per image, got {wrong!r}.")
        return list(generator)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise InputError(f"generator must be a torch.Generator, or one per image, got {generator!r}.")
        draws = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        return _seeded(draws.tolist())
    if seed is None:
        first = torch.Generator().seed() % 2**62
    else:
        given = as_integer(seed)
        if given is None or not 0 <= given <= MAX_SEED:
            raise InputError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}.")
        if given + count - 1 > MAX_SEED:
            raise InputError(
                f"{count} images take the seeds from {given} on, but seeds end at 2**63 - 1; take a smaller one."
            )
        first = given
    return _seeded(range(first, first + count))
