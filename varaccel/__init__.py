"""varaccel: fast decoding for visual autoregressive image models.

    from varaccel import AutoPipeline, ZipAR

    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    out = pipe("a red sphere left of a blue cube at sunset", accelerator=ZipAR(window=4), seed=0)
    out.images[0].save("scene.png")
    print(out.stats)

Names are loaded when they are first used, so that `import varaccel` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from varaccel.public_names import PUBLIC_NAMES
from varaccel.version import __version__

__all__ = [
    "Accelerator",
    "Auto",
    "AutoPipeline",
    "BitSampling",
    "BitwiseVQModel",
    "CSpD",
    "CheckpointError",
    "CoDe",
    "DynamicTree",
    "EagleHead",
    "FastVAR",
    "FeatureCache",
    "FewerSteps",
    "GlmImagePipeline",
    "Guidance",
    "ImageGeneration",
    "InfinityPipeline",
    "InfinityTransformer",
    "InputError",
    "Jacobi",
    "JanusPipeline",
    "Lantern",
    "LayerSkip",
    "LlamaGenPipeline",
    "LlamaGenTransformer",
    "MARPipeline",
    "MARTransformer",
    "MultiScaleVQModel",
    "Plain",
    "Sampling",
    "ScaleGuidance",
    "ScalePlan",
    "ScaleSampling",
    "SkipVAR",
    "Speculative",
    "Topology",
    "VARPipeline",
    "VARTransformer",
    "VQModel",
    "VaraccelError",
    "ZipAR",
    "__version__",
    "accelerate",
    "make_accelerator",
]

if TYPE_CHECKING:
    from varaccel.accelerators import Accelerator, make_accelerator
    from varaccel.accelerators.auto import Auto
    from varaccel.accelerators.code import CoDe
    from varaccel.accelerators.cspd import CSpD
    from varaccel.accelerators.fast_var import FastVAR
    from varaccel.accelerators.feature_cache import FeatureCache
    from varaccel.accelerators.fewer_steps import FewerSteps
    from varaccel.accelerators.jacobi import Jacobi
    from varaccel.accelerators.lantern import Lantern
    from varaccel.accelerators.plain import Plain
    from varaccel.accelerators.scale_plan import ScalePlan
    from varaccel.accelerators.skip_var import SkipVAR
    from varaccel.accelerators.speculative import Speculative
    from varaccel.accelerators.zipar import ZipAR
    from varaccel.errors import CheckpointError, InputError, VaraccelError
    from varaccel.hosts.causal.guidance import Guidance
    from varaccel.hosts.causal.sampling import Sampling
    from varaccel.hosts.next_scale.bit_sampling import BitSampling
    from varaccel.hosts.next_scale.sampling import ScaleGuidance, ScaleSampling
    from varaccel.models.eagle import EagleHead
    from varaccel.models.infinity import InfinityTransformer
    from varaccel.models.llamagen import LlamaGenTransformer
    from varaccel.models.mar import MARTransformer
    from varaccel.models.var import VARTransformer
    from varaccel.pipelines.accelerated_generate import ImageGeneration, accelerate
    from varaccel.pipelines.auto import AutoPipeline
    from varaccel.pipelines.glm_image import GlmImagePipeline
    from varaccel.pipelines.infinity import InfinityPipeline
    from varaccel.pipelines.janus import JanusPipeline
    from varaccel.pipelines.llamagen import LlamaGenPipeline
    from varaccel.pipelines.mar import MARPipeline
    from varaccel.pipelines.var import VARPipeline
    from varaccel.speculation.drafters import LayerSkip
    from varaccel.speculation.tree import DynamicTree, Topology
    from varaccel.tokenizers.bitwise_vq import BitwiseVQModel
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.tokenizers.vq import VQModel


def __getattr__(name: str) -> Any:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'varaccel' has no attribute {name!r}")
    return getattr(import_module(PUBLIC_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
