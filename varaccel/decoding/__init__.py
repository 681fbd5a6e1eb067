"""Decoding. Importing the package registers every accelerator of the library."""

from varaccel.decoding import auto, code, jacobi, lantern, plain, speculative, zipar

__all__ = ["auto", "code", "jacobi", "lantern", "plain", "speculative", "zipar"]
