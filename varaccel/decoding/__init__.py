"""Decoding. Importing the package registers every accelerator of the library."""

from varaccel.decoding import auto, jacobi, lantern, plain, speculative, zipar

__all__ = ["auto", "jacobi", "lantern", "plain", "speculative", "zipar"]
