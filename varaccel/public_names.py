"""The names that `varaccel` offers, and the modules that define them."""

from __future__ import annotations

from collections.abc import Mapping

PUBLIC_NAMES: Mapping[str, str] = {
    "Accelerator": "varaccel.accelerators",
    "Auto": "varaccel.accelerators.auto",
    "CoDe": "varaccel.accelerators.code",
    "CSpD": "varaccel.accelerators.cspd",
    "DynamicTree": "varaccel.speculation.tree",
    "Jacobi": "varaccel.accelerators.jacobi",
    "Lantern": "varaccel.accelerators.lantern",
    "LayerSkip": "varaccel.speculation.drafters",
    "Speculative": "varaccel.accelerators.speculative",
    "Topology": "varaccel.speculation.tree",
    "EagleHead": "varaccel.models.eagle",
    "FeatureCache": "varaccel.accelerators.feature_cache",
    "FewerSteps": "varaccel.accelerators.fewer_steps",
    "Plain": "varaccel.accelerators.plain",
    "ZipAR": "varaccel.accelerators.zipar",
    "make_accelerator": "varaccel.accelerators",
    "Guidance": "varaccel.hosts.causal.guidance",
    "Sampling": "varaccel.hosts.causal.sampling",
    "ScaleGuidance": "varaccel.hosts.next_scale.sampling",
    "ScaleSampling": "varaccel.hosts.next_scale.sampling",
    "AutoPipeline": "varaccel.pipelines.auto",
    "GlmImagePipeline": "varaccel.pipelines.glm_image",
    "ImageGeneration": "varaccel.pipelines.accelerated_generate",
    "accelerate": "varaccel.pipelines.accelerated_generate",
    "JanusPipeline": "varaccel.pipelines.janus",
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
