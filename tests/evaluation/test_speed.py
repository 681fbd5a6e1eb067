"""Phases, peak memory, floors and sweeps. Tiny models, so that seconds mean nothing here but counts do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.scripts import ROOT, load_script
from tests.tiny import GRID, PROMPTS, new_pipeline, pipeline, var_transformer
from varaccel import CoDe, InputError, Plain, ZipAR
from varaccel.accelerators.code import Refiner
from varaccel.accelerators.notation import parse_grid
from varaccel.evaluation.bench.grids import speed_grid
from varaccel.evaluation.bench.report import BenchReport
from varaccel.evaluation.speed.call_speed import Measurement, measure_speed
from varaccel.evaluation.speed.peak_memory import PeakMemory
from varaccel.evaluation.speed.roofline import (
    Floor,
    Work,
    WorkCounter,
    count_work,
    floor_of,
    mean_work,
    measure_bandwidth,
)
from varaccel.evaluation.speed.speed_sweep import sweep
from varaccel.evaluation.speed.sweep_report import CompileGain, SweepReport

CPU = torch.device("cpu")
FAMILIES = ("c2i", "t2i", "var-class", "var-caption", "infinity", "mar-class")
TOKENS = GRID**2


# -- phases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_first_pass_is_a_part_of_the_token_time(family: str) -> None:
    stats = pipeline(family)(PROMPTS[family], seed=0).stats
    assert list(stats.seconds) == ["text", "tokens", "decode"]
    assert 0 < stats.first_pass_seconds < stats.seconds["tokens"]
    assert stats.total_seconds == sum(stats.seconds.values())
    assert stats.to_dict()["first_pass_seconds"] == stats.first_pass_seconds


def test_first_pass_ends_before_the_callback() -> None:
    """What a caller does after a pass is no part of it."""
    import time

    def wait(*_: Any) -> None:
        time.sleep(0.05)

    stats = pipeline("var-class")(0, seed=0, callback_on_step_end=wait).stats
    assert stats.seconds["tokens"] > 0.15
    assert stats.first_pass_seconds < 0.1


@pytest.mark.parametrize("family", ["t2i", "var-caption", "mar-class"])
def test_phases_add_up(family: str) -> None:
    accelerators = {"t2i": [ZipAR(2)], "var-caption": [CoDe(draft_scales=2)], "mar-class": []}[family]
    report = measure_speed(pipeline(family), PROMPTS[family], accelerators, batch=1, repeats=3)
    for one in report.measurements:
        assert set(one.phases) == {"text", "prefill", "steps"}, "nothing was decoded"
        pairs = zip(one.phases["prefill"], one.phases["steps"], strict=True)
        assert [a + b for a, b in pairs] == pytest.approx(list(one.seconds))
        assert all(second > 0 for seconds in one.phases.values() for second in seconds)
        assert one.total_speedup is None
        assert one.details.keys() <= {"stages"}


def test_decoding_is_measured_if_asked_for() -> None:
    plain, zipar = measure_speed(
        pipeline("t2i"), PROMPTS["t2i"], [ZipAR(2)], repeats=3, decode=True
    ).measurements
    assert plain.total_speedup == 1
    for one in (plain, zipar):
        assert len(one.phases["decode"]) == 3
        assert min(one.phases["decode"]) > 0
    whole = [sum(parts) for parts in zip(*plain.phases.values(), strict=True)]
    ratios = [
        a / sum(parts) for a, parts in zip(whole, zip(*zipar.phases.values(), strict=True), strict=True)
    ]
    assert zipar.total_speedup == pytest.approx(sorted(ratios)[1])


def test_rounds_that_warm_up() -> None:
    seen: list[str] = []
    report = measure_speed(
        pipeline("c2i"), [0], [], repeats=2, warmups=3, on_call=lambda one: seen.append(one.name)
    )
    assert len(seen) == 5
    assert len(report.measurements[0].seconds) == 2
    with pytest.raises(InputError, match="warmups"):
        measure_speed(pipeline("c2i"), [0], [], warmups=0)


@pytest.mark.parametrize("name", ["bench", "bench-var", "bench-mar"])
def test_reports_of_old_are_read(name: str) -> None:
    report = BenchReport.from_dict(json.loads((ROOT / "docs" / f"{name}.json").read_text()))
    measured = [one for row in report.rows for one in row.speed.values()]
    assert measured
    assert BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_measurements_without_later_fields_are_read() -> None:
    old = {
        **{"accelerator": "plain", "options": {}, "lossless": True, "passes": 4.0, "tokens_per_pass": 4.0},
        **{"seconds": [1.0, 2.0], "speedup": 1.0, "speedup_spread": [1.0, 1.0]},
    }
    read = Measurement.from_dict(old)
    assert read.seconds == (1.0, 2.0)
    assert (read.phases, read.peak_bytes, read.total_speedup) == ({}, None, None)


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peak_memory_of_a_block() -> None:
    with PeakMemory(CPU) as before:
        pass
    with PeakMemory(CPU) as during:
        block = torch.ones(200 * 2**20, dtype=torch.uint8)
        del block
    with PeakMemory(CPU) as after:
        pass
    assert before.bytes is not None
    assert during.bytes is not None
    assert after.bytes is not None
    assert 190 * 2**20 < during.bytes - before.bytes < 260 * 2**20
    assert during.bytes - after.bytes > 150 * 2**20, "the peak is of one block, not of all before it"


def test_peak_memory_where_nothing_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("varaccel.evaluation.speed.peak_memory._RESET", tmp_path / "missing" / "clear_refs")
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes is None
    report = measure_speed(pipeline("c2i"), [0], [], repeats=1)
    assert report.measurements[0].peak_bytes is None


# -- floors --------------------------------------------------------------------------------------------


def linear_weights(network: nn.Module) -> int:
    """Numbers in the matrices of all linear layers."""
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))


def llamagen_operations(network: Any, rows: int) -> int:
    """Of an image of a class-conditional model: one token a pass, and position i looks at i + 1 slots."""
    attention = sum(
        4 * network.config.dim * slots * network.config.num_layers for slots in range(1, TOKENS + 1)
    )
    return rows * (2 * linear_weights(network) * TOKENS + attention)


def test_work_of_plain_llamagen_by_hand() -> None:
    """Every pass reads every linear layer once; the prefill is a pass, and decides the first token."""
    pipe = pipeline("c2i")
    size = 4 * linear_weights(pipe.transformer)
    work = count_work(pipe, [0])
    assert work == Work(TOKENS * size, llamagen_operations(pipe.transformer, 2), size)
    unguided = count_work(pipe, [0], guidance_scale=1.0)
    assert unguided == Work(work.weight_bytes, llamagen_operations(pipe.transformer, 1), size)


def test_a_batch_reads_the_same_weights() -> None:
    for family in ("c2i", "var-class"):
        one, three = (count_work(pipeline(family), PROMPTS["c2i"][:n]) for n in (1, 3))
        assert three.weight_bytes == one.weight_bytes
        assert three.operations > 2.5 * one.operations
    pipe = pipeline("c2i")
    assert three.network_bytes == one.network_bytes
    assert count_work(pipe, PROMPTS["c2i"]).operations == 3 * count_work(pipe, [0]).operations


def test_fewer_passes_read_fewer_weights() -> None:
    pipe = pipeline("c2i")
    passes = 2 * GRID - 1
    assert pipe(0, accelerator=ZipAR(1)).stats.passes == passes
    assert count_work(pipe, [0], ZipAR(1)).weight_bytes == passes * 4 * linear_weights(pipe.transformer)


def test_the_text_encoder_is_left_out() -> None:
    """A prompt's floor is that of a class, but for the projection of the caption and its slots."""
    pipe = pipeline("t2i")
    network = pipe.transformer
    projection = 4 * linear_weights(network.cls_embedding)
    layers = 4 * linear_weights(network) - projection
    work = count_work(pipe, ["a red sphere"])
    assert work.weight_bytes == TOKENS * layers + projection
    assert work.network_bytes == layers + projection
    assert not pipe.text_encoder._forward_hooks
    assert not pipe.text_encoder._forward_pre_hooks


