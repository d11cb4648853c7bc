"""The image generator: how rows are laid out, the transformer, sampling, and its training."""
