"""What a call cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


def call_label(accelerator: str, options: Mapping[str, Any]) -> str:
    """An accelerator with its options, as a call is written."""
    return f"{accelerator}({', '.join(f'{k}={v}' for k, v in options.items())})"


@dataclass(frozen=True)
class Statistics:
    """Cost of one pipeline call.

    Attributes:
        accelerator: name of the accelerator.
        options: its options.
        lossless: whether it keeps the law of plain decoding.
        images: pictures made.
        tokens: tokens per picture.
        passes: forward passes of the host model, prefill included; all pictures share them.
        rows: network rows per pass, 2 per picture while guided.
        cache_bytes: size of the key-value cache.
        seconds: wall-clock time by phase: text, tokens (prefill and steps), decode (tokens to pixels).
        device, dtype: where and in which precision the host model ran.
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    images: int
    tokens: int
    passes: int
    rows: int
    cache_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """The accelerator with its options, such as `zipar(window=8, mode=masked)`."""
        return call_label(self.accelerator, self.options)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {
            "tokens_per_pass": self.tokens_per_pass,
            "total_seconds": self.total_seconds,
        }

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        return (
            f"{self.label}: {self.images} pictures of {self.tokens} tokens in {self.passes} "
            f"passes ({self.tokens_per_pass:.2f} tokens per pass), {self.total_seconds:.2f} s ({phases})"
        )
