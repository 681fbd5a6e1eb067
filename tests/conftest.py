"""What the tests of a process share: the models that ship, loaded once, and what they draw plainly, drawn once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from varaccel import AutoPipeline

ShippedPipelines = Callable[[str], Any]
PlainTokens = Callable[..., Tensor]


@cache
def load_shipped(name: str) -> Any:
    """A shipped pipeline of this process; who changes its settings makes a copy first."""
    pipe = AutoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shipped() -> ShippedPipelines:
    """Shipped pipelines by name, which tests must not change."""
    return load_shipped


@pytest.fixture(scope="session")
def plain_tokens(shipped: ShippedPipelines) -> PlainTokens:
    """What plain decoding makes of prompts, as output type "latent": `plain_tokens(name, prompts, **settings)`."""

    @cache
    def drawn(name: str, prompts: tuple[str, ...], settings: tuple[tuple[str, Any], ...]) -> Tensor:
        images: Tensor = shipped(name)(list(prompts), **dict(settings), output_type="latent").images
        return images

    return lambda name, prompts, **settings: drawn(name, tuple(prompts), tuple(sorted(settings.items())))
