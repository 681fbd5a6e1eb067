"""Planted mistakes that the exactness tests must find: a test of the tests.

    python -m tests.mutants               plants each in turn and runs the tests that must fail: `make mutants`
    python -m tests.mutants NAME ...      some of them
    python -m tests.mutants --list        the table of the documentation, without running anything

A mistake is a piece of source that stands exactly once in a file, and what takes its place. It is found if every test
that is named fails by an assertion. Before, the same tests must pass on the library as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = "tests/accelerators/test_long_images.py"
CHAIN = f"{LONG}::test_a_chain_on_a_grid"
FILTERED = f"{LONG}::test_a_chain_on_a_grid_guided_and_filtered"
CONDITIONS = "tests/hosts/causal/test_conditions.py"
BRANCHES = "tests/hosts/causal/test_branches.py"


@dataclass(frozen=True)
class Mutant:
    """One planted mistake.

    Attributes:
        what: the mistake in words.
        file: of the package.
        old, new: source that stands there once, and what takes its place.
        tests: node ids that must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        return ROOT / "varaccel" / self.file

    @property
    def module(self) -> str:
        return f"varaccel.{self.file.removesuffix('.py').replace('/', '.')}"

    def source(self) -> str:
        """The changed file.

        Raises:
            ValueError: the old source does not stand there exactly once.
        """
        text = self.path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.old!r} stands {count} times in {self.file}, must be once; mend the mutant."
            )
        return text.replace(self.old, self.new)


