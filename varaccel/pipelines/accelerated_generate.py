"""Accelerators inside `model.generate` of transformers."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationMixin

from varaccel.accelerators import AnyAccelerator, resolve_accelerator
from varaccel.engine.accelerator import plan_call
from varaccel.engine.network import check_substitute
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.engine.seeds import MAX_SEED
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.eval_mode import eval_mode
from varaccel.nn.packed_weights import packed_weights
from varaccel.nn.processes import said_first
from varaccel.pipelines.auto import AutoPipeline  # noqa: F401  makes the pipelines known
from varaccel.pipelines.causal import new_canvas
from varaccel.pipelines.generate_call import GenerateArguments, ImageCall
from varaccel.pipelines.loading import MODEL_TYPES, PIPELINES
from varaccel.pipelines.memory import memory_errors
from varaccel.pipelines.offloading import bring
from varaccel.pipelines.published import load_network
from varaccel.pipelines.transformers_host import TransformersPipeline

ModelT = TypeVar("ModelT")


class ImageGeneration:
    """A decoding method for `model.generate(..., custom_generate=…)` that draws images with an accelerator.

    As in transformers, sampled images follow torch's default generator: `torch.manual_seed(0)` before the call repeats
    them. It gives one number, the seed of all images of the call.

    Args:
        accelerator: see `pipe(accelerator=…)`.
        draft_model: a smaller model of the same kind, for speculative accelerators.

    Raises:
        InputError: an unknown accelerator; in a call, what it cannot do.
    """

    def __init__(self, accelerator: AnyAccelerator | str = "auto", *, draft_model: Any = None) -> None:
        self.accelerator = resolve_accelerator(accelerator, CausalJob, "causal models")
        self.draft_model = draft_model
        self._host: TransformersHost | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = None,
        generation_config: Any = None,
        image_sizes: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """The token ids that the model's `generate` returns for an image.

        Raises:
            InputError: a model without image tokens, a call for text, an option that would change the images.
        """
        pipeline = pipeline_of(model)
        host = self._host_of(model, pipeline)
        if inputs.get("inputs_embeds") is not None:
            raise InputError("accelerated generation reads token ids; pass input_ids, not inputs_embeds.")
        if image_sizes is not None:
            inputs["image_sizes"] = image_sizes
        arguments = GenerateArguments(input_ids, generation_config, list(logits_processor), inputs)
        arguments.check()
        call = pipeline.read_generate(host, arguments)
        return call.finish(self._draw(host, call, self._drafters(host, pipeline)))

    def _host_of(self, model: Any, pipeline: type[TransformersPipeline]) -> TransformersHost:
        if self._host is None or self._host.model is not model:
            self._host = pipeline.host_of(model, "model")
        return self._host

    def _drafters(
        self, host: TransformersHost, pipeline: type[TransformersPipeline]
    ) -> dict[str, TransformersHost]:
        if self.draft_model is None:
            return {}
        return {"small": check_substitute(pipeline.host_of(self.draft_model, "draft_model"), host, "drafter")}

    def _draw(self, host: TransformersHost, call: ImageCall, drafters: dict[str, Any]) -> Tensor:
        """Token ids [B, N] of the images."""
        batch = call.condition.batch
        networks = [host.model, *([] if self.draft_model is None else [self.draft_model])]
        seed = said_first(host.model, int(torch.randint(MAX_SEED - batch, ())))
        canvas = new_canvas(call.grids, batch, host.device)
        bring(networks)
        with memory_errors(batch), eval_mode(networks), packed_weights(networks), torch.inference_mode():
            job = CausalJob(
                network=host,
                canvas=canvas,
                rows=batch * call.guidance.branches,
                on_step=lambda step: None,
                drafters=drafters,
                load_network=load_network,
                condition=call.condition,
                grids=call.grids,
                guidance=call.guidance,
                sampling=call.sampling,
                randomness=Randomness.draw(
                    image_generators(batch, seed, None), canvas.num_positions, host.device
                ),
            )
            plan_call(self.accelerator, job).run()
            job.report_numbers()
        return canvas.tokens


def pipeline_of(model: Any) -> type[TransformersPipeline]:
    """The pipeline class for a model of transformers.

    Raises:
        InputError: a model without image tokens.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"a {type(model).__name__} draws no images token by token; models of transformers that do are "
            f"{', '.join(sorted(MODEL_TYPES))}."
        )
    pipeline = PIPELINES[MODEL_TYPES[model_type]]
    assert issubclass(pipeline, TransformersPipeline)
    return pipeline


def accelerate(
    model: ModelT, accelerator: AnyAccelerator | str | None = "auto", *, draft_model: Any = None
) -> ModelT:
    """Have `model.generate` draw images with an accelerator; text is generated as before.

    Only this object gets another `generate`; its weights and class stay as they are. Libraries that call
    `model.generate` draw with the accelerator too, such as diffusers' `GlmImagePipeline`:

        varaccel.accelerate(pipe.vision_language_encoder, "jacobi")

    Args:
        model: a model of transformers with image tokens.
        accelerator: see `pipe(accelerator=…)`; None gives the model its own `generate` back.
        draft_model: see `ImageGeneration`.

    Returns:
        the model.

    Raises:
        InputError: a model without image tokens; an unknown accelerator.
    """
    pipeline = pipeline_of(model)
    host: Any = model
    if accelerator is None:
        vars(host).pop("generate", None)
        return model
    host.generate = _Generate(model, pipeline, ImageGeneration(accelerator, draft_model=draft_model))
    return model


@dataclass(frozen=True, eq=False)
class _Generate:
    """The `generate` of an accelerated model; an object, so that it is copied and pickled with the model."""

    model: Any
    pipeline: type[TransformersPipeline]
    method: ImageGeneration

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        chosen = self.pipeline.generate_options(self.model, options)
        if chosen is None:
            return type(self.model).generate(self.model, *arguments, **options)
        return GenerationMixin.generate(self.model, *arguments, custom_generate=self.method, **chosen)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.model).generate, self.model))