def test_half_precision_is_half_the_bytes() -> None:
    pipe = new_pipeline("c2i")
    whole = count_work(pipe, [0])
    pipe.transformer.to(torch.bfloat16)
    half = count_work(pipe, [0])
    assert (2 * half.weight_bytes, half.operations) == (whole.weight_bytes, whole.operations)


def test_the_refiner_of_code_is_seen() -> None:
    """Wherever the network comes from: its weights are read for its scales, the model's for its own."""
    pipe = new_pipeline("var-class")
    came = count_work(pipe, [0], CoDe(draft_scales=2))
    assert came == count_work(pipe, [0], CoDe(pipe.refiner, draft_scales=2))
    plain = count_work(pipe, [0])
    assert came.network_bytes > plain.network_bytes, "both networks"
    assert came.operations < plain.operations
    # networks that are no component of the pipeline, one layer apart
    shallow, deep = (var_transformer("class", seed=7, depth=depth) for depth in (1, 2))
    alone = [count_work(pipe, [0], Refiner(network)) for network in (shallow, deep)]
    code = [count_work(pipe, [0], CoDe(network, draft_scales=2)) for network in (shallow, deep)]
    layer = alone[1].network_bytes - alone[0].network_bytes
    assert layer > 0
    assert code[1].network_bytes - code[0].network_bytes == layer
    assert code[1].weight_bytes - code[0].weight_bytes >= layer
    assert code[1] == came, "other numbers, the same work"


