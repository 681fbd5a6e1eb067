"""The documentation site: it builds without a warning, its links hold, and it says what the code says."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

import varaccel.accelerators
from tests.scripts import ROOT, load_script
from varaccel.accelerators import ACCELERATORS

pytestmark = pytest.mark.slow  # builds the site

DOCS = ROOT / "docs"
PAGES = DOCS / "accelerators"
SHARED_PAGES = {"refiner": "code", "fast_var": "scale_plan", "skip_var": "scale_plan"}
HEADINGS = [
    "The idea",
    "What it looks like",
    "How to call it",
    "Options",
    "Lossless or approximate",
    "When to use it",
    "Measured",
    "The recipe",
    "Paper",
]
OWN = sorted(
    n for n, cls in ACCELERATORS.items() if cls.__module__.startswith(varaccel.accelerators.__name__)
)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Page(HTMLParser):
    """What tests ask of one page: anchors, links, assets, headings, blocks of code."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[n] for n in ("id", "name") if n in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link":
            self.assets.append(values["href"])
        self.assets += [values[n] for n in ("src", "poster", "data") if n in values and tag != "a"]
        self.assets += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "h2":
            self.headings.append("")
        if tag in ("code", "script"):
            (self.code if tag == "code" else self.scripts).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "h2" in self._open and "a" not in self._open:
            self.headings[-1] += data
        if "code" in self._open:
            self.code[-1] += data
        if "script" in self._open:
            self.scripts[-1] += data


@dataclass
class Site:
    """The built site and what the build had to say."""

    folder: Path
    warnings: list[str]

    @cached_property
    def pages(self) -> dict[str, Page]:
        """By their path in the site."""
        return {p.relative_to(self.folder).as_posix(): Page(p) for p in sorted(self.folder.rglob("*.html"))}


def site_config(**options: Any) -> Any:
    from mkdocs.config import load_config

    return load_config(str(ROOT / "mkdocs.yml"), **options)


def build_site(folder: Path) -> list[str]:
    """Build into `folder`; the warnings of the build."""
    from mkdocs.commands.build import build

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        config = site_config(site_dir=str(folder), strict=False)
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)
    finally:
        logger.removeHandler(handler)
    return said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Built once for all processes of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, said = root / "site", root / "site.json"
    with FileLock(root / "site.lock"):
        if not said.exists():
            said.write_text(json.dumps(build_site(folder)))
    return Site(folder, json.loads(said.read_text()))


