"""What is called after every pass, what it is shown and what it may give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from varaccel.errors import InputError

StepCallback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""Called after every pass as (pipe, pass from 0, tokens decided per image in this pass, shown).

`shown` is as things stand after this pass, also for who looks later or in another thread; changing it changes no image:

- `shown["canvas"]`: a copy of the `Canvas`.
- `shown["preview"]()`: the canvas decoded to images of the call's `output_type`, arrays if that is "latent".
- `shown["written"]()`: `ImageOutput.written` so far.
- `shown["stop"]()`: ends this call after its pass, from any thread.

`pipe._interrupt = True` in a callback ends the call that it belongs to; in a thread that makes no call of this
pipeline, all calls of it that are under way. What is returned must be None or the dict as it came.
"""


def check_callback(callback: object) -> None:
    """Refuse, before anything is drawn, what cannot be called.

    Raises:
        InputError: no function.
    """
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function or None, got {type(callback).__name__}.")


def check_returned(shown: Mapping[str, Any], returned: object) -> None:
    """Accept what a callback of diffusers returns as long as it changes nothing: the dict that it was given.

    diffusers goes on with the tensors of that dict. Here earlier passes have read the tokens, and what they became is
    in caches, so an exchanged one would be drawn by half.

    Raises:
        InputError: a dict with other values than those that were shown.
    """
    if not isinstance(returned, Mapping):
        return
    other = [str(name) for name, value in returned.items() if name not in shown or shown[name] is not value]
    if other:
        raise InputError(
            f"callback_on_step_end returned its own {', '.join(map(repr, other))}; what is decided cannot be "
            "exchanged, so return None or the dict as it came."
        )
