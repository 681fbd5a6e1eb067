"""Image-token models of the transformers library as causal networks of this one, unmodified."""
