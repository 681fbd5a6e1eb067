"""Images with the image-token models of transformers, and any accelerator for causal models."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from diffusers import PipelineQuantizationConfig
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from varaccel.engine.network import check_substitute
from varaccel.engine.statistics import Statistics
from varaccel.errors import CheckpointError, InputError
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.condition import Condition
from varaccel.nn.processes import is_split, said_first
from varaccel.pipelines.base import Call, Work
from varaccel.pipelines.causal import CausalPipeline, CausalSettings, check_eagle_head
from varaccel.pipelines.generate_call import GenerateArguments, ImageCall
from varaccel.pipelines.load_options import MODEL_OPTIONS, LoadOptions, is_placement
from varaccel.pipelines.loading import (
    MODEL_TYPES,
    first_of,
    is_pipeline_folder,
    pipeline_class_name,
    resolve_model,
)
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.tensor_parallel import shared_out


class TransformersPipeline(CausalPipeline, abstract=True):
    """Text-conditional generation with a model of transformers that predicts image tokens.

    A subclass names the model and its host and says what is around them: `_image_tokenizer`, and where they differ
    from the defaults `_prompt_ids` and the hooks of `CausalPipeline`.

    Args:
        model: with its image tokenizer, as transformers loads it.
        processor: of the model; it knows the prompt template and the special tokens.
        guidance_scale, top_k, temperature, top_p: defaults of a call; those of the model's generation config if None,
            or else the published ones.
        eagle_head, draft_model: drafters for speculative accelerators; a draft model is a smaller one of the same
            kind, with the same image tokens.

    Raises:
        InputError: components that do not fit each other.
    """

    model_type: ClassVar[str]
    """Of the model's configuration."""
    model_class: ClassVar[str]
    """Name of the model's class in transformers."""
    processor_class: ClassVar[str]
    """Name of its processor's class in transformers."""
    host_class: ClassVar[type[TransformersHost]]
    """The view of the model as a causal network."""
    split_rules: ClassVar[Mapping[str, str] | None] = {}
    """How processes share out the layers, where transformers has no rules for it; None if they cannot."""
    sampling_defaults: ClassVar[dict[str, float]] = {
        "guidance_scale": 5.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    """Of the model's authors."""
    model_cpu_offload_seq = "model"
    _optional_components = ["eagle_head", "draft_model"]  # noqa: RUF012

    model: Any
    processor: Any
    draft_model: Any

    def __init_subclass__(cls, *, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(abstract=abstract, **options)
        if not abstract:
            MODEL_TYPES[cls.model_type] = cls.__name__

    def __init__(
        self,
        model: Any,
        processor: Any,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        eagle_head: Any = None,
        draft_model: Any = None,
    ) -> None:
        super(CausalPipeline, self).__init__()
        self._check_processor(processor)
        self.transformer = self.host_of(model, "model")
        self.vq_model = self._image_tokenizer(model, processor)
        self._check_vocabulary(self.transformer.signature(), self.vq_model)
        self._drafter = None if draft_model is None else self.host_of(draft_model, "draft_model")
        if self._drafter is not None:
            check_substitute(self._drafter, self.transformer, "drafter")
        check_eagle_head(eagle_head, self.transformer, "draft_model")
        self.register_modules(
            model=model, processor=processor, eagle_head=eagle_head, draft_model=draft_model
        )
        given = {
            "guidance_scale": guidance_scale,
            "top_k": top_k,
            "temperature": temperature,
            "top_p": top_p,
        }
        self.register_to_config(**self._sampling_settings(model, given))
        self._begin()

    @classmethod
    def _check_processor(cls, processor: Any) -> None:
        """Refuse what cannot write the model's prompts, such as the bare tokenizer of a folder without a processor.

        Raises:
            InputError: no processor, or that of another model.
        """
        if processor is None:
            raise InputError(
                f"a {cls.__name__} needs the processor of its model, which writes prompts; pass "
                "processor=AutoProcessor.from_pretrained(...)."
            )
        names = [parent.__name__ for parent in type(processor).__mro__]
        # the same class without torchvision has another ending
        if not any(name.startswith(cls.processor_class) for name in names):
            raise InputError(
                f"processor of a {cls.__name__} is a {cls.processor_class} of transformers, got "
                f"{type(processor).__name__}; pass that of the model, or fetch its repository as a whole."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        # the view of the model, its image tokenizer and the drafters were made of these
        fixed = ("model", "processor", "draft_model")
        if name in fixed and vars(self).get(name, value) is not value:
            raise InputError(
                f"{name} of a pipeline cannot be exchanged; make another pipeline on the same components: "
                f"{type(self).__name__}.from_pipe(pipe, {name}=...)."
            )
        super().__setattr__(name, value)

    @classmethod
    def host_of(cls, model: Any, role: str) -> TransformersHost:
        """The view of a model.

        Raises:
            InputError: a model of another class.
        """
        wanted = getattr(transformers, cls.model_class)
        if not isinstance(model, wanted):
            raise InputError(
                f"{role} of a {cls.__name__} is a {cls.model_class} of transformers, got {type(model).__name__}."
            )
        return cls.host_class(model)

    @classmethod
    def _sampling_settings(cls, model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
        """What was given, or else what the model's generation config says, or else the authors' settings."""
        recorded = model.generation_config
        settings = {}
        for name, default in cls.sampling_defaults.items():
            value = given[name] if given[name] is not None else getattr(recorded, name, None)
            settings[name] = default if value is None else value
        return settings

    @classmethod
    @abstractmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> Any:
        """See `vq_model` of `CausalPipeline`."""

    @property
    def drafters(self) -> dict[str, Any]:
        found = {"eagle": self.eagle_head, "small": self._drafter}
        return {name: drafter for name, drafter in found.items() if drafter is not None}

    @property
    def image_tokenizer(self) -> Any:
        return self.vq_model

    def _parts(self, work: Work) -> list[Any]:
        if work == "text":  # token ids are all that is made of prompts
            return []
        # the image tokenizer is a part of the model
        return [self.model, self.eagle_head, self.draft_model] if work == "tokens" else [self.model]

    # -- prompts ---------------------------------------------------------------------------------------

    def _condition(self, prompts: list[str | int]) -> Condition:
        return self._tokenized(prompts, None)

    def _condition_of(self, prompts: list[str | int], settings: CausalSettings) -> Condition:
        return self._tokenized(prompts, settings.size)

    def _tokenized(self, prompts: list[str | int], size: tuple[int, int] | None) -> Condition:
        """Token ids [B, T] of prompts, padded on the left."""
        rows = [self._prompt_ids(self._checked_prompt(p), size) for p in self._descriptions(prompts)]
        return left_padded(rows, self._pad_token(), self.transformer.device)

    def _checked_prompt(self, prompt: str) -> str:
        """A prompt as the processor can read it.

        Raises:
            InputError: the token that stands for an image to read, which processors replace.
        """
        image_token = getattr(self.processor, "image_token", None)
        if image_token and image_token in prompt:
            raise InputError(
                f"the prompt holds {image_token!r}, which stands for an image that the model reads; describe the "
                "image in words."
            )
        # a lone surrogate, as from a badly decoded file, cannot be written as UTF-8 and would stop the tokenizer
        return prompt.encode("utf-8", "replace").decode()

    def _without_prompt(self, settings: CausalSettings) -> Condition:
        """What the unconditional branch of guidance reads: the default negative prompt, or an empty one."""
        if self.default_negative_prompt is not None:
            return self._condition_of([self.default_negative_prompt], settings)
        empty = self._condition_of([""], settings)
        return Condition(self.transformer.unconditional(empty.values), empty.mask)

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        """Token ids of one prompt, up to the token that begins the image.

        Args:
            size: of the image, height and width in pixels; None for the model's own.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how prompts are written")

    def _pad_token(self) -> int:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return int(tokenizer.pad_token_id or 0)

    def _templated(self, prompt: str) -> str:
        """A prompt in the chat template of the processor, if it has one."""
        if getattr(self.processor, "chat_template", None) is None:
            return prompt
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        return str(self.processor.apply_chat_template([message], add_generation_prompt=True))

    def check_prompts(self, prompts: Any) -> None:
        self._condition(list(prompts))

    # -- several processes -----------------------------------------------------------------------------

    def _generate(self, call: Call, settings: CausalSettings) -> ImageOutput | tuple[Any, Statistics]:
        if is_split(self.model):
            self._agree(call)
        return super()._generate(call, settings)

    def _agree(self, call: Call) -> None:
        """Have all processes that hold the model together draw alike: as the first of them.

        Raises:
            InputError: the processes were given different prompts.
        """
        states = [generator.get_state() for generator in call.generators]
        prompts, states = said_first(self.model, (call.prompts, states))
        if prompts != call.prompts or len(states) != call.images:
            raise InputError("processes that hold one model together must be given the same prompts.")
        for generator, state in zip(call.generators, states, strict=True):
            generator.set_state(state)

    # -- inside generate() -----------------------------------------------------------------------------

    @classmethod
    def generate_options(cls, model: Any, options: dict[str, Any]) -> dict[str, Any] | None:
        """Options of a `model.generate` call for `GenerationMixin.generate`; None if the call is not for an image."""
        return options

    @classmethod
    def read_generate(cls, host: Any, arguments: GenerateArguments) -> ImageCall:
        """What a `model.generate` call says.

        Raises:
            InputError: a call that is not for an image, or a model whose `generate` draws none.
        """
        raise InputError(f"{cls.model_class}.generate() draws no images; use varaccel's {cls.__name__}.")

    # -- loading ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """Load a repository of a model in transformers' layout, or a folder that a pipeline saved.

        Args:
            name: see `resolve_model`.
            options: as of `LoadablePipeline.from_pretrained`, and of the model `device_map` over several devices
                ("auto", ...), `tp_size` for as many processes that hold a part of every layer each,
                `attn_implementation`, `quantization_config`, `max_memory`, `offload_folder`, `distributed_config` and
                others that `PreTrainedModel.from_pretrained` takes.

        Raises:
            CheckpointError: nothing there, a model of another kind, no processor, or a damaged file.
            InputError: an unknown option, number type or device; a `tp_size` that does not divide the heads.
        """
        placement = {"device_map": options.pop("device_map")} if is_placement(options) else {}
        own = {option: options.pop(option) for option in MODEL_OPTIONS if option in options}
        chosen = LoadOptions.of(options)
        chosen.check_parts(cls)
        folder = resolve_model(name, **chosen.hub)
        if is_pipeline_folder(folder):
            for_model = cls._model_options(options, placement)
            return cls._from_pipeline_folder(folder, options, {**for_model, **own})
        found = pipeline_class_name(folder)
        if found != cls.__name__:
            raise CheckpointError(
                f"{folder} holds a model for {found}, not for {cls.__name__}; load it with AutoPipeline."
            )
        parts = dict(chosen.parts)
        if "processor" not in parts:
            parts["processor"] = cls._load_processor(folder)
        if "model" not in parts:
            placed = placement if chosen.device is None else {"device_map": chosen.device}
            parts["model"] = cls._load_model(folder, chosen, **chosen.reading, **placed, **own)
        pipe = cls(**{**cls._further_parts(folder, parts["model"], chosen), **parts})
        if chosen.device is not None:
            pipe.to(chosen.device)
        return pipe

    @staticmethod
    def _model_options(options: dict[str, Any], placement: Mapping[str, Any]) -> dict[str, Any]:
        """Take options that concern the model alone out of those for a folder of several components."""
        if placement.get("device_map") == "balanced":  # whole components: diffusers knows how
            options.update(placement)
            return {}
        taken = dict(placement)
        names = ["max_memory", "offload_folder", "offload_state_dict"] if placement else []
        if not isinstance(options.get("quantization_config"), PipelineQuantizationConfig):
            names.append("quantization_config")
        return taken | {name: options.pop(name) for name in names if name in options}

    @classmethod
    def _from_pipeline_folder(
        cls, folder: Path, options: dict[str, Any], model_options: Mapping[str, Any]
    ) -> Self:
        """A pipeline of a folder in diffusers' layout.

        Args:
            options: of `from_pretrained`.
            model_options: further ones, with which transformers reads the model.
        """
        chosen = LoadOptions.of(options)
        for_pipelines = {"device_map", "quantization_config"} & chosen.reading.keys()
        # diffusers would not see that weights are missing; but it knows how to place or quantise whole components
        if "model" not in options and (model_options or not for_pipelines):
            reading = {name: value for name, value in chosen.reading.items() if name not in for_pipelines}
            options["model"] = cls._load_model(folder / "model", chosen, **{**reading, **model_options})
        return super().from_pretrained(folder, **options)

    @classmethod
    def _further_parts(cls, folder: Path, model: Any, chosen: LoadOptions) -> dict[str, Any]:
        """Components that lie in a repository of transformers' layout beside model and processor."""
        return {}

    @classmethod
    def _load_model(cls, folder: Path, chosen: LoadOptions, **options: Any) -> Any:
        """The model as transformers reads it, in its chosen number type."""
        dtype = chosen.dtype_of("model")
        if dtype is not None:
            options["dtype"] = dtype
        options = shared_out(folder, options, cls.split_rules)
        load = getattr(transformers, cls.model_class).from_pretrained
        try:
            model, facts = load(folder, **{**options, "output_loading_info": True})
        except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
        # transformers draws them at random with no more than a warning
        missing = sorted(facts["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{folder} lacks {first_of(missing)}, which would be drawn at random; fetch the model again."
            )
        return model.eval()

    @classmethod
    def _load_processor(cls, folder: Path) -> Any:
        try:
            return transformers.AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{folder} has no processor that can be loaded ({reason}); pass processor=, or fetch the model again."
            ) from error


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Condition:
    """Prompts of token ids as one table [B, T], the shorter ones padded on the left."""
    length = max(len(row) for row in rows)
    ids = [F.pad(torch.tensor(row), (length - len(row), 0), value=pad) for row in rows]
    if all(len(row) == length for row in rows):
        return Condition(torch.stack(ids).to(device))
    used: list[Tensor] = [F.pad(torch.ones(len(row)), (length - len(row), 0)) for row in rows]
    return Condition(torch.stack(ids).to(device), torch.stack(used).bool().to(device))
