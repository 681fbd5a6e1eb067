"""The settings that a visitor compares, one per line as on a command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from varaccel.accelerators.notation import parse_accelerator
from varaccel.accelerators.plain import Plain
from varaccel.app.models import uses_models
from varaccel.engine.accelerator import AnyAccelerator, resolve_accelerator
from varaccel.engine.job import Job
from varaccel.errors import InputError
from varaccel.evaluation.bench.grids import defaults_of
from varaccel.shipped import smaller_model

MAX_SETTINGS = 12


def settings_lines(text: str, job_type: type[Job], model: str = "this model") -> list[AnyAccelerator]:
    """The accelerators of a text, one per line as typed on a command line, such as `zipar:window=4`.

    Empty lines do not count, nor does what follows a # at the start of a line or after a space.

    Args:
        job_type: of the model that they have to fit.
        model: its name.

    Raises:
        InputError: a line that cannot be used, with its number; no setting, or more than `MAX_SETTINGS`.
    """
    settings = []
    for number, line in enumerate(text.splitlines(), start=1):
        typed = re.sub(r"(^|\s)#.*", "", line).strip()
        if not typed:
            continue
        try:
            settings.append(resolve_accelerator(parse_accelerator(typed), job_type, model))
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
    if not settings:
        raise InputError("there is no setting to compare; type one per line, such as `zipar:window=4`.")
    if len(settings) > MAX_SETTINGS:
        raise InputError(
            f"the page compares up to {MAX_SETTINGS} settings, got {len(settings)}; remove some."
        )
    return settings


def default_lines(job_type: type[Job]) -> str:
    """What the page proposes to compare: plain decoding and the settings of the release's report."""
    return "\n".join((Plain.name, *defaults_of(job_type).release))


def proposed_lines(model: str, job_type: type[Job], models: Sequence[str], own: Collection[str] = ()) -> str:
    """`default_lines` without the settings for which a model has no second network.

    Args:
        model, job_type: the model.
        models: names that the page offers.
        own: drafters that came with the model.
    """
    lines = default_lines(job_type).splitlines()
    if smaller_model(model) not in models:
        # the report's settings name the small shipped model, which fits only the one that it was made for
        lines = [re.sub(r"[:,]refiner=[\w-]+", "", line) for line in lines]
        if not own:
            lines = [line for line in lines if not uses_models(line.split(":")[0])]
    return "\n".join(lines)
