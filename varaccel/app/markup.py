"""Pieces of HTML that several tabs show."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from PIL import Image


def law_badge(law: str) -> str:
    """A law as a label of its own colour; its style is in `varaccel.app.explore.CSS`."""
    exact = law == "lossless"
    return f'<span class="va-law {"exact" if exact else "near"}">{"exact" if exact else escape(law)}</span>'


def data_uri(picture: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as text in a page.

    Args:
        format, options: of `PIL.Image.Image.save`.
    """
    file = io.BytesIO()
    picture.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
