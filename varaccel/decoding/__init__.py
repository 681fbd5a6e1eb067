"""Decoding. Importing the package registers every accelerator of the library."""

from varaccel.decoding import jacobi, lantern, plain, speculative, zipar

__all__ = ["jacobi", "lantern", "plain", "speculative", "zipar"]
