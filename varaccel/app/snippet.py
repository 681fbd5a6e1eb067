"""What was drawn on the page, as Python code and as a command line that draw the very same images again."""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from varaccel.accelerators import ACCELERATORS, AnyAccelerator, make_accelerator
from varaccel.errors import InputError
from varaccel.public_names import PUBLIC_NAMES

COMMAND_OPTIONS = ("guidance_scale", "temperature", "top_k", "top_p", "num_iterations", "head_steps")
"""Arguments of a pipeline call that `varaccel generate` has options for."""

_LINE = 88
"""Letters of a line of Python before it is broken."""


@dataclass(frozen=True)
class DrawRequest:
    """Images of one prompt, with everything that they depend on.

    Attributes:
        model: name, folder or hub id, as `AutoPipeline` takes it.
        prompt: a description, or the name or label of a class.
        accelerator: registered name.
        options: of the accelerator, plain values by name; the others keep their defaults.
        seed: of the first image; image i uses seed + i.
        guidance_scale: None for the model's own.
        count: images of the prompt, drawn in one call.
        call: further arguments of the pipeline call, such as num_iterations; None stands for the model's own.
    """

    model: str
    prompt: str
    accelerator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    guidance_scale: float | None = None
    count: int = 1
    call: Mapping[str, Any] = field(default_factory=dict)

    def accelerator_object(self) -> AnyAccelerator:
        """The accelerator with its options.

        Raises:
            InputError: an unknown name or option; a value that the accelerator refuses.
        """
        return make_accelerator(self.accelerator, self.options)

    def call_options(self) -> dict[str, Any]:
        """The arguments of the call that were chosen, guidance included.

        Raises:
            InputError: a name that is none of Python.
        """
        chosen = {"guidance_scale": self.guidance_scale, **self.call}
        for name in chosen:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise InputError(f"{name!r} cannot be an argument of a call; name one of the pipeline's own.")
        return {name: value for name, value in chosen.items() if value is not None}

    def pipeline_call(self) -> dict[str, Any]:
        """All arguments of the pipeline call that draws the images.

        Raises:
            InputError: an accelerator or a name of an argument that cannot be used.
        """
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "num_images_per_prompt": self.count,
            **self.call_options(),
            "accelerator": self.accelerator_object(),
        }


def given_options(accelerator: AnyAccelerator) -> dict[str, Any]:
    """The options of an accelerator that are not its defaults, as they were given."""
    return {
        item.name: value
        for item in dataclasses.fields(accelerator)
        if (value := getattr(accelerator, item.name)) != item.default
    }


# -- Python --------------------------------------------------------------------------------------------


def reproduce_python(request: DrawRequest) -> str:
    """Code that draws the images of `request`, prints what they cost and saves them in the working folder.

    Raises:
        InputError: an accelerator that cannot be used, or a value that no text can stand for, such as a network.
    """
    request.accelerator_object()  # what it refuses is refused here, not where the code is run
    name, accelerator = _accelerator_python(request)
    several = [] if request.count == 1 else [f"num_images_per_prompt={_literal(request.count)}"]
    arguments = [
        _literal(request.prompt),
        f"seed={_literal(request.seed)}",
        *several,
        *(f"{key}={_literal(value)}" for key, value in request.call_options().items()),
        f"accelerator={accelerator}",
    ]
    if request.count == 1:
        save = ['output.images[0].save("image.png")']
    else:
        save = [
            "for index, image in enumerate(output.images):",
            '    image.save(f"image-{index}.png")',
        ]
    return "\n".join(
        [
            f"from varaccel import {', '.join(sorted(['AutoPipeline', name]))}",
            "",
            f"pipe = AutoPipeline.from_pretrained({_literal(request.model)})",
            *_call_lines("output = pipe", arguments),
            "print(output.stats)",
            *save,
            "",
        ]
    )


def _accelerator_python(request: DrawRequest) -> tuple[str, str]:
    """The name to import, and the call that makes the accelerator."""
    cls = ACCELERATORS[request.accelerator]
    public = cls.__name__
    if PUBLIC_NAMES.get(public) == cls.__module__:
        options = (f"{key}={_literal(value)}" for key, value in request.options.items())
        return public, f"{public}({', '.join(options)})"
    options_given = f", {_literal(dict(request.options))}" if request.options else ""
    return "make_accelerator", f"make_accelerator({_literal(request.accelerator)}{options_given})"


def _call_lines(function: str, arguments: list[str]) -> list[str]:
    """A call in one line if that is short, else an argument per line."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= _LINE:
        return [line]
    return [f"{function}(", *(f"    {argument}," for argument in arguments), ")"]


def _literal(value: Any) -> str:
    """Python for a plain value, with double quotes where that needs no escapes.

    Raises:
        InputError: it is not plain.
    """
    if isinstance(value, str):
        # beside a single quote, Python writes double ones around a text without double quotes
        return repr(value) if '"' in value else '"' + repr("'" + value)[2:]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
    raise _not_plain(value)


def _not_plain(value: object) -> InputError:
    return InputError(
        f"a {type(value).__name__} cannot be written down; give numbers, names and lists as options."
    )


# -- the command line ----------------------------------------------------------------------------------


def reproduce_command(request: DrawRequest) -> str:
    """A command for a POSIX shell that draws the images of `request` and writes them to the working folder.

    It writes the files that the code of `reproduce_python` writes; of several images also a sheet, image.png.

    Raises:
        InputError: an accelerator that cannot be used; an argument of the call that the command line has no option
            for; a value or a letter that no command line can hold.
    """
    request.accelerator_object()
    words = ["--model", request.model, "--seed", str(request.seed)]
    if request.count != 1:
        words += ["--count", str(request.count), "--separate"]
    for name, value in request.call_options().items():
        if name not in COMMAND_OPTIONS or not isinstance(value, (int, float)):
            raise InputError(f"`varaccel generate` has no option for {name}={value!r}; use the Python code.")
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--accelerator", request.accelerator]
    for name, value in request.options.items():
        words += ["-o", f"{name}={_typed(value)}"]
    # what begins with a dash is an option unless everything after a lone -- is not
    words = [*words, "--", request.prompt] if request.prompt.startswith("-") else [request.prompt, *words]
    command = " ".join(map(shlex.quote, ["varaccel", "generate", *words]))
    if "\0" in command or not _encodable(command):
        raise InputError("the prompt holds a letter that no command line can hold; use the Python code.")
    return command


def _typed(value: Any) -> str:
    """A value as `varaccel.engine.option_text.parse_options` reads it: JSON, plain names without quotes.

    Raises:
        InputError: it is not plain.
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.+/-]*", value, re.ASCII):
        try:
            json.loads(value)
        except ValueError:  # no null, true or NaN
            return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise _not_plain(value) from error


def _encodable(text: str) -> bool:
    """Whether there are bytes for it; half a surrogate pair has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
