"""Train all shipped models within a time: image tokenizers, hosts, drafters and refiner, judged and ready to install.

    python pipelines/train_all.py --budget-minutes 8 --device cuda
    python pipelines/train_all.py --budget-minutes 8 --device cuda --install    # what is ready goes into weights/

The time is divided by the table `shares` of the recipe: `train_all_cuda.json` or `train_all_cpu.json` beside this
script. Scenes are rendered on all cores meanwhile. On a GPU the three models are trained side by side. Run it again to
go on after an interruption; checkpoints are two minutes apart. OUT/logs has what every job said, OUT/ready the
pipelines in half precision, each with its prompt adherence, 40 unselected images, loss curves and numbers for its card.

The text encoder is that of `weights/mini-llamagen`. `--keep-tokenizers` also keeps the image tokenizers that ship.
It needs neither a connection nor gradio or torch-fidelity.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varaccel.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from varaccel.training.timetable import Job

BEGUN = time.time()  # imports count, too
HERE = Path(__file__).parent
ROOT = HERE.parent
SHIPPED = ROOT / "weights"
FAMILIES = ("mini-llamagen", "mini-var", "mini-mar")
CONFIGS = {
    "vq": "tokenizers/vq_scenes.json",
    "msvq": "tokenizers/msvq_scenes.json",
    "kl": "tokenizers/kl_scenes.json",
    "llamagen": "pipelines/mini_llamagen.json",
    "llamagen-small": "pipelines/mini_llamagen_small.json",
    "var": "pipelines/mini_var.json",
    "var-small": "pipelines/mini_var_small.json",
    "mar": "pipelines/mini_mar.json",
    "mar-small": "pipelines/mini_mar_small.json",
}
RUNS = {
    "mini-llamagen": ("mini-vq", "llamagen", "llamagen-small", "eagle"),
    "mini-var": ("mini-msvq", "var", "var-small-refiner"),
    "mini-var-small": ("var-small",),
    "mini-mar": ("mini-kl", "mar"),
    "mini-mar-small": ("mar-small",),
}
"""The runs that a shipped model is made of, as folders of OUT."""


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--budget-minutes", type=float, help="of all calls; without it nothing is trained")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--keep-tokenizers", action="store_true", help="train no image tokenizers")
    parser.add_argument("--out", type=Path, default=Path("runs/all"))
    parser.add_argument("--recipe", type=Path, help="by default that of the device, beside this script")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument(
        "--install",
        nargs="?",
        type=Path,
        const=SHIPPED,
        metavar="FOLDER",
        help="put what is ready into weights/",
    )
    return parser.parse_args()


# -- the plan ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The jobs of a call, made of the recipe and the options."""

    recipe: Mapping[str, Any]
    options: argparse.Namespace

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @property
    def scenes(self) -> Path:
        return self.out / "scenes"

    def lanes(self) -> dict[str, list[Job]]:
        """Jobs by lane: the rendering, and the families side by side or one after the other."""
        jobs = {"mini-llamagen": self._llamagen, "mini-var": self._var, "mini-mar": self._mar}
        families = {name: list(jobs[name]()) for name in self.options.only}
        if not self.recipe["side_by_side"]:
            families = {"models": [job for family in families.values() for job in family]}
        return {"scenes": [self._rendering()], **families}

    def _llamagen(self) -> Iterator[Job]:
        yield from self._tokenizer("vq", "mini-vq", "train_vq_scenes.py")
        yield self._encoding("vq", "token_ids", "mini-vq", "token-ids")
        yield self._transformer("llamagen")
        # a pipeline without drafters, which the EAGLE head reads its target from
        yield self._job("llamagen-target", self._stage("llamagen", "pipeline"), kind="assemble")
        yield self._transformer("llamagen-small")
        words = ["-m", "varaccel", "train", "drafter", "--target", self.out / "mini-llamagen"]
        words += ["--token-ids", self.out / "token-ids", "--scenes", self.scenes, "--out", self.out / "eagle"]
        words += ["--until", "{until}", "--device", self.options.device]
        for name, value in self.recipe["drafter"].items():
            words += [f"--{name.replace('_', '-')}", value]
        yield self._job("eagle", words + ["--compile"] * self.recipe["compile"], share="eagle")
        ready = self.out / "ready" / "mini-llamagen"
        yield self._job(
            "mini-llamagen", self._stage("llamagen", "pipeline", "--install", ready), kind="assemble"
        )
        adding = [HERE / "add_drafters.py", ready, "--eagle", self.out / "eagle" / "export"]
        adding += ["--small", self.out / "llamagen-small" / "export"]
        yield self._job("mini-llamagen-drafters", adding, kind="assemble")
        yield self._judging("mini-llamagen")

    def _var(self) -> Iterator[Job]:
        start = ("--start-from", SHIPPED / "mini-llamagen" / "vq_model")
        yield from self._tokenizer("msvq", "mini-msvq", "train_vq_scenes.py", *start)
        yield self._encoding("msvq", "token_ids", "mini-msvq", "msvq-token-ids")
        yield self._transformer("var")
        yield self._transformer("var-small")
        teacher = ("--teacher", self.out / "var" / "export", "--until", "{until}")
        yield self._job("refiner", self._stage("var-small", "refiner", *teacher), share="refiner")
        ready = self.out / "ready"
        refiner = ("--refiner", self.out / "var-small-refiner" / "export")
        whole = self._stage("var", "pipeline", *refiner, "--install", ready / "mini-var")
        yield self._job("mini-var", whole, kind="assemble")
        yield self._small("var")
        yield self._judging("mini-var")

    def _mar(self) -> Iterator[Job]:
        yield from self._tokenizer("kl", "mini-kl", "train_kl_scenes.py")
        yield self._encoding("kl", "latents", "mini-kl", "latents")
        yield self._transformer("mar")
        yield self._transformer("mar-small")
        draft = ("--draft", self.out / "mar-small" / "export", "--install", self.out / "ready" / "mini-mar")
        yield self._job("mini-mar", self._stage("mar", "pipeline", *draft), kind="assemble")
        yield self._small("mar")
        yield self._judging("mini-mar")

    # -- kinds of jobs ---------------------------------------------------------------------------------

    def _job(
        self, name: str, *commands: Sequence[object], kind: str = "", share: str = "", images: int = 0
    ) -> Job:
        from varaccel.training.timetable import Job

        return Job(
            name,
            tuple(tuple(map(str, words)) for words in commands),
            share=self.recipe["shares"][share] if share else 0.0,
            seconds=self.recipe["seconds"]["after_training" if share else kind] if kind or share else 0.0,
            scenes=self.scenes if images else None,
            images=images,
        )

    def _rendering(self) -> Job:
        recipe = self.recipe
        words = ["-m", "varaccel.scenes.cache", "--out", self.scenes, "--count", recipe["images"]]
        words += ["--workers", self.options.workers, "--shard-size", recipe["shard_size"]]
        return self._job("scenes", words)

    def _tokenizer(self, name: str, folder: str, script: str, *more: object) -> Iterator[Job]:
        if self.options.keep_tokenizers:
            return
        words = [ROOT / "tokenizers" / script, "--data", self.scenes, "--out", self.out / folder]
        words += ["--config", self.config(name), "--held-out", self.recipe["held_out"], "--until", "{until}"]
        words += ["--device", self.options.device, *more]
        yield self._job(name, words, share=name, images=self.recipe["first_images"])

    def _encoding(self, name: str, module: str, tokenizer: str, folder: str) -> Job:
        words = ["-m", f"varaccel.training.{module}", "--tokenizer", self.out / tokenizer / "export"]
        words += ["--scenes", self.scenes, "--out", self.out / folder, "--device", self.options.device]
        words += ["--batch-size", 128]
        return self._job(f"{name}-encoding", words, kind="encode", images=self.recipe["images"])

    def _transformer(self, name: str) -> Job:
        return self._job(name, self._stage(name, "transformer", "--until", "{until}"), share=name)

    def _small(self, name: str) -> Job:
        ready = self.out / "ready" / f"mini-{name}-small"
        words = self._stage(f"{name}-small", "pipeline", "--install", ready)
        return self._job(f"mini-{name}-small", words, kind="assemble")

    def _stage(self, name: str, stage: str, *more: object) -> list[object]:
        family = name.removesuffix("-small")
        words = [HERE / f"train_mini_{family}.py", "--out", self.out, "--config", self.config(name)]
        words += ["--device", self.options.device, "--stages", stage, *more]
        words += ["--validation", self.recipe["held_out"]]
        return words + ["--no-compile"] * (not self.recipe["compile"])

    def _judging(self, model: str) -> Job:
        folder, recipe = self.out / "ready" / model, self.recipe
        words = [ROOT / "eval" / "adherence.py", "--model", folder, "--count", recipe["prompts"]]
        words += ["--batch-size", recipe["drawn_at_once"], "--device", self.options.device]
        words += ["--until", "{until}", "--unseen-in", self.scenes]
        words += ["--out", folder / "adherence.json", "--grid", folder / "samples.png"]
        return self._job(f"{model}-adherence", words, kind="judge")

    def config(self, name: str) -> Path:
        """The config of a network with the recipe's changes, as a file."""
        from varaccel.files import write_text

        shipped = json.loads((ROOT / CONFIGS[name]).read_text(encoding="utf-8"))
        content = dict(shipped)
        for part, change in self.recipe["changes"].get(name, {}).items():
            content[part] = {**content[part], **change} if isinstance(change, dict) else change
        if self.options.keep_tokenizers and "vocab_size" in shipped["model"]:
            content["model"]["vocab_size"] = shipped["model"][
                "vocab_size"
            ]  # that of the tokenizer that is kept
        path = self.out / "configs" / f"{name}.json"
        write_text(json.dumps(content, indent=2) + "\n", path)
        return path


