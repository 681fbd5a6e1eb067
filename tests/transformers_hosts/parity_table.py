"""The table of host × accelerator on docs/models/transformers.md, from the cases that `test_parity` runs.

python -m tests.transformers_hosts.parity_table
"""

from __future__ import annotations

from tests.scripts import ROOT
from tests.transformers_cases import CASES
from tests.transformers_hosts.test_parity import BATCHES, EXACT

PAGE = ROOT / "docs" / "models" / "transformers.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->"


def table() -> str:
    """Rows of Markdown: a host and what was compared, in columns of accelerators."""
    batches = " and ".join(map(str, BATCHES))
    lines = [
        f"| model, batch {batches} | guidance | {' | '.join(EXACT)} |",
        "|---|---|" + ":---:|" * len(EXACT),
    ]
    for name, case in CASES.items():
        drafters = case.pipeline().drafters
        cells = ["equal" if key != "smaller model" or "small" in drafters else "" for key in EXACT]
        guidance = "on and off" if case.scale else "off"
        lines.append(f"| {name} | {guidance} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A page with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
