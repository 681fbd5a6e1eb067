"""Pieces of HTML that several tabs show."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from PIL import Image


def distribution_badge(distribution: str) -> str:
    """A distribution as a label of its own colour; its style is in `varaccel.app.explore.CSS`."""
    exact = distribution == "lossless"
    return f'<span class="va-distribution {"exact" if exact else "near"}">{"exact" if exact else escape(distribution)}</span>'


def data_uri(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """An image as text in a page.

    Args:
        format, options: of `PIL.Image.Image.save`.
    """
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
