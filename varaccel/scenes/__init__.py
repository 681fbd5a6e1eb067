"""A procedural captioned world: solids on a floor, ray cast, with captions that are true of the image."""

from varaccel.scenes.grammar import VOCABULARY, Caption, Statement, caption, describe
from varaccel.scenes.renderer import Rendering, render
from varaccel.scenes.sampler import sample_scene
from varaccel.scenes.world import HELD_OUT_SEED, WORLD_VERSION, Scene, SceneObject

__all__ = [
    "HELD_OUT_SEED",
    "VOCABULARY",
    "WORLD_VERSION",
    "Caption",
    "Rendering",
    "Scene",
    "SceneObject",
    "Statement",
    "caption",
    "describe",
    "render",
    "sample_scene",
]