def adopt(plan: Plan) -> None:
    """Copy what is not trained from the shipped models."""
    from varaccel.training.stages import adopt_image_tokenizer, adopt_text

    adopt_text(SHIPPED / "mini-llamagen", plan.out / "mini-text")
    if plan.options.keep_tokenizers:
        for model, folder in zip(FAMILIES, ("mini-vq", "mini-msvq", "mini-kl"), strict=True):
            if model in plan.options.only:
                adopt_image_tokenizer(SHIPPED / model, plan.out / folder / "export")


# -- what is ready -------------------------------------------------------------------------------------


def install(ready: Path, target: Path) -> list[str]:
    """Put the pipelines of a folder in the place of those in another; the names of those that were.

    A model's card stays; components that siblings have equal copies of are borrowed as they were.
    """
    from varaccel.errors import InputError
    from varaccel.files import atomic_path
    from varaccel.training.stages import borrow

    names = sorted(path.parent.name for path in ready.glob("*/model_index.json"))
    if not names:
        raise InputError(f"there is no finished pipeline in {ready}; train some first.")
    borrowed: dict[str, dict[str, str]] = {}
    for name in names:
        card, known = target / name / "README.md", target / name / "borrowed.json"
        borrowed[name] = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        with atomic_path(target / name) as temporary:
            shutil.copytree(ready / name, temporary)
            if card.is_file():
                shutil.copy(card, temporary / "README.md")
    for name, components in borrowed.items():
        for component, path in components.items():
            try:
                borrow(target / name, {component: path})
            except InputError as error:  # another one by now: it stays where it is
                print(error)
    return names


