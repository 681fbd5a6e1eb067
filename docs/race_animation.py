"""A race on the page as an animation, recorded in a headless Chromium.

python docs/race_animation.py [--out docs/images/race.webp] [--browser /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import io
import shutil
from itertools import pairwise
from pathlib import Path
from time import monotonic

from PIL import Image
from playwright.sync_api import sync_playwright

from varaccel.app.page import PageSettings, build, new_studio, serve
from varaccel.files import atomic_path

WIDTH = 760
LAST_SECONDS = 4.0
"""How long the end of the race stands still."""


def record(browser: str) -> tuple[list[Image.Image], list[float]]:
    """Images of a race from the click to its end, and how many seconds each is seen."""
    page_ = build(new_studio(PageSettings(models=("mini-llamagen",), concurrency=1)))
    address = serve(page_, prevent_thread_lock=True)
    frames: list[Image.Image] = []
    times: list[float] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1120, "height": 1000})
        page.goto(address)
        page.locator("#race").wait_for()
        page.locator("#race").click()  # unrecorded: the model is loaded
        ended = page.locator("#race-panel section[data-phase=finished]")
        while ended.count() < 2:
            page.wait_for_timeout(200)
        page.locator("#race:enabled").wait_for()
        page.locator("#race").click()
        page.locator("#race-panel section[data-phase=drawing] img.image").nth(1).wait_for()
        while True:
            last = ended.count() == 2
            shown = page.locator("#race-panel").screenshot()
            frames.append(Image.open(io.BytesIO(shown)).convert("RGB"))
            times.append(monotonic())
            if last:
                break
            page.wait_for_timeout(150)
        chromium.close()
    page_.close()
    durations = [after - before for before, after in pairwise(times)]
    return frames, [*durations, LAST_SECONDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "race.webp")
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    options = parser.parse_args()
    frames, seconds = record(options.browser)
    height = max(frame.height for frame in frames)
    sheets = []
    for frame in frames:  # the verdict grows by a line at the end
        sheet = Image.new("RGB", (frame.width, height), "white")
        sheet.paste(frame, (0, 0))
        sheets.append(sheet.resize((WIDTH, round(height * WIDTH / frame.width)), Image.Resampling.LANCZOS))
    with atomic_path(options.out) as temporary:
        sheets[0].save(
            temporary,
            "WEBP",
            save_all=True,
            append_images=sheets[1:],
            duration=[round(1000 * s) for s in seconds],
            loop=0,
            quality=60,
            method=6,
        )
    print(f"{options.out}: {len(sheets)} frames, {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
