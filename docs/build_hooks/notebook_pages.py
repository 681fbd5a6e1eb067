"""Hook of the site's build: a notebook's page links to other pages and asks no other host for scripts.

mkdocs-jupyter leaves links to `../bench.md` as they are, which is right where a notebook is read as a file. Its
template brings a loader of diagrams and one of formulas, both from hosts of their own; the tour has neither, and the
site is to be read without any request elsewhere.
"""

from __future__ import annotations

import logging
import posixpath
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.plugins.notebook_pages")  # below "mkdocs", whose warnings --strict counts

_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL)
_FOREIGN = re.compile(r"mathjax|mermaid|<script src=\"\"", re.IGNORECASE)
_LINK = re.compile(r'(?<=href=")([^":#]+\.md)(?=[#"])')


def on_page_content(html: str, /, *, page: Page, files: Files, **kwargs: object) -> str:
    """Mend the page if it is a notebook."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def linked(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        file = files.get_file_from_path(target)
        if file is None:
            logger.warning("Notebook '%s' links to '%s', which is no page.", page.file.src_uri, link[1])
            return link[0]
        return file.url_relative_to(page.file)

    html = _SCRIPT.sub(lambda script: "" if _FOREIGN.search(script[0]) else script[0], html)
    return _LINK.sub(linked, html)