MUTANTS: dict[str, Mutant] = {
    # -- random numbers
    "stream-repeats": Mutant(
        "the random stream repeats its numbers after 16 passes",
        "engine/randomness.py",
        "            self._block = self._drawn(self.generators, self.AHEAD)\n",
        "            self.generators = _seeded([g.initial_seed() for g in self.generators])\n"
        "            self._block = self._drawn(self.generators, self.AHEAD)\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[jacobi-none]", f"{LONG}::test_an_eagle_head[2]"),
    ),
    "noise-repeats": Mutant(
        "Gumbel noise repeats itself after 64 positions",
        "engine/randomness.py",
        "            shape = (min(self.BLOCK, self.positions - self._noise.shape[1]), self.vocab_size)\n",
        "            shape = (min(self.BLOCK, self.positions - self._noise.shape[1]), self.vocab_size)\n"
        "            self.generators = _seeded([g.initial_seed() for g in self.generators])\n",
        (f"{CHAIN}[jacobi]", f"{CHAIN}[speculative-gumbel]"),
    ),
    "images-share-numbers": Mutant(
        "all images of a batch draw with the numbers of the first",
        "engine/randomness.py",
        "Stream(_seeded(self.stream_seeds), width",
        "Stream(_seeded(self.stream_seeds[:1] * len(self.stream_seeds)), width",
        (f"{CHAIN}[speculative]",),
    ),
    "numbers-of-the-row": Mutant(
        "random numbers depend on the row in the batch, not on the image's seed",
        "engine/randomness.py",
        "Stream(_seeded(self.stream_seeds), width",
        "Stream(_seeded(range(len(self.stream_seeds))), width",
        (f"{CONDITIONS}::test_three_together_are_three_alone[modulated-chain]",),
    ),
    "scale-shares-a-number": Mutant(
        "all tokens of a scale are drawn with one number",
        "engine/randomness.py",
        "            return self.uniforms[:, positions]\n",
        "            return self.uniforms[:, positions[:1].expand_as(positions)]\n",
        (f"{LONG}::test_scales[plain]",),
    ),
    "noise-shared": Mutant(
        "drafts and their verification use the same random numbers",
        "speculation/loop.py",
        "    return Draws(verifying, extra, drafting)\n",
        "    return Draws(drafting[:, :nodes], extra, drafting)\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[jacobi-none]"),
    ),
    # -- rules
    "elder-siblings-left": Mutant(
        "elder siblings beyond the first are left in the draft's distribution",
        "speculation/rejection.py",
        'fork.draw_mode == "without_replacement" and child + 1 < width:',
        'fork.draw_mode == "without_replacement" and child == 0:',
        (f"{CHAIN}[speculative-against-wide]", f"{CHAIN}[lantern-0-wide-against]"),
    ),
    "residual-not-normalised": Mutant(
        "what a rejection leaves is not normalised before the next sibling is tested",
        "speculation/rejection.py",
        "    return Trial(distribution.gather(-1, token), normalised(rest, distribution))\n",
        "    return Trial(distribution.gather(-1, token), rest)\n",
        (f"{CHAIN}[speculative-against-wide]", f"{CHAIN}[lantern-0-wide-against]"),
    ),
    "no-residual": Mutant(
        "the token after a rejection is drawn from the model's whole distribution",
        "speculation/rejection.py",
        "    return Trial(distribution.gather(-1, token), normalised(rest, distribution))\n",
        "    return Trial(distribution.gather(-1, token), distribution)\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[jacobi-maximal]"),
    ),
    "wrong-draft-probability": Mutant(
        "draft tokens are accepted with min(1, p / q) for an even q",
        "speculation/rejection.py",
        "            bar = bar * drawn\n",
        "            bar = bar / draft_probs.shape[-1]\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[jacobi-none]"),
    ),
    "bonus-token-from-draft": Mutant(
        "the token after a wholly accepted draft is drawn from the draft's distribution",
        "speculation/loop.py",
        "    extra = Categorical(result.probs.log().unsqueeze(1)).sample(draws.extra)  # [M, 1]\n",
        "    probs = result.probs\n"
        "    if tree.draft_probs is not None:\n"
        "        before = result.nodes.gather(1, (result.length - 1).clamp(min=0).unsqueeze(1))[:, 0]\n"
        "        drafted = tree.draft_probs[torch.arange(len(probs)), before].to(probs.dtype)\n"
        "        probs = torch.where(result.rejected.unsqueeze(1), probs, drafted)\n"
        "    extra = Categorical(probs.log().unsqueeze(1)).sample(draws.extra)\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[speculative-wide]"),
    ),
    "certain-siblings-unscaled": Mutant(
        "a younger sibling that was not drawn by chance is tested against the whole distribution",
        "speculation/rejection.py",
        "            left = 1 - (mass.cumsum(dim=-1) - mass)\n",
        "            left = torch.ones_like(mass)\n",
        (f"{CHAIN}[speculative-small-dynamic-recursive]",),
    ),
    "k-sequential-residual": Mutant(
        "k-sequential verification takes the share of one draft token only from the residual",
        "speculation/rejection.py",
        "        rest = torch.where(chance > 0, target - share * times, target).clamp_(min=0)\n",
        "        rest = torch.where(chance > 0, target - share, target).clamp_(min=0)\n",
        (f"{CHAIN}[speculative-against-wide-k_sequential]",),
    ),
    "maximal-coupling-residual": Mutant(
        "a Jacobi draft token that is given up is drawn from the whole distribution",
        "speculation/jacobi_proposer.py",
        "new.residual(old).sample(numbers[:, :width])",
        "new.sample(numbers[:, :width])",
        (f"{CHAIN}[jacobi-maximal]", f"{CHAIN}[jacobi-9-maximal-left]"),
    ),
    # -- drafts
    "siblings-not-removed": Mutant(
        "no elder sibling is taken out of the draft's distribution",
        "speculation/rejection.py",
        'fork.draw_mode == "without_replacement" and child + 1 < width:',
        'fork.draw_mode == "independent" and child + 1 < width:',
        (f"{CHAIN}[speculative-against-wide]",),
    ),
    "fill-counts-as-drawn": Mutant(
        "tokens that fill a Jacobi window count as drawn evenly",
        "speculation/jacobi_proposer.py",
        "torch.where(fresh.unsqueeze(-1), certain, distributions)",
        "torch.where(fresh.unsqueeze(-1), torch.ones_like(certain) / self.vocab_size, distributions)",
        (f"{CHAIN}[jacobi-9-maximal-left]",),
    ),
    "siblings-see-each-other": Mutant(
        "the model reads a draft token in sight of its siblings",
        "speculation/loop.py",
        "    sees = tree.ancestors.view(batch, lanes, nodes, nodes)[..., 1:]  # [B, A, T, T - 1]\n",
        "    sees = torch.ones_like(tree.ancestors).tril().view(batch, lanes, nodes, nodes)[..., 1:]\n",
        (f"{CHAIN}[speculative-wide]",),
    ),
    "cache-slot-off-by-one": Mutant(
        "keys and values of the draft token before the accepted one are kept",
        "speculation/loop.py",
        "            (first + below.clamp(min=1) - 1).view(batch, -1),\n",
        "            (first + below.clamp(min=2) - 2).view(batch, -1),\n",
        (f"{CHAIN}[speculative]", f"{CHAIN}[jacobi]"),
    ),
    # -- guidance, filters, lines
    "guidance-of-first-only": Mutant(
        "guidance is applied to the first token, not to drafted and verified ones",
        "hosts/causal/session.py",
        "        rows = self.cache_slots.rows if self._still_guided(starts) else self.batch\n",
        "        rows = self.batch\n",
        (f"{FILTERED}[speculative]", f"{CONDITIONS}::test_lossless[guided-modulated-jacobi none]"),
    ),
    "top-p-before-guidance": Mutant(
        "top-p is applied before guidance, to the conditional branch",
        "hosts/causal/session.py",
        "            logits = self.guidance.combine(*logits.split(self.batch), positions=positions)\n",
        "            dropped = self.sampling.filter(logits[: self.batch]).isneginf()\n"
        "            logits = self.guidance.combine(*logits.split(self.batch), positions=positions)\n"
        "            logits = logits.masked_fill(dropped, -1e4)\n",
        (f"{FILTERED}[plain]", f"{FILTERED}[speculative]"),
    ),
    "guidance-scales-swapped": Mutant(
        "scales of guidance with several branches are counted from the last branch",
        "hosts/causal/guidance.py",
        "zip(self.scales, pairwise(branches), strict=True)",
        "zip(self.scales[::-1], pairwise(branches), strict=True)",
        (f"{BRANCHES}::test_lossless[plain]", f"{BRANCHES}::test_lossless[chain]"),
    ),
    "branches-share-a-mask": Mutant(
        "all branches of guidance see the condition slots of the first",
        "hosts/causal/session.py",
        "not torch.equal(of_each[1:], of_each[:-1])",
        "False",
        (f"{BRANCHES}::test_lossless[jacobi maximal]", f"{BRANCHES}::test_lossless[layers]"),
    ),
    "top-p-before-temperature": Mutant(
        "top-p measures the mass of tokens before temperature",
        "hosts/causal/sampling.py",
        "            mass = ordered.softmax(dim=-1)\n",
        "            mass = (ordered * max(self.temperature, 1e-5)).softmax(dim=-1)\n",
        ("tests/models/test_llamagen_parity.py::test_sampling_filter[filter6]",),
    ),
    "last-of-line-skipped": Mutant(
        "the last line has no end",
        "nn/grid.py",
        "            ends[:, -1] = grid.end_of_line\n",
        "            ends[:-1, -1] = grid.end_of_line\n",
        (f"{CONDITIONS}::test_ends_of_line_stand_where_lines_end",),
    ),
    # -- continuous tokens
    "continuous-no-residual": Mutant(
        "a rejected continuous token is drawn from the model's whole distribution",
        "speculation/continuous_rejection.py",
        "    return (-torch.expm1(log_ratio.clamp(max=0))).nan_to_num(nan=0.0)\n",
        "    return torch.ones_like(log_ratio)\n",
        ("tests/speculation/test_continuous.py::test_exact_distribution_in_closed_form",),
    ),
    "continuous-keeps-all": Mutant(
        "groups that were drafted in sight of a replaced token are kept",
        "speculation/group_verification.py",
        "        stands = broken.cumsum(1) - broken == 0\n",
        "        stands = broken >= 0\n",
        (f"{LONG}::test_masked_groups[cspd-sequential-0]",),
    ),
}


