"""The settings that a visitor compares, one per line as on a command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from varaccel.accelerators import Accelerator, resolve_accelerator
from varaccel.accelerators.notation import parse_accelerator
from varaccel.accelerators.plain import Plain
from varaccel.errors import InputError
from varaccel.evaluation.bench.grids import defaults_of
from varaccel.evaluation.bench.report import Row
from varaccel.shipped import smaller_model

MAX_SETTINGS = 12


def settings_lines(text: str, family: str) -> list[Accelerator]:
    """The accelerators of a text, one per line as typed on a command line, such as `zipar:window=4`.

    Empty lines do not count, nor does what follows a # at the start of a line or after a space.

    Args:
        family: of the model that they have to fit.

    Raises:
        InputError: a line that cannot be used, with its number; no setting, or more than `MAX_SETTINGS`.
    """
    settings = []
    for number, line in enumerate(text.splitlines(), start=1):
        typed = re.sub(r"(^|\s)#.*", "", line).strip()
        if not typed:
            continue
        try:
            settings.append(resolve_accelerator(parse_accelerator(typed), family))
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
    if not settings:
        raise InputError("there is no setting to compare; type one per line, such as `zipar:window=4`.")
    if len(settings) > MAX_SETTINGS:
        raise InputError(
            f"the page compares up to {MAX_SETTINGS} settings, got {len(settings)}; remove some."
        )
    return settings


def default_lines(family: str) -> str:
    """What the page proposes to compare: plain decoding and the settings of the release's report."""
    return "\n".join((Plain.name, *defaults_of(family).release))


def proposed_lines(model: str, family: str, models: Sequence[str], own: Collection[str] = ()) -> str:
    """`default_lines` without the settings for which a model has no second network.

    Args:
        model, family: the model.
        models: names that the page offers.
        own: drafters that came with the model.
    """
    lines = default_lines(family).splitlines()
    if smaller_model(model) not in models:
        # the report's settings name the small shipped model, which fits only the one that it was made for
        lines = [re.sub(r"[:,]refiner=[\w-]+", "", line) for line in lines]
        if not own:
            lines = [line for line in lines if line.split(":")[0] not in ("code", "refiner", "cspd")]
    return "\n".join(lines)


def with_plain(accelerators: Sequence[Accelerator]) -> list[Accelerator]:
    """Plain decoding, then the others, each once."""
    return list({Row.of(one).key: one for one in (Plain(), *accelerators)}.values())