def main() -> int:
    options = parse()
    from varaccel.training.command_line import exit_status

    return exit_status(lambda: train(options)) or options.status


def train(options: argparse.Namespace) -> None:
    """Train within the budget, write the numbers, install; `options.status` is 1 if a job did not succeed."""
    from varaccel.training.card_numbers import write_card_numbers
    from varaccel.training.timetable import Timetable

    options.status = 0
    ready = options.out / "ready"
    if options.budget_minutes is not None:
        recipe = options.recipe or HERE / f"train_all_{options.device}.json"
        plan = Plan(json.loads(recipe.read_text(encoding="utf-8")), options)
        closing = plan.recipe["closing_seconds"]
        timetable = Timetable(plan.lanes(), options.out, options.budget_minutes, closing, BEGUN)
        adopt(plan)
        unfinished = timetable.run()
        command = " ".join(["python", *sys.argv])
        for model, runs in RUNS.items():
            if (ready / model / "model_index.json").is_file():
                write_card_numbers(ready / model, options.out, runs, options.device, command)
        print(timetable.summary())
        options.status = int(bool(unfinished))
    if options.install is not None:
        print(f"installed in {options.install}: {', '.join(install(ready, options.install))}")
        if options.install == SHIPPED:
            runpy.run_path(str(HERE / "weights_manifest.py"), run_name="__main__")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