def table(found: dict[str, str] | None = None) -> str:
    """Markdown: the mistakes, where they are planted and which tests find them; with results if there are any."""
    head = ["name", "mistake", "file", "must fail", *(["found"] if found is not None else [])]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, mutant in MUTANTS.items():
        if found is not None and name not in found:
            continue
        tests = ", ".join(f"`{test.split('::')[1]}`" for test in mutant.tests)
        row = [f"`{name}`", mutant.what, f"`{mutant.file}`", tests, *([found[name]] if found else [])]
        lines.append(" | ".join(row))
    return "\n".join(f"| {line} |" for line in lines)


def run(tests: list[str], name: str | None = None) -> tuple[int, str]:
    """Exit status and summary of pytest on some tests, with a mistake planted if one is named."""
    environment = {k: v for k, v in os.environ.items() if k != "VARACCEL_MUTANT"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    if name is not None:
        environment["VARACCEL_MUTANT"] = name
    plugins = ["-p", "tests.mutated", "-p", "no:cacheprovider"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=line",
        "--show-capture=no",
        *plugins,
        *tests,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def verdict(name: str) -> str:
    """ "yes" if every test that must fail fails by an assertion, else what happened instead."""
    tests = list(MUTANTS[name].tests)
    status, output = run(tests, name)
    failures = re.findall(r"^FAILED (?:\S+|.*?\]) - (.*)$", output, re.MULTILINE)
    if status == 1 and len(failures) == len(tests):
        odd = [failure for failure in failures if not re.match(r"assert|AssertionError", failure)]
        return f"no: {odd[0]}" if odd else "yes"
    passed = re.findall(r"^PASSED (.*)$", output, re.MULTILINE)
    return f"no: {', '.join(test.split('::')[-1] for test in passed) or f'pytest ended with {status}'}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", help="mistakes to plant; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in MUTANTS]:
        parser.error(f"unknown mistake {unknown[0]!r}; there are: {', '.join(MUTANTS)}")
    if options.list:
        print(table())
        return 0
    names = options.names or list(MUTANTS)
    status, output = run(sorted({test for name in names for test in MUTANTS[name].tests}))
    if status:
        print(output)
        print("the tests fail on the library as it is; mend that first.")
        return 1
    found: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, result in zip(names, pool.map(verdict, names), strict=True):
            found[name] = result
            print(f"{name}: {result}", flush=True)
    print(table(found))
    survivors = [name for name, result in found.items() if result != "yes"]
    print(
        f"{len(found) - len(survivors)} of {len(found)} found"
        + "".join(f"\n  not found: {n}" for n in survivors)
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
