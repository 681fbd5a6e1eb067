"""Prompts for demonstrations and measurements, for models of descriptions and of classes."""

from __future__ import annotations

from collections.abc import Sequence

from varaccel.pipelines.loading import LoadablePipeline


def examples(pipe: LoadablePipeline, descriptions: Sequence[str]) -> list[str]:
    """The descriptions, or as many class names for a class-conditional model."""
    names = pipe.config.get("class_names")
    if names is None:
        return list(descriptions)
    return [names[i % len(names)].split(",")[0] for i in range(len(descriptions))]
