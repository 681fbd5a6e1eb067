"""Hook of the site's build: links from pages to files of the repository outside docs/.

A page links to `../pipelines/var_code.py` or `../weights/mini-var/README.md` as on any host that shows the
repository. In the site such a file is copied to `repository/` and the link leads there; Markdown is served as plain
text. A link to a file that does not exist is left alone, so that the strict build reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)")
_FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1[ \t]*$", re.MULTILINE | re.DOTALL)


def _outside(target: str, page: str, docs: Path) -> Path | None:
    """The file of the repository that `target` names as seen from `page`, if it lies outside `docs` and exists."""
    file = (docs / posixpath.dirname(page) / target).resolve()
    inside = file.is_relative_to(docs) or not file.is_relative_to(docs.parent)
    return None if inside or not file.is_file() else file


def _name(file: Path, root: Path) -> str:
    """Where a file is found in the site."""
    name = f"{FOLDER}/{file.relative_to(root).as_posix()}"
    return name + ".txt" if file.suffix in (".md", ".py", "") else name


def on_page_markdown(markdown: str, /, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to copies of their files."""
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir).resolve()

    def replaced(link: re.Match[str]) -> str:
        file = _outside(link[1], page.file.src_uri, docs)
        if file is None:
            return link[0]
        name = _name(file, docs.parent)
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(file)))
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _LINK.sub(replaced, markdown[end:])])
