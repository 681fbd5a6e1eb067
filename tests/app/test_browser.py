"""The real page with the shipped models in a headless Chromium, as visitors use it.

Needs a Chromium; without one the tests are skipped, or fail if VARACCEL_REQUIRE_BROWSER is set. They measure time, so
they run one after the other, apart from the rest of the suite. VARACCEL_SCREENSHOTS names a folder for images of
the page.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.scripts import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
Page = sync_api.Page

expect.set_options(timeout=30_000)  # milliseconds; the machine has two cores and draws meanwhile

pytestmark = [pytest.mark.browser, pytest.mark.timeout(420)]

FIRST_IMAGE_SECONDS = 15
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FINISHED = "#race-panel section[data-phase=finished]"
DRAWING = "#race-panel section[data-phase=drawing] img.image"


def chromium() -> str:
    found = os.environ.get("VARACCEL_BROWSER") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        if os.environ.get("VARACCEL_REQUIRE_BROWSER"):
            pytest.fail(
                "no Chromium; install one (Debian: apt-get install chromium) or set VARACCEL_BROWSER."
            )
        pytest.skip("no Chromium; install one (Debian: apt-get install chromium) or set VARACCEL_BROWSER")
    return str(found)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's process notes whom it spoke to."""
    return tmp_path_factory.mktemp("record") / "addresses.txt"


