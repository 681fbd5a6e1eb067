"""Pieces of HTML that several tabs show."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from varaccel.evaluation.call_text import quality_label


def quality_badge(lossless: bool) -> str:
    """What an accelerator does to quality as a coloured label, whose style is in `varaccel.app.report_view.CSS`."""
    quality = quality_label(lossless)
    return f'<span class="va-quality {quality}">{quality}</span>'


def data_uri(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """An image as text in a page.

    Args:
        format, options: of `PIL.Image.Image.save`.
    """
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
