"""Errors and warnings of the library as notices of the page."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from varaccel.errors import VaraccelError


def notice(message: str) -> str:
    """A message as notices take it: they are rendered as HTML, and messages quote what the visitor typed."""
    return html.escape(message, quote=False)


class WarningList(logging.Handler):
    """Keeps the library's warnings about one event of the page, each once; other visitors' words are not shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._event = current_event()
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if current_event() == self._event:
            self.messages[record.getMessage()] = None


def current_event() -> str | None:
    """What tells events of the page apart; threads have to be started in a copy of the event's context."""
    from gradio.context import LocalContext

    event: str | None = LocalContext.event_id.get(None)
    return event


@contextmanager
def shown_on_page(told: Callable[[str], str] = notice) -> Iterator[None]:
    """Errors and warnings of the library within the block as notices of the page.

    Args:
        told: makes text of a message: `notice` for what a page renders, `str` for what a program reads.
    """
    import gradio

    warnings, logger = WarningList(), logging.getLogger("varaccel")
    logger.addHandler(warnings)
    try:
        yield
    except VaraccelError as error:
        raise gradio.Error(told(str(error)), print_exception=False) from error
    finally:
        logger.removeHandler(warnings)
        for message in warnings.messages:
            gradio.Warning(told(message))
