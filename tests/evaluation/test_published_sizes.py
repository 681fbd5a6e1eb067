"""The suites of published sizes: end to end with tiny networks, resumed, and what they compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT, load_script
from tests.tiny import pipeline
from varaccel.engine.pass_curve import PassCurve
from varaccel.evaluation.speed.probe import pass_times
from varaccel.evaluation.speed.size_catalog import GPU, SUITES
from varaccel.evaluation.speed.size_report import computed_rows, tokens_read


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["published_sizes.py", *map(str, arguments)])
    return load_script("eval/published_sizes.py").main()


@pytest.mark.slow
@pytest.mark.timeout(900)  # everything is compiled once
def test_the_gpu_suite_runs_from_end_to_end_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--suite", "gpu", "--dry-run", "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert "failed" not in shown.err
    found = json.loads((tmp_path / "sizes.json").read_text())
    assert found["failed"] == {}
    measured = {(piece["family"], piece["kind"]) for piece in found["pieces"]}
    assert measured == {(size.family, kind) for size in GPU.sizes for kind in size.kinds}
    assert (tmp_path / "sizes.md").read_text() in shown.out
    assert (tmp_path / "sizes.png").stat().st_size > 0
    for heading in ("Time per pass", "the published loop", "measured", "computed"):
        assert heading in shown.out
    # a finished piece stays as it is, one that is missing is measured
    pieces = sorted((tmp_path / "pieces").glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in pieces}
    missing = next(path for path in pieces if path.name.endswith("loop.json"))
    missing.unlink()
    assert run(monkeypatch, "--suite", "gpu", "--dry-run", "--out", tmp_path) == 0
    after = {path: path.stat().st_mtime_ns for path in pieces}
    assert {path for path in pieces if before[path] != after[path]} == {missing}


def test_pieces_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--suite", "gpu", "--list", "--only", "VAR-d36", "--out", tmp_path) == 0
    assert capsys.readouterr().out.split() == ["VAR-d36.curve", "VAR-d36.compiled", "VAR-d36.loop"]
    assert run(monkeypatch, "--suite", "cpu", "--only", "VAR-d36", "--out", tmp_path) == 2
    assert "no size or piece 'VAR-d36'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for suite in SUITES.values():
        names = [size.name for size in suite.sizes]
        assert len(set(names)) == len(names)


def test_passes_of_every_number_of_tokens_that_fits_are_timed() -> None:
    found = pass_times(pipeline("c2i"), [0, 1, 2], (1, 4, 7, 8, 64), rounds=1)
    assert sorted(found.curve.seconds) == [
        (1, 6),
        (4, 6),
        (7, 6),
    ]  # 8 of 16 positions are filled, one is decided
    operations = [found.works[count].operations for count in (1, 4, 7)]
    assert operations == sorted(operations)
    assert found.works[1].weight_bytes == found.works[7].weight_bytes > 0


def test_computed_speedups() -> None:
    curve = PassCurve({(count, 2): 1 + 0.1 * (count - 1) for count in (1, 8, 16)})
    rows = computed_rows(curve, 2, ROOT / "docs" / "bench.json")
    by_name = {row["accelerator"]: row for row in rows}
    assert by_name["plain()"]["speedup"] == 1
    assert all(row["computed"] for row in rows)
    jacobi = next(row for row in rows if row["accelerator"].startswith("jacobi") and row["tokens_read"] == 16)
    assert jacobi["speedup"] == pytest.approx(jacobi["tokens_per_pass"] / 2.5)


@pytest.mark.parametrize(
    ("accelerator", "options", "count"),
    [
        ("plain", {}, 1),
        ("jacobi", {"window": 8, "row_window": None}, 8),
        ("jacobi", {"window": 8, "row_window": 4}, None),
        ("speculative", {"tree": 5}, 6),
        ("lantern", {"tree": 8}, 9),
        ("speculative", {"tree": "dynamic"}, None),
        ("zipar", {"window": 4}, None),
    ],
)
def test_tokens_that_a_pass_reads(accelerator: str, options: dict[str, object], count: int | None) -> None:
    assert tokens_read(accelerator, options) == count
