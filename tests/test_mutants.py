"""Planted mistakes can still be planted, and what must find them is there; `make mutants` plants them."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant, table
from tests.mutated import MutatedFinder


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mistake_still_applies(name: str) -> None:
    mutant = MUTANTS[name]
    assert ast.dump(ast.parse(mutant.source())) != ast.dump(ast.parse(mutant.path.read_text()))
    assert importlib.util.find_spec(mutant.module) is not None
    assert mutant.tests
    for test in mutant.tests:
        file, _, rest = test.partition("::")
        assert f"def {rest.partition('[')[0]}(" in (ROOT / file).read_text()


def test_a_mistake_that_no_longer_applies_is_told() -> None:
    mutant = next(iter(MUTANTS.values()))
    for old, count in (("no such source", 0), ("import", 8)):
        with pytest.raises(ValueError, match=f"stands {count}|stands [0-9]+ times in"):
            replace(mutant, old=old).source()


def test_the_changed_source_is_what_is_imported() -> None:
    mutant = Mutant("", "files.py", "from __future__", "planted = 1\nfrom __future__", ())
    spec = MutatedFinder(mutant).find_spec(mutant.module, [str(ROOT / "varaccel")])
    assert spec is not None
    assert MutatedFinder(mutant).find_spec("varaccel.errors", [str(ROOT / "varaccel")]) is None
    with pytest.raises(SyntaxError, match="__future__"):
        spec.loader.get_code(mutant.module)  # type: ignore[union-attr]


def test_the_documentation_lists_them() -> None:
    assert table() in (ROOT / "docs" / "exactness.md").read_text()
    listed = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout == table() + "\n"


@pytest.mark.slow
def test_what_is_not_found_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner tells a test that fails from one that passes."""
    name = "scale-shares-a-number"
    assert mutants.main([name]) == 0
    assert "1 of 1 found" in capsys.readouterr().out
    passes = (f"{mutants.LONG}::test_the_chain_agrees_with_itself",)
    monkeypatch.setitem(MUTANTS, name, replace(MUTANTS[name], tests=passes))
    assert mutants.verdict(name).startswith("no: ")


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutants.main(["stream-repeat"])
    assert "unknown mistake 'stream-repeat'" in capsys.readouterr().err
