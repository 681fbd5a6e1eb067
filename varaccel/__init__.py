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

__version__ = "0.1.0"

_HOMES = {
    "Accelerator": "varaccel.decoding.accelerator",
    "Auto": "varaccel.decoding.auto",
    "CoDe": "varaccel.decoding.code",
    "CSpD": "varaccel.decoding.cspd",
    "DynamicTree": "varaccel.decoding.tree",
    "Jacobi": "varaccel.decoding.jacobi",
    "Lantern": "varaccel.decoding.lantern",
    "LayerSkip": "varaccel.decoding.speculative",
    "Speculative": "varaccel.decoding.speculative",
    "Topology": "varaccel.decoding.tree",
    "EagleHead": "varaccel.models.eagle",
    "FeatureCache": "varaccel.decoding.feature_cache",
    "FewerSteps": "varaccel.decoding.fewer_steps",
    "Plain": "varaccel.decoding.plain",
    "ZipAR": "varaccel.decoding.zipar",
    "make_accelerator": "varaccel.decoding.accelerator",
    "Guidance": "varaccel.decoding.guidance",
    "Sampling": "varaccel.decoding.sampling",
    "ScaleGuidance": "varaccel.decoding.scale_sampling",
    "ScaleSampling": "varaccel.decoding.scale_sampling",
    "AutoPipeline": "varaccel.pipelines.auto",
    "LlamaGenPipeline": "varaccel.pipelines.llamagen",
    "LlamaGenTransformer": "varaccel.models.llamagen",
    "MARPipeline": "varaccel.pipelines.mar",
    "MARTransformer": "varaccel.models.mar",
    "VARPipeline": "varaccel.pipelines.var",
    "VARTransformer": "varaccel.models.var",
    "MultiScaleVQModel": "varaccel.tokenizers.multiscale_vq",
    "VQModel": "varaccel.tokenizers.vq",
    "VaraccelError": "varaccel.errors",
    "InputError": "varaccel.errors",
    "CheckpointError": "varaccel.errors",
}

__all__ = [
    "Accelerator",
    "Auto",
    "AutoPipeline",
    "CSpD",
    "CheckpointError",
    "CoDe",
    "DynamicTree",
    "EagleHead",
    "FeatureCache",
    "FewerSteps",
    "Guidance",
    "InputError",
    "Jacobi",
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
    "ScaleSampling",
    "Speculative",
    "Topology",
    "VARPipeline",
    "VARTransformer",
    "VQModel",
    "VaraccelError",
    "ZipAR",
    "__version__",
    "make_accelerator",
]

if TYPE_CHECKING:
    from varaccel.decoding.accelerator import Accelerator, make_accelerator
    from varaccel.decoding.auto import Auto
    from varaccel.decoding.code import CoDe
    from varaccel.decoding.cspd import CSpD
    from varaccel.decoding.feature_cache import FeatureCache
    from varaccel.decoding.fewer_steps import FewerSteps
    from varaccel.decoding.guidance import Guidance
    from varaccel.decoding.jacobi import Jacobi
    from varaccel.decoding.lantern import Lantern
    from varaccel.decoding.plain import Plain
    from varaccel.decoding.sampling import Sampling
    from varaccel.decoding.scale_sampling import ScaleGuidance, ScaleSampling
    from varaccel.decoding.speculative import LayerSkip, Speculative
    from varaccel.decoding.tree import DynamicTree, Topology
    from varaccel.decoding.zipar import ZipAR
    from varaccel.errors import CheckpointError, InputError, VaraccelError
    from varaccel.models.eagle import EagleHead
    from varaccel.models.llamagen import LlamaGenTransformer
    from varaccel.models.mar import MARTransformer
    from varaccel.models.var import VARTransformer
    from varaccel.pipelines.auto import AutoPipeline
    from varaccel.pipelines.llamagen import LlamaGenPipeline
    from varaccel.pipelines.mar import MARPipeline
    from varaccel.pipelines.var import VARPipeline
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.tokenizers.vq import VQModel


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'varaccel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