def test_the_head_of_a_masked_model_is_counted_at_every_step() -> None:
    pipe = pipeline("mar-class")
    few, many = (count_work(pipe, [0], num_iterations=4, head_steps=n) for n in (2, 6))
    blocks = pipe.transformer.head.res_blocks
    per_step = 4 * sum(linear_weights(block.mlp) for block in blocks)  # type: ignore[union-attr]
    assert many.weight_bytes - few.weight_bytes >= 4 * 4 * per_step
    assert many.network_bytes == few.network_bytes


def test_no_graph_hides_the_head() -> None:
    """On a GPU its loop is replayed from a CUDA graph, but not while its operations are counted."""
    pipe = new_pipeline("mar-class")
    graphs, seen = pipe._graphs, []  # type: ignore[attr-defined]

    def look(host: Any, *_: Any) -> None:
        seen.append(host._graphs)

    count_work(pipe, [0], num_iterations=2, head_steps=2, callback_on_step_end=look)
    assert seen == [None, None]
    assert pipe._graphs is graphs  # type: ignore[attr-defined]


def test_what_counts_as_a_weight() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    with torch.inference_mode(), WorkCounter() as counter:
        x = torch.ones(3, 4)
        x @ weight[:, :2]  # a part of it
        x @ weight.double().float()  # a copy is none
        torch.ones(2, 2) @ torch.ones(2, 2)
        torch.baddbmm(torch.zeros(5, 3, 6), x.expand(5, 3, 4), weight.expand(5, 4, 6))
    assert counter.work.weight_bytes == 4 * (4 * 2 + 4 * 6), "what is expanded lies there once"
    assert counter.work.operations == 2 * (3 * 4 * 2 + 3 * 4 * 6 + 2 * 2 * 2 + 5 * 3 * 4 * 6)
    assert counter.work.network_bytes == 4 * 4 * 6


def test_counting_changes_nothing() -> None:
    pipe = pipeline("var-caption")
    before = pipe(PROMPTS["t2i"], seed=3, output_type="latent").images
    count_work(pipe, PROMPTS["t2i"], seed=3)
    assert torch.equal(before, pipe(PROMPTS["t2i"], seed=3, output_type="latent").images)


@pytest.mark.parametrize("family", ["c2i", "var-class", "mar-class"])
def test_compiled_pipelines_are_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: function
    )  # the real one takes seconds to import
    pipe = new_pipeline(family)
    assert not pipe.is_compiled
    pipe.compile()
    assert pipe.is_compiled
    with pytest.raises(InputError, match=r"before compile\(\)"):
        count_work(pipe, [0])
    with pytest.raises(InputError, match="compiled already"):
        sweep(pipe, [], [0], progress=False)


def test_floors() -> None:
    floor = Floor(weight_bytes=600, operations=1000, bandwidth=100.0, rate=500.0)
    assert (floor.memory_seconds, floor.arithmetic_seconds) == (6, 2)
    assert (floor.seconds, floor.binds) == (6, "memory")
    assert Floor(600, 10000, 100.0, 500.0).binds == "arithmetic"
    assert floor.to_dict()["seconds"] == 6
    assert mean_work([Work(1, 10, 5), Work(4, 20, 7)]) == Work(2, 15, 7)


def test_rates_of_the_device() -> None:
    floor = floor_of(Work(10**9, 10**9, 10**9), CPU, torch.float32)
    assert 1e8 < floor.bandwidth < 1e13
    assert 1e8 < floor.rate < 1e15
    assert measure_bandwidth(CPU) == floor.bandwidth, "measured once"


# -- sweeps --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> SweepReport:
    prompts = ["a red sphere", "a blue cube", "sphere", "cube"]
    return sweep(
        pipeline("t2i"),
        [ZipAR(1), Plain()],
        prompts,
        (1, 2),
        2,
        model="tiny",
        progress=False,
        guidance_scale=1.5,
    )


def test_a_sweep_measures_everything(report: SweepReport) -> None:
    assert [(e.batch, e.measurement.accelerator) for e in report.entries] == [
        *((1, "plain"), (1, "zipar"), (2, "plain"), (2, "zipar"))
    ]
    assert report.threads == torch.get_num_threads()
    assert (report.dtype, report.call, report.gains) == ("float32", {"guidance_scale": 1.5}, ())
    for entry in report.entries:
        assert len(entry.measurement.seconds) == 2
        assert set(entry.measurement.phases) == {"text", "prefill", "steps", "decode"}
        assert entry.reached == entry.floor.seconds / entry.measurement.median_seconds
        assert 0 < entry.reached < 1, "Python takes longer than such networks"
    one, two = report.entries[0].floor, report.entries[2].floor
    assert (one.weight_bytes, 2 * one.operations) == (two.weight_bytes, two.operations)


