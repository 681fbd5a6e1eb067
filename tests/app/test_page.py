"""The page as a whole: what may be chosen, the endpoint for programs, notices, and visits over the loopback."""

from __future__ import annotations

import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tests.scripts import load_script
from tests.tiny import GRID, pipeline
from varaccel.__main__ import main
from varaccel.accelerators import ACCELERATORS
from varaccel.app.inpaint_tab import image_and_mask, painting_models
from varaccel.app.models import ModelShelf, pipeline_type_of
from varaccel.app.notices import shown_on_page
from varaccel.app.option_controls import chosen_options, options_of
from varaccel.app.page import PageSettings, build, calls_in_memory, new_studio, serve
from varaccel.app.studio import Studio, checked_count, checked_guidance, checked_seed
from varaccel.engine.accelerator import fitting
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.var import VARPipeline

HOSTS = {"raster": "t2i", "scales": "var-class", "masked": "mar-class"}
PROMPTS = {"raster": "a red sphere", "scales": "goldfish", "masked": "hen"}


def load(name: str) -> Any:
    if name not in HOSTS:
        raise CheckpointError(f"<b>{name}</b> is not there.")
    return pipeline(HOSTS[name])


def new(*names: str, **changes: Any) -> Studio:
    return Studio(ModelShelf(names or (*HOSTS, "absent"), load), **changes)


@pytest.fixture(scope="module")
def studio() -> Studio:
    studio = new(concurrency=2)
    studio.shelf._types["absent"] = LlamaGenPipeline  # its folder would tell
    return studio