@pytest.fixture(scope="module")
def address(record: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, started as a user starts it, without a word to the libraries about being offline."""
    chromium()
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GRADIO_", "TRANSFORMERS_"))
    }
    environment |= {"OMP_WAIT_POLICY": "passive", "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio"))}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "app" / "watched_app.py", record, "--concurrency", "2"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            said.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+/", line):
                found.append(match[0])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(180)
    assert found, "".join(said)
    yield found[0]
    process.terminate()
    process.wait(30)
    assert "Traceback" not in "".join(said), "".join(said)


@pytest.fixture(scope="module")
def net_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "net.json"


@pytest.fixture(scope="module")
def browser(net_log: Path) -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", f"--log-net-log={net_log}"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def requested() -> set[str]:
    """Hosts that pages asked for something."""
    return set()


class Visitor:
    """Somebody with the page open.

    Attributes:
        page: the tab.
        complaints: what the browser's console called an error.
    """

    def __init__(self, page: Page, address: str, requested: set[str]) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.set_default_timeout(60_000)
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: requested.add(urlsplit(request.url).hostname or ""))
        page.on("websocket", lambda socket: requested.add(urlsplit(socket.url).hostname or ""))
        page.goto(address)
        expect(page.locator("#race")).to_be_enabled()

    def choose(self, control: str, name: str | re.Pattern[str]) -> None:
        """Choose in a drop-down list."""
        self.page.locator(f"{control} input").click()
        self.page.get_by_role("option", name=name).first.click()

    def prompt(self, words: str) -> None:
        self.page.locator("#prompt textarea").fill(words)

    def race(self) -> None:
        self.page.locator("#race").click()

    def finished(self) -> None:
        """Wait until both sides are there and the page is ready for the next race."""
        expect(self.page.locator(FINISHED)).to_have_count(2, timeout=120_000)
        expect(self.page.locator("#race")).to_be_enabled()

    def image(self, name: str) -> None:
        """Save what the whole page looks like, for people."""
        folder = os.environ.get("VARACCEL_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture
def visitors(browser: sync_api.Browser, address: str, requested: set[str]) -> Iterator[list[Visitor]]:
    """Two people; the second one comes with a phone."""
    contexts = [browser.new_context(viewport=size) for size in (WIDE, PHONE)]  # type: ignore[arg-type]
    people = [Visitor(context.new_page(), address, requested) for context in contexts]
    yield people
    for person, context in zip(people, contexts, strict=True):
        context.close()
        assert not person.complaints


@pytest.fixture
def visitor(visitors: list[Visitor]) -> Visitor:
    return visitors[0]


@pytest.fixture
def phone(visitors: list[Visitor]) -> Visitor:
    return visitors[1]


def test_a_race(visitor: Visitor, tmp_path: Path) -> None:
    """The first image comes quickly and grows; at the end the page says what was gained, at what cost."""
    page = visitor.page
    visitor.image("race-before")
    begun = time.monotonic()
    visitor.race()
    page.locator(DRAWING).first.wait_for()
    waited = time.monotonic() - begun
    assert waited < FIRST_IMAGE_SECONDS
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#race")).to_be_disabled()

    bars = page.locator("#race-panel [role=progressbar]")
    fast = [0]
    while page.locator(FINISHED).count() == 0:
        fast.append(int(bars.nth(1).get_attribute("aria-valuenow") or 0))
        if 20 < fast[-1] < 80:
            visitor.image("race-under-way")
        page.wait_for_timeout(100)
    assert fast == sorted(fast)
    assert len(set(fast)) >= 4, "partial images, several times"

    visitor.finished()
    verdict = page.locator("#race-panel .verdict").inner_text()
    numbers = re.fullmatch(
        r"([\d.]+)x the speed of plain decoding: ([\d.]+) s instead of ([\d.]+) s, 76 passes instead of 256\.",
        verdict,
    )
    assert numbers, verdict
    ratio, accelerated, plain = map(float, numbers.groups())
    assert ratio == pytest.approx(plain / accelerated, rel=0.02)
    expect(page.locator("#race-panel .cost")).to_contain_text("adherence")
    expect(page.locator("#gallery .grid-container button, #gallery .thumbnail-item")).to_have_count(2)
    print(f"first image after {waited:.2f} s, both after {time.monotonic() - begun:.2f} s")
    visitor.image("race-after")

    page.get_by_text("Reproduce the accelerated image").click()
    code = page.locator("#python .cm-content").inner_text()
    assert "ZipAR(window=4)" in code
    ast.parse(code)
    visitor.image("race-snippet")


def test_the_map_of_passes_comes_and_goes(visitor: Visitor) -> None:
    visitor.race()
    visitor.finished()
    layers = visitor.page.locator("#race-panel img.map")
    expect(layers).to_have_count(2)
    expect(layers.first).to_be_hidden()
    visitor.page.locator("#passes input").check()
    expect(layers.first).to_be_visible()
    visitor.image("race-passes")


def test_a_race_can_be_stopped_and_run_again(visitor: Visitor) -> None:
    page = visitor.page
    visitor.choose("#model", re.compile("^mini-mar$"))
    expect(page.locator("#accelerator input")).to_have_value(re.compile("fewer_steps"))
    visitor.race()
    page.locator(DRAWING).first.wait_for()
    page.locator("#stop").click()
    expect(page.locator("#race-panel .verdict")).to_have_text("Stopped.", timeout=15_000)
    expect(page.locator("#race-panel section[data-phase=stopped]").first).to_be_visible()
    expect(page.locator("#race")).to_be_enabled()
    visitor.image("race-stopped")
    visitor.choose("#model", re.compile("^mini-var$"))
    expect(page.locator("#accelerator input")).to_have_value(re.compile("code"))
    visitor.race()
    visitor.finished()
    expect(page.locator("#race-panel h3").nth(1)).to_contain_text("code(")
    visitor.image("race-var")


def test_only_fitting_accelerators_and_options_are_offered(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#accelerator input").click()
    offered = page.get_by_role("option").all_inner_texts()
    assert any("jacobi" in text for text in offered)
    assert not any("code" in text or "cspd" in text for text in offered)
    expect(page.get_by_label("window").first).to_be_visible()
    page.get_by_role("option", name=re.compile("lantern")).click()
    expect(page.get_by_label("multiplier").first).to_be_visible()
    expect(page.get_by_label("head steps").first).to_be_hidden()


def test_bad_input_is_a_message(visitor: Visitor) -> None:
    page = visitor.page
    visitor.prompt("   ")
    visitor.race()
    notice = page.get_by_test_id("toast-body").or_(page.locator(".toast-body")).first
    expect(notice).to_contain_text("holds no text")
    visitor.image("race-error")
    expect(page.locator("#race")).to_be_enabled()
    visitor.prompt('a red sphere <img src=x onerror="document.title=1">')
    visitor.race()
    visitor.finished()
    assert page.title() == "varaccel", "typed words are no markup"
    visitor.complaints.clear()  # the notice about the empty prompt may be one


def test_two_visitors_at_once(visitors: list[Visitor]) -> None:
    """Both see their own images grow at the same time."""
    first, second = visitors
    first.prompt("a large green cone")
    second.prompt("a red sphere at sunset")
    first.race()
    second.race()
    for person in visitors:
        person.page.locator(DRAWING).first.wait_for()
    assert all(person.page.locator(FINISHED).count() < 2 for person in visitors), (
        "neither waited for the other"
    )
    for person, words in ((first, "a large green cone"), (second, "a red sphere at sunset")):
        person.finished()
        alt = person.page.locator("#race-panel img.image").first.get_attribute("alt") or ""
        assert alt.startswith(words)
    second.image("race-phone")


def test_several_settings_are_compared(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("settings, one per line").fill("zipar:window=2\njacobi:window=16")
    page.get_by_role("button", name="Compare").click()
    rows = page.locator(".va-compare tbody tr")
    expect(rows.filter(has_text="jacobi")).to_have_count(1, timeout=120_000)
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("plain")
    page.get_by_label("settings, one per line").fill("zippar")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".toast-body").first).to_contain_text("line 1")
    expect(page.get_by_role("button", name="Compare")).to_be_enabled()
    visitor.complaints.clear()  # the notice
    visitor.image("compare")


def test_painting_into_a_image(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("tab", name="Paint").click()
    page.locator("#inpaint-draw").click()
    board = page.locator("#board canvas").first
    board.wait_for()
    page.wait_for_timeout(4000)
    page.locator("#board").get_by_role("button", name=re.compile("Brush|Draw", re.I)).first.click()
    box = board.bounding_box()
    assert box is not None
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(middle[0] - 60, middle[1])
    page.mouse.down()
    for step in range(8):
        page.mouse.move(middle[0] - 60 + 15 * step, middle[1] + 10 * (step % 2))
    page.mouse.up()
    page.wait_for_timeout(1000)
    visitor.image("paint-masked")
    page.locator("#paint").click()
    expect(page.locator("#painted .thumbnail-item, #painted .grid-container button").first).to_be_visible()
    visitor.image("paint")
    visitor.complaints.clear()  # the drawing board complains about a missing graphics card


def test_the_report_can_be_explored(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("tab", name="Explore").click()
    expect(page.get_by_text("Speed against quality").first).to_be_visible()
    visitor.image("explore")
    page.get_by_label("mini-mar", exact=True).first.check()
    expect(page.get_by_text("fewer_steps").first).to_be_visible()


def test_everything_fits_on_a_phone(phone: Visitor) -> None:
    phone.race()
    phone.finished()
    for tab in ("Race", "Compare", "Explore", "Paint"):
        phone.page.get_by_role("tab", name=tab).click()
        phone.page.wait_for_timeout(1000)
        phone.image(f"phone-{tab.lower()}")
        width = phone.page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= PHONE["width"], tab
    phone.complaints.clear()  # the drawing board complains about a missing graphics card


def test_programs_draw_too(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/app.md, as written but for the address."""
    text = (ROOT / "docs" / "app.md").read_text()
    found = re.search(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
    assert found
    # the client asks the hub for something when it is made
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names: dict[str, Any] = {}
    exec(found[1].replace("http://127.0.0.1:7860", address), names)
    assert len(names["images"]) == 2
    with Image.open(names["images"][0]["image"]) as image:
        assert image.size == (128, 128)
    assert names["cost"]["passes"] == 76
    names["client"].close()


def test_nobody_else_was_asked_for_anything(
    browser: sync_api.Browser, record: Path, requested: set[str], net_log: Path
) -> None:
    """Runs last: of all that went before, nothing left the machine."""
    lines = [line.split("\t", 1) for line in record.read_text().splitlines()]
    assert any(event == "socket.connect" for event, _ in lines), "the record works"
    for event, told in lines:
        value = ast.literal_eval(told) if told[0] in "('\"b" or told == "None" else told
        host = value[0] if isinstance(value, tuple) else value
        local = host in (None, "", "0.0.0.0", *LOOPBACK) or str(host).startswith(("/", "http://127.0.0.1"))
        assert local, (event, told)
    assert requested - {""} <= set(LOOPBACK)
    browser.close()  # writes the end of its log
    hosts = set()
    for line in net_log.read_text().splitlines():
        # what Chromium asks for of its own accord has no page as its initiator
        found = re.search(r'"initiator":"http://127.*"url":"\w+://([^/":]+)', line)
        if found:
            hosts.add(found[1])
    assert hosts, "the log works"
    assert hosts <= set(LOOPBACK)
