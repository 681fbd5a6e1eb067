"""The randomness of masked models: a random order per image, and noise that belongs to its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varaccel.engine.randomness import random_orders, uniform_numbers
from varaccel.engine.seeds import seeded_generator
from varaccel.hosts.masked.distribution import DiffusionDistribution
from varaccel.nn.gather import rows_of


@dataclass
class TokenNoise:
    """All numbers that denoising needs, drawn ahead for every position of every image.

    Noise belongs to an image and a position, so that neither batch nor order changes an image, and two models that
    denoise the same position use the same noise: trajectory alignment (CSpD, arXiv 2411.11925, section 3.2).

    Attributes:
        permutation: [B, N] int64, the order of every image.
        start: [B, N, C] standard normal, what tokens are denoised from.
        uniforms: [B, N] in [0, 1), in the `real_type` of the device, for accepting draft tokens.
        seeds: of each image, for whatever else is drawn.
    """

    permutation: Tensor
    start: Tensor
    uniforms: Tensor
    seeds: tuple[int, ...] = field(default=(), repr=False)
    _steps: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(
        cls, generators: Sequence[torch.Generator], positions: int, channels: int, device: torch.device
    ) -> TokenNoise:
        """Draw from each image's own generator, on the generator's device."""
        orders = random_orders(generators, positions, device)
        starts, uniforms, seeds = [], [], []
        for g in generators:
            start = torch.randn(positions, channels, dtype=torch.float32, generator=g, device=g.device)
            starts.append(start.to(device))
            uniforms.append(uniform_numbers((positions,), g, device))
            seeds.append(int(torch.randint(2**62, (1,), generator=g, device=g.device)))
        return cls(orders, torch.stack(starts), torch.stack(uniforms), tuple(seeds))

    @property
    def batch(self) -> int:
        return self.start.shape[0]

    def part(self, images: Sequence[int]) -> TokenNoise:
        """The numbers of some images."""
        index = torch.tensor(images, device=self.start.device)
        seeds = tuple(self.seeds[i] for i in images)
        return TokenNoise(self.permutation[index], self.start[index], self.uniforms[index], seeds)

    def forget(self) -> None:
        """Free the noise of denoising steps, which is drawn again if it is asked for."""
        self._steps.clear()

    def other(self) -> TokenNoise:
        """The same images with other noise: paths that are not aligned with these."""
        generators = [seeded_generator((seed + 2**61) % 2**62) for seed in self.seeds]
        _, positions, channels = self.start.shape
        fresh = TokenNoise.draw(generators, positions, channels, self.start.device)
        return TokenNoise(self.permutation, fresh.start, fresh.uniforms, fresh.seeds)

    def steps(self, count: int) -> Tensor:
        """Noise of `count` denoising steps, [B, N, count, C]; entry k is added in step k."""
        if count not in self._steps:
            shape = (self.start.shape[1], count, self.start.shape[2])
            rows = [
                torch.randn(shape, dtype=torch.float32, generator=g, device=g.device)
                for g in map(seeded_generator, self.seeds)
            ]
            self._steps[count] = torch.stack(rows).to(self.start.device)
        return self._steps[count]

    def paths(self, positions: Tensor, count: int | None) -> tuple[Tensor, Tensor | None]:
        """Start and step noise of `positions` [B, P] (-1 is padding): [B * P, C] and [count, B * P, C].

        Args:
            count: denoising steps, None for samplers that add no noise.
        """
        start = rows_of(self.start, positions).flatten(0, 1)
        if count is None:
            return start, None
        return start, rows_of(self.steps(count), positions).flatten(0, 1).transpose(0, 1)

    def accepting(self, positions: Tensor) -> Tensor:
        """Uniform numbers of `positions` [B, P]: [B * P]."""
        return rows_of(self.uniforms, positions).flatten()

    def sample(self, distribution: DiffusionDistribution, positions: Tensor) -> Tensor:
        """Tokens [B, P, C] of `positions` [B, P] drawn from their distribution."""
        return distribution.sample(*self.paths(positions, distribution.noisy_steps))