@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[str | None]]:
    """Hosts that anything in this process looked up while the page ran."""
    hosts: set[str | None] = set()
    look_up = socket.getaddrinfo

    def watched(host: str | None, *arguments: Any, **options: Any) -> Any:
        hosts.add(host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        yield hosts


@pytest.fixture(scope="module")
def address(
    studio: Studio, looked_up: set[str | None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = build(studio)
        yield serve(page, prevent_thread_lock=True)
        page.close()


@pytest.fixture
def client(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    # only the client of this test asks the hub for something when it is made
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path)
    yield client
    client.close()


def draw(client: Client, model: str, accelerator: str = "plain", **changes: Any) -> Any:
    call: dict[str, Any] = {
        "prompt": PROMPTS.get(model, "a"),
        "model": model,
        "accelerator": accelerator,
        "options": {},
        "seed": 3,
        "guidance_scale": 2.0,
        "count": 1,
    }
    return client.predict(*{**call, **changes}.values(), api_name="/draw")


# -- the endpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", HOSTS)
def test_the_endpoint_draws_what_the_pipeline_draws(client: Client, model: str) -> None:
    gallery, cost = draw(client, model, count=2)
    expected = load(model)(
        PROMPTS[model], seed=3, guidance_scale=2.0, num_images_per_prompt=2, accelerator="plain"
    )
    for shown, image in zip(gallery, expected.images, strict=True):
        with Image.open(shown["image"]) as drawn:
            assert np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(image))
    assert cost["passes"] == expected.stats.passes
    assert cost["lossless"]


def test_options_arrive(client: Client) -> None:
    _, cost = draw(client, "raster", "zipar", options={"window": 1})
    assert cost["passes"] == GRID + GRID - 1
    assert not cost["lossless"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "no text"),
        ({"seed": -1}, "seed"),
        ({"count": 5}, "1 to 4"),
        ({"accelerator": "zipar", "options": {"window": 0}}, "window"),
        ({"accelerator": "zipar", "options": {"windw": 1}}, "unknown option"),
        ({"accelerator": "code"}, "does not work on llamagen models"),
        ({"accelerator": "speculative", "options": {"tree": 100000}}, "numbers up to 1000"),
        (
            {"accelerator": "zipar", "options": {"window": 1.5}},
            "must be an integer of at least 1, got 1.5",
        ),  # no HTML
        ({"seed": 1.5}, "whole number"),
        ({"count": 1.5}, "1 to 4"),
        ({"seed": True}, "seed"),
        ({"model": "absent"}, "<b>absent"),
        ({"model": "/etc"}, "not in the list of choices"),
        (
            {"model": "scales", "prompt": "hen", "accelerator": "code", "options": {"refiner": "/etc"}},
            "model of this page",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_sentences(client: Client, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message):
        draw(client, **{"model": "raster", **change})


def test_the_endpoint_is_described(client: Client) -> None:
    api = client.view_api(return_format="dict", print_info=False)
    assert isinstance(api, dict)
    assert list(api["named_endpoints"]) == ["/draw"], "the events of the page are its own"
    parameters = [p["parameter_name"] for p in api["named_endpoints"]["/draw"]["parameters"]]
    assert parameters == ["prompt", "model", "accelerator", "options", "seed", "guidance_scale", "count"]


def test_two_visitors_at_once(address: str, client: Client) -> None:
    jobs = [
        client.submit("a red sphere", "raster", "plain", {}, seed, 2.0, 1, api_name="/draw")
        for seed in (1, 2)
    ]
    for seed, job in zip((1, 2), jobs, strict=True):
        gallery, _ = job.result(timeout=60)
        expected = pipeline("t2i")("a red sphere", seed=seed, guidance_scale=2.0).images[0]
        with Image.open(gallery[0]["image"]) as drawn:
            assert np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(expected))


def test_a_call_that_takes_too_long_is_stopped(
    studio: Studio, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "seconds_limit", -1.0)
    with pytest.raises(AppError, match="time limit"):
        draw(client, "raster")


def test_no_file_of_the_machine_can_be_read(address: str) -> None:
    for path in (Path(__file__), Path("/etc/passwd"), Path("pyproject.toml").absolute()):
        answer = httpx.get(f"{address}gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
    assert httpx.get(address).status_code == 200


def test_the_page_asks_nobody_else(address: str, looked_up: set[str | None]) -> None:
    page = httpx.get(address).text
    assert "googleapis" not in page
    assert "cdn" not in page.lower().replace("cdnav", "")
    assert looked_up <= {"127.0.0.1", "localhost"}


def test_it_listens_to_this_machine_alone(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"port {port}"):
        serve(build(new("raster")), port=port, prevent_thread_lock=True)


def test_randomness_of_the_process_is_left_alone(client: Client) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(client, "raster")
    assert torch.equal(before, torch.get_rng_state())


# -- models --------------------------------------------------------------------------------------------


def test_models_are_loaded_once_and_large_ones_replace_each_other() -> None:
    loaded: list[str] = []

    def note(name: str) -> Any:
        loaded.append(name)
        return object()

    shelf = ModelShelf(["small", "large", "larger"], note, kept=["small"])
    small = shelf.pipeline("small")
    large = shelf.pipeline("large")
    assert shelf.pipeline("large") is large
    shelf.pipeline("larger")
    assert shelf.pipeline("small") is small
    assert shelf.pipeline("large") is not large, "one large model at a time"
    assert loaded == ["small", "large", "larger", "large"]


def test_two_visitors_load_a_model_once() -> None:
    loaded: list[str] = []

    def slow(name: str) -> Any:
        time.sleep(0.1)
        loaded.append(name)
        return object()

    shelf = ModelShelf(["m"], slow)
    threads = [threading.Thread(target=shelf.pipeline, args=("m",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["m"]


def test_only_what_is_offered_can_be_loaded() -> None:
    shelf = new("raster").shelf
    with pytest.raises(InputError, match="unknown model of this page"):
        shelf.pipeline("/somewhere")
    for name, options in (("code", {"refiner": "/somewhere"}), ("cspd", {"drafter": "a/b"})):
        with pytest.raises(InputError, match="unknown model of this page"):
            shelf.accelerator(name, options)
    assert shelf.accelerator("speculative", {"drafter": "eagle"}).options()["drafter"] == "eagle"
    free = ModelShelf(["raster"], load, any_model=True)
    with pytest.raises(CheckpointError):
        free.pipeline("/somewhere")
    assert free.accelerator("code", {"refiner": "/somewhere"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("speculative", {"tree": 1001}),
        ("speculative", {"tree": [[0], [0, 5000]], "verification": "matching"}),
        ("speculative", {"tree": {"total": 10**6}}),
        ("speculative", {"tree": {"total": 10**6}, "drafter": "layers"}),
        ("jacobi", {"window": 10**7}),
        ("cspd", {"tries": 10**6}),
    ],
)
def test_no_visitor_fills_the_memory_of_all(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="takes numbers up to 1000"):
        new("raster").shelf.accelerator(name, options)


def test_a_page_needs_a_model() -> None:
    with pytest.raises(InputError, match="--model"):
        ModelShelf([], load)


def test_pipelines_are_known_without_loading() -> None:
    assert [pipeline_type_of(name) for name in ("mini-llamagen", "mini-var-small", "mini-mar")] == [
        LlamaGenPipeline,
        VARPipeline,
        MARPipeline,
    ]
    assert pipeline_type_of("var-d30") is VARPipeline
    assert pipeline_type_of("nowhere") is None


def test_only_accelerators_that_fit_are_offered() -> None:
    assert "zipar" not in fitting(ScaleJob)
    assert set(fitting(ScaleJob)) == {
        "plain",
        "auto",
        "code",
        "refiner",
        "scale_plan",
        "fast_var",
        "skip_var",
    }


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="time limit"):
        new_studio(PageSettings(seconds_limit=0))
    with pytest.raises(InputError, match="under way"):
        new_studio(PageSettings(concurrency=0))
    with pytest.raises(InputError, match="device"):
        new_studio(PageSettings(device="tpu"))
    assert "var-d30" in new_studio(PageSettings(published=True)).shelf.names
    assert "var-d30" not in new_studio(PageSettings()).shelf.names
    assert 1 <= calls_in_memory("cpu") <= 4


# -- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ACCELERATORS))
def test_every_option_has_a_control_that_says_nothing_by_default(name: str) -> None:
    options = options_of(ACCELERATORS[name], ["m"])
    values = {option.name: "" if option.default is None else option.default for option in options}
    assert chosen_options(name, values) == {}
    typed = {key: str(value) if not isinstance(value, bool) else value for key, value in values.items()}
    assert chosen_options(name, typed) == {}, "typed in words"


def test_options_as_typed() -> None:
    assert chosen_options("zipar", {"window": 4.0}) == {"window": 4}
    assert chosen_options("lantern", {"k": 10, "delta": "0.4", "tree": "dynamic"}) == {
        "delta": 0.4,
        "tree": "dynamic",
    }
    assert chosen_options("speculative", {"tree": "[[0], [1]]"}) == {"tree": [[0], [1]]}
    with pytest.raises(InputError, match="iterations of fewer_steps must be a number, got 'many'"):
        chosen_options("fewer_steps", {"iterations": "many"})
    with pytest.raises(InputError, match="window of zipar is empty"):
        chosen_options("zipar", {"window": None})


def test_options_say_what_they_mean() -> None:
    meanings = {o.name: o.help for o in options_of(ACCELERATORS["lantern"])}
    assert meanings["k"].startswith("nearest tokens")
    assert meanings["tree"].startswith("what is drafted per pass"), "led to another docstring"
    assert all(o.help for o in options_of(ACCELERATORS["fewer_steps"])), "said by the base class"


def test_other_fields_of_the_form() -> None:
    assert checked_seed(3.0) == 3
    assert checked_count(4) == 4
    assert checked_guidance(" 2.5 ") == 2.5
    assert checked_guidance("") is None
    for check, value in ((checked_seed, None), (checked_seed, 0.5), (checked_count, 0), (checked_count, 1.5)):
        with pytest.raises(InputError):
            check(value)  # type: ignore[operator]
    with pytest.raises(InputError, match="guidance"):
        checked_guidance("much")
    with pytest.raises(InputError, match="seed"):
        checked_seed(math.inf)


# -- notices -------------------------------------------------------------------------------------------


def test_errors_of_another_kind_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), shown_on_page():
        raise ZeroDivisionError


def test_warnings_are_shown_once_to_whom_they_concern() -> None:
    from gradio.context import LocalContext

    log = logging.getLogger("varaccel.somewhere")

    def happen() -> None:
        with shown_on_page():
            for _ in range(3):
                log.warning("never seen <zebra>")
            token = LocalContext.event_id.set("another visitor's")
            log.warning("a secret")
            LocalContext.event_id.reset(token)

    with pytest.warns(UserWarning, match="never seen &lt;zebra&gt;") as told:
        happen()
    assert len(told) == 1


# -- in-painting ---------------------------------------------------------------------------------------


def test_what_lies_on_the_board() -> None:
    background = Image.new("RGBA", (8, 8), "red")
    layer = Image.new("RGBA", (8, 8))
    layer.paste((255, 255, 255, 255), (2, 2, 4, 4))
    image, mask = image_and_mask({"background": background, "layers": [layer], "composite": None})
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert np.asarray(mask).sum() == 4 * 255
    with pytest.raises(InputError, match="no image"):
        image_and_mask(None)
    with pytest.raises(InputError, match="nothing is painted"):
        image_and_mask({"background": background, "layers": [Image.new("RGBA", (8, 8))], "composite": None})


def test_painting_as_the_pipeline_paints_within_the_time_limit() -> None:
    studio = new(*HOSTS)
    page = build(studio)
    paint = next(event.fn for event in page.fns.values() if event.api_name == "painted")
    size = pipeline("var-class").image_size
    layer = Image.new("RGBA", (size, size))
    layer.paste((255, 255, 255, 255), (0, 0, size // 2, size))
    board = {"background": Image.new("RGB", (size, size), "red"), "layers": [layer], "composite": None}
    request = gradio.Request(session_hash="a")

    shown, told = paint("scales", board, "hen", 3, 2, "code", request)
    mask = Image.fromarray(np.asarray(layer)[..., 3])
    out = pipeline("var-class").inpaint(
        board["background"], mask, "hen", seed=3, num_images=2, accelerator="code"
    )
    assert [image.tobytes() for image, _ in shown] == [image.tobytes() for image in out.images]
    assert [caption for _, caption in shown] == ["hen, seed 3", "hen, seed 4"]
    assert "code(" in told

    studio.seconds_limit = -1.0
    with pytest.warns(UserWarning, match="time limit"):
        _, told = paint("scales", board, "hen", 3, 2, "code", request)
    assert told == ""


def test_all_models_that_can_paint_are_offered_with_what_fits_them() -> None:
    studio = new(*HOSTS)
    assert painting_models(studio) == ["scales", "raster"], "masked models cannot"
    page = build(studio)
    choose = next(event.fn for event in page.fns.values() if event.api_name == "changed_painter")
    for model, job_type in (("raster", CausalJob), ("scales", ScaleJob)):
        names = fitting(job_type)
        assert (choose(model)["choices"], choose(model)["value"]) == (names, names[0])
    paint = next(event.fn for event in page.fns.values() if event.api_name == "painted")
    size = pipeline("t2i").image_size
    layer = Image.new("RGBA", (size, size))
    layer.paste((255, 255, 255, 255), (0, 0, size // 2, size))
    board = {"background": Image.new("RGB", (size, size), "red"), "layers": [layer], "composite": None}
    shown, told = paint("raster", board, "a red sphere", 3, 1, "jacobi", gradio.Request(session_hash="a"))
    out = pipeline("t2i").inpaint(
        board["background"],
        Image.fromarray(np.asarray(layer)[..., 3]),
        "a red sphere",
        seed=3,
        accelerator="jacobi",
    )
    assert shown[0][0].tobytes() == out.images[0].tobytes()
    assert "jacobi(" in told


# -- how it is started ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["command", "script"])
def test_an_unusable_setting_ends_with_a_sentence(
    start: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["app.py", "--time-limit", "0"] if start == "script" else ["varaccel", "app", "--time-limit", "0"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        load_script("app/app.py", name="__main__") if start == "script" else main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("varaccel: the time limit")
    assert error.count("\n") == 1


def test_a_missing_extra_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["varaccel", "app"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install varaccel[app]" in capsys.readouterr().err


# -- another model -------------------------------------------------------------------------------------


def test_another_model_brings_its_accelerators_and_a_prompt_that_fits() -> None:
    page = build(new(*HOSTS))
    event = next(event for event in page.fns.values() if event.api_name == "changed_model")
    labels = [block.label for block in event.outputs if getattr(block, "label", None)]

    accelerators, prompt, *rest = event.fn("scales", "a red sphere")
    assert [name for _, name in accelerators["choices"]] == [
        *("auto", "code", "fast_var", "refiner", "scale_plan", "skip_var")
    ]
    assert accelerators["value"] == "code"
    assert prompt == "tench", "a description is no class"
    assert [update["visible"] for update in rest if "visible" in update].count(True) == 1
    networks = [update for update in rest if "choices" in update]
    assert len(networks) == labels.count("refiner") + labels.count("drafter") == 4
    assert all([value for _, value in n["choices"][:1]] == [""] and n["value"] == "" for n in networks)

    assert event.fn("scales", "goldfish")[1] == "goldfish"
    assert event.fn("raster", "a blue cube")[1] == "a blue cube"
    assert event.fn("raster", " ")[1].startswith("a ")