def test_a_sweep_goes_through_json(report: SweepReport) -> None:
    assert SweepReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    for values in ({}, [], {"entries": 3}, {"entries": [], "gains": []}):
        with pytest.raises(InputError, match="no report"):
            SweepReport.from_dict(values)  # type: ignore[arg-type]


def test_a_sweep_is_shown(report: SweepReport) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report.table())
    shown = captured.get()
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    header, rule, *lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    for text in (shown, report.markdown()):
        for word in ("zipar", "window=1", "lossless", "approximate", "prefill", "decode", "reached", "Floor"):
            assert word in text


def test_eager_and_compiled_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: what `compile` sets is switched on and off, and nothing of it stays."""
    pipe = new_pipeline("c2i")
    used = []

    def compiled(function: Any, **_: Any) -> Any:
        def transform(*arguments: Any) -> torch.Tensor:
            used.append("compiled")
            return function(*arguments)

        return transform

    monkeypatch.setattr(torch, "compile", compiled)
    saved: list[SweepReport] = []
    report = sweep(
        pipe,
        [ZipAR(1)],
        [0, 1],
        (1, 2),
        2,
        compiled=(True, False),
        decode=False,
        progress=False,
        on_entries=saved.append,
    )
    assert not pipe.is_compiled
    assert [(e.batch, e.compiled) for e in report.entries] == [
        *([(1, False)] * 2 + [(1, True)] * 2 + [(2, False)] * 2 + [(2, True)] * 2)
    ]
    assert [len(part.entries) for part in saved] == [4, 8]
    # the prefill runs eagerly; per batch three rounds of plain and zipar, then three of plain by turns
    assert len(used) == 2 * 3 * ((TOKENS - 1) + (2 * GRID - 2) + (TOKENS - 1))
    assert [gain.batch for gain in report.gains] == [1, 2]
    assert all(len(gain.compiled_seconds) == len(gain.eager_seconds) == 2 for gain in report.gains)
    assert SweepReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "compiled" in report.markdown()
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report.table())
    assert "…" not in captured.get()


def test_gain_of_compiling() -> None:
    gain = CompileGain(4, (2.0, 6.0, 4.0), (1.0, 2.0, 1.0))
    assert gain.speedup == 3
    assert "3.00x eager plain decoding (2.00 to 4.00) at batch 4" in str(gain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": ()}, "batches"),
        ({"batches": (3,)}, r"prompts \(2\)"),
        ({"repeats": 0}, "repeats"),
        ({"compiled": ()}, "compiled"),
        ({"accelerators": [CoDe()]}, "code"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_sweeps_that_cannot_be(options: dict[str, Any], words: str) -> None:
    arguments = {"accelerators": [], "prompts": [0, 1], **options}
    with pytest.raises(InputError, match=words):
        sweep(pipeline("c2i"), progress=False, **arguments)


# -- the script ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("eval/speed.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    new_pipeline("c2i").save_pretrained(folder)
    return folder


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/speed.py", *words])


def test_the_script(
    script: ModuleType,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "speed.json"
    typed(monkeypatch, "--model", str(saved), "--repeats", "1", "--batch", "2", "--out", str(out))
    assert script.main() == 0
    report = SweepReport.from_dict(json.loads(out.read_text()))
    assert [e.measurement.accelerator for e in report.entries] == ["plain", "jacobi", "zipar"]
    assert report.decoded
    assert "whole" in capsys.readouterr().out
    words = ("-a", "zipar:window=1", "--repeats", "1", "--tokens-only", "--markdown")
    typed(monkeypatch, "--model", str(saved), *words)
    assert script.main() == 0
    assert "| zipar window=1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch", "0"], "at least 1"),
        (["-a", "zippar"], "did you mean 'zipar'"),
        (["--dtype", "float8"], "unknown precision"),
        (["--model", "nothing-there"], "unknown model"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_script_refuses_in_one_sentence(
    script: ModuleType,
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, *words)
    assert script.main() == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert sentence in said
    assert "\n" not in said


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_script_compares_by_itself(family: str) -> None:
    pipe = pipeline(family)
    grid = parse_grid(speed_grid(pipe))
    assert grid
    assert all(issubclass(pipe.job_type, one.job_type) for one in grid)