def test_the_build_has_no_warning(site: Site) -> None:
    """`make docs` builds with --strict, which makes an error of each."""
    assert site.warnings == []
    assert (site.folder / "index.html").is_file()
    # with --quiet nothing is logged, and so nothing is counted by --strict
    assert re.search(r"mkdocs build --strict(?! --quiet)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_broken_links_would_be_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the site report what the test before relies on."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[b](b.md) [c](#c) [d](../d.py) [e](/e)\n")
    (docs / "lost.md").write_text("# Lost\n")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("mkdocs"), "handlers", [handler])
    from mkdocs.commands.build import build

    config = site_config(site_dir=str(tmp_path / "site"), docs_dir=str(docs), nav=[{"Home": "index.md"}])
    config.plugins.clear()
    build(config)
    for target in ("'b.md'", "'#c'", "'../d.py'", "'/e'", "lost.md"):
        assert any(target in line for line in said), target


def _target(site: Site, page: str, link: str) -> tuple[Path, str]:
    """File and anchor that a link within the site leads to."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    start = site.folder if path.startswith("/") else (site.folder / page).parent
    file = (start / path.lstrip("/")).resolve() if path else site.folder / page
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_links_and_anchors_within_the_site(site: Site) -> None:
    broken = []
    for name, page in site.pages.items():
        for link in page.links + page.assets:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            file, anchor = _target(site, name, link)
            if not file.is_file():
                broken.append(f"{name}: {link}")
                continue
            known = site.pages.get(file.relative_to(site.folder.resolve()).as_posix())
            if known is not None and anchor and anchor not in known.anchors:
                broken.append(f"{name}: no anchor {link}")
    assert broken == []
    assert sum(len(page.links) for page in site.pages.values()) > 1000


def test_links_to_other_hosts_are_well_formed(site: Site) -> None:
    hosts = set()
    for name, page in site.pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme and not link.startswith("//"):
                continue
            assert parts.scheme == "https", f"{name}: {link}"
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{name}: {link}"
            assert not re.search(r"[\s<>\"{}|\\^`]", link), f"{name}: {link}"
            hosts.add(parts.netloc)
    assert "arxiv.org" in hosts


def test_no_page_asks_another_host_for_anything(site: Site) -> None:
    for name, page in site.pages.items():
        foreign = [
            a for a in page.assets if not a.startswith("data:") and (urlsplit(a).netloc or urlsplit(a).scheme)
        ]
        assert foreign == [], name
        for script in page.scripts:
            assert not re.search(r"(import|fetch|open)\s*\(?\s*[\"'`]https?:", script), name
        # Material fetches mermaid from another host where a page has a diagram of it
        assert 'class="mermaid"' not in page.path.read_text(encoding="utf-8"), name
    styles = list(site.folder.rglob("*.css"))
    assert styles
    for style in styles:
        for address in re.findall(r"(?:url\(|@import)[^;){]*", style.read_text(encoding="utf-8")):
            assert "data:" in address or "//" not in address, f"{style.name}: {address}"


def _in_nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from _in_nav(child)


def test_scripts_and_sources_are_no_pages(site: Site) -> None:
    assert not list(site.folder.rglob("*.py"))


@pytest.mark.parametrize("name", OWN)
def test_every_accelerator_has_its_page(site: Site, name: str) -> None:
    shown = SHARED_PAGES.get(name, name)
    assert f"accelerators/{shown}.md" in set(_in_nav(site_config().nav))
    page = site.pages[f"accelerators/{shown}.html"]
    assert page.headings == HEADINGS
    text = page.path.read_text(encoding="utf-8")
    # the tables of options, made of the docstring, name every row by its place in the code
    cls = ACCELERATORS[name]
    place = f'title="{cls.__module__}.{cls.__qualname__}.'
    missing = [f.name for f in dataclasses.fields(cls) if f'{place}{f.name}"' not in text]  # type: ignore[arg-type]
    assert missing == []
    source = (PAGES / f"{shown}.md").read_text()
    assert "varaccel generate" in source
    assert name in {"plain"} or f"-a {name}" in source


def test_no_page_of_an_accelerator_that_is_none() -> None:
    assert {p.stem for p in PAGES.glob("*.md")} == {SHARED_PAGES.get(n, n) for n in OWN} | {"index"}


def test_every_recipe_is_shown(site: Site) -> None:
    """In full; what trains or maintains may be linked instead."""
    shown = {code.strip() for page in site.pages.values() for code in page.code}
    for recipe in sorted((ROOT / "pipelines").glob("*.py")):
        copy = site.folder / "repository" / "pipelines" / f"{recipe.name}.txt"
        assert copy.read_bytes() == recipe.read_bytes(), f"no page links to {recipe.name}"
        maintenance = recipe.stem.startswith("train_") or recipe.stem in ("add_drafters", "weights_manifest")
        assert maintenance or recipe.read_text().strip() in shown, recipe.name


def test_measured_figures_are_those_of_the_benches() -> None:
    """Every row of the tables under "Measured" stands in a bench or the report, as it is."""
    measured = {
        line
        for file in (*DOCS.glob("bench*.md"), DOCS / "report.md")
        for line in file.read_text().splitlines()
    }
    rows: dict[str, int] = defaultdict(int)
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        section = re.search(r"^## Measured\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
        if section is None:
            assert page.stem == "index"
            continue
        assert re.search(r"AMD EPYC|NVIDIA H200", section[1]), f"{page.stem} names no machine"
        assert re.search(r"\]\(\.\./(bench|report)", section[1]), f"{page.stem} names no source"
        for line in section[1].splitlines():
            if line.startswith("|"):
                assert line in measured, f"{page.stem}: {line}"
                rows[page.stem] += 1
    assert set(rows) == {p.stem for p in PAGES.glob("*.md")} - {"index"}
    assert min(rows.values()) > 3


def test_choosing_one_repeats_measured_figures() -> None:
    """The figures of the overview stand in the benches, too."""
    measured = " ".join(file.read_text() for file in DOCS.glob("bench*.md"))
    section = re.search(
        r"^## Choosing one\n(.*?)^\*Adherence\*", (PAGES / "index.md").read_text(), re.M | re.S
    )
    assert section is not None
    figures = [
        cell.strip()
        for line in section[1].splitlines()
        if line.strip().startswith("|")
        for cell in line.split("|")
        if re.match(r"\s*\d", cell)
    ]
    assert len(figures) > 30
    assert [figure for figure in figures if figure not in measured] == []


def test_images_are_made_by_the_script(tmp_path: Path) -> None:
    figures: Any = load_script("docs/accelerator_figures.py")
    images = PAGES / "images"
    made = {f"{n}.svg" for n in figures.SCHEMATICS} | {f"{n}.webp" for n in figures.IMAGES}
    assert {p.name for p in images.iterdir()} == made
    assert sum(p.stat().st_size for p in images.iterdir()) < 2.5e6
    for name, draw in figures.SCHEMATICS.items():
        assert (images / f"{name}.svg").read_text(encoding="utf-8") == draw().svg(), f"draw {name} again"
    pages = " ".join(p.read_text() for p in (*DOCS.rglob("*.md"), ROOT / "mkdocs.yml"))
    assert [name for name in made if f"images/{name}" not in pages] == []


def test_names_that_are_described_together() -> None:
    split = load_script("docs/build_hooks/grouped_names.py").split_groups
    text = (
        "Do it.\n\nArgs:\n    a, b: of both,\n        told once.\n    c: alone, though\n\n"
        "Raises:\n    One, two: never."
    )
    expected = (
        "Do it.\n\nArgs:\n    a: of both,\n        told once.\n    b: of both,\n        told once.\n"
        "    c: alone, though\n\nRaises:\n    One, two: never."
    )
    assert split(text) == expected
    assert split("Args:\n    one,\n        more: x", {"more": "**more"}) == "Args:\n    one: x\n    **more: x"


def test_links_out_of_the_docs(tmp_path: Path) -> None:
    """They lead to copies; what does not exist and what is code stays as it is."""
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

    hook = load_script("docs/build_hooks/repository_links.py").on_page_markdown
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "CARD.md").write_text("# card")
    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(docs), "site_dir": str(tmp_path / "site")})
    config.validate()
    files = Files([])
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="deep/page.md"))
    (docs / "deep").mkdir()
    config.plugins._current_plugin = "test"  # as it is while a build runs
    block = "\n\n```md\n[a](../../a.py)\n```\n"
    markdown = "[a](../../a.py) [card](../../CARD.md#x) [gone](../../b.py) [in](../page.md)" + block
    shown = hook(markdown, page=page, config=config, files=files)
    assert shown == (
        "[a](../repository/a.py.txt) [card](../repository/CARD.md.txt#x) [gone](../../b.py) [in](../page.md)"
        + block
    )
    assert sorted(file.src_uri for file in files) == ["repository/CARD.md.txt", "repository/a.py.txt"]


def test_pages_of_notebooks(caplog: pytest.LogCaptureFixture) -> None:
    """Links to pages are mended, loaders of scripts from elsewhere dropped, other pages left alone."""
    from mkdocs.structure.files import File, Files

    hook = load_script("docs/build_hooks/notebook_pages.py").on_page_content
    names = ("notebooks/tour.ipynb", "bench.md", "deep/index.md")
    notebook, bench, deep = (
        File(n, src_dir="docs", dest_dir="site", use_directory_urls=False) for n in names
    )
    files = Files([notebook, bench, deep])
    html = '<script src=""> </script><script>copy()</script><a href="../bench.md#x"></a><a href="../deep/index.md">'
    page: Any = SimpleNamespace(file=notebook)
    mended = '<script>copy()</script><a href="../bench.html#x"></a><a href="../deep/index.html">'
    assert hook(html, page=page, files=files) == mended
    assert hook(html, page=SimpleNamespace(file=bench), files=files) == html
    assert caplog.messages == []
    hook('<a href="../gone.md">', page=page, files=files)
    assert caplog.messages == ["Notebook 'notebooks/tour.ipynb' links to '../gone.md', which is no page."]
