"""The page in the browser: its one function, its notices, and one visit over the loopback."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scripts import load_script
from tests.tiny import GRID, new_pipeline, pipeline
from varaccel import Plain, ZipAR
from varaccel.decoding.accelerator import ACCELERATORS
from varaccel.errors import CheckpointError, InputError

gradio = pytest.importorskip("gradio")

Generate = Callable[..., tuple[list[Image.Image], list[Image.Image], list[list[Any]]]]
GOOD: dict[str, Any] = {
    "prompt": "a red sphere",
    "model": "tiny",
    "accelerator": "zipar",
    "window": 2,
    "seed": 3,
    "guidance_scale": 2.0,
    "count": 2,
}


@pytest.fixture(scope="module")
def app() -> ModuleType:
    return load_script("app/app.py")


def load(name: str) -> Any:
    if name != "tiny":
        raise CheckpointError(f"<b>{name}</b> is not there.")
    return pipeline("t2i")


@pytest.fixture(scope="module")
def page(app: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = app.build(load, ["tiny", "absent"])
        yield page
        page.close()


@pytest.fixture(scope="module")
def generate(page: Any) -> Generate:
    return next(event.fn for event in page.fns.values() if event.api_name == "generate")


def test_both_sides_draw_what_the_pipeline_draws(generate: Generate) -> None:
    plain, fast, rows = generate(**GOOD)
    call: dict[str, Any] = {"seed": 3, "guidance_scale": 2.0, "num_images_per_prompt": 2}
    for images, accelerator in ((plain, Plain()), (fast, ZipAR(2))):
        expected = pipeline("t2i")("a red sphere", accelerator=accelerator, **call).images
        assert [i.tobytes() for i in images] == [i.tobytes() for i in expected]
    assert [row[:4] for row in rows] == [
        ["plain()", "lossless", GRID**2, "1.00"],
        ["zipar(window=2)", "approximate", GRID + (GRID - 1) * 2, "1.60"],
    ]
    assert rows[0][-1] == "1.00x"
    assert float(rows[1][-1].removesuffix("x")) > 0


@pytest.mark.parametrize(
    "name", [n for n, a in ACCELERATORS.items() if n != "plain" and "llamagen" in a.hosts]
)
def test_every_accelerator_can_be_chosen(app: ModuleType, generate: Generate, name: str) -> None:
    _, images, rows = generate(**{**GOOD, "accelerator": name, "window": GRID, "count": 1})
    assert len(images) == 1
    chosen = "jacobi" if name == "auto" else name  # the page names what was chosen
    assert rows[1][0].startswith(f"{chosen}(")


def test_measured_calls_are_warm_and_whole(app: ModuleType) -> None:
    """Each side first draws a few passes of the same shapes, and is then timed without an observer."""
    calls: list[tuple[str, bool]] = []
    pipe = new_pipeline("t2i")

    def watched(**call: Any) -> Any:
        calls.append((call["accelerator"].name, "callback_on_step_end" in call))
        output = pipe(**call)
        assert output.stats.rows == 6, "three guided pictures"
        assert (output.stats.passes == app.WARM_UP_PASSES) == calls[-1][1]
        return output

    app.compare(watched, "a red sphere", ZipAR(2), seed=0, guidance_scale=2.0, count=3)
    assert calls == [("plain", True), ("zipar", True), ("plain", False), ("zipar", False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "no text"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"count": 0}, "1 to 4"),
        ({"count": 5}, "1 to 4"),
        ({"window": 0}, "window"),
        ({"model": "absent"}, "&lt;b&gt;absent"),
    ],
    ids=str,
)
def test_errors_of_the_library_are_notices(generate: Generate, change: dict[str, Any], message: str) -> None:
    with pytest.raises(gradio.Error, match=message):
        generate(**{**GOOD, **change})


def test_warnings_of_the_library_are_notices(generate: Generate) -> None:
    with pytest.warns(UserWarning, match="never seen the words: zebra; they are ignored") as told:
        generate(**{**GOOD, "prompt": "a zebra"})
    assert len(told) == 1, "four calls of the pipeline, one notice"


def test_a_failure_of_another_kind_is_not_hidden(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline("t2i").vq_model, "decode_codes", fail)
    with pytest.raises(ZeroDivisionError):
        generate(**GOOD)


def test_page_needs_a_model(app: ModuleType) -> None:
    with pytest.raises(InputError, match="--model"):
        app.build(load, [])
    with pytest.raises(CheckpointError):
        app.build(load, ["absent"])


def test_unusable_model_ends_the_script_with_a_sentence(
    app: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        app.main(["--model", "absent"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("varaccel: unknown model 'absent'")
    assert error.count("\n") == 1


def test_a_visit(app: ModuleType, page: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    hosts: set[str | None] = set()
    look_up = socket.getaddrinfo

    def watched(host: str | None, *arguments: Any, **options: Any) -> Any:
        hosts.add(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    # only the client of this test asks the hub for something when it is made
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not page.analytics_enabled
    address = app.serve(page, prevent_thread_lock=True, quiet=True)
    assert address.startswith("http://127.0.0.1:")
    client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path)
    try:
        arguments = ("a red sphere", "tiny", "zipar", 2, 3, 2.0, 1)
        plain, fast, costs = client.predict(*arguments, api_name="/generate")
        for gallery, accelerator in ((plain, "plain"), (fast, ZipAR(2))):
            with Image.open(gallery[0]["image"]) as picture:
                shown = np.asarray(picture.convert("RGB"))
            expected = pipeline("t2i")("a red sphere", seed=3, guidance_scale=2.0, accelerator=accelerator)
            assert np.array_equal(shown, np.asarray(expected.images[0]))
        assert costs["headers"] == list(app.COLUMNS)
        assert costs["data"][1][0] == "zipar(window=2)"
        with pytest.raises(AppError, match="holds no text"):
            client.predict("", *arguments[1:], api_name="/generate")
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(InputError, match=f"port {port}"):
            app.serve(app.build(load, ["tiny"]), port, prevent_thread_lock=True, quiet=True)
        assert not any("googleapis" in sheet for sheet in client.config["stylesheets"])
    finally:
        client.close()
    assert hosts == {"127.0.0.1"}, "the page and its server speak to this machine only"


def test_randomness_of_the_process_is_left_alone(generate: Generate) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(**GOOD)
    assert torch.equal(before, torch.get_rng_state())
