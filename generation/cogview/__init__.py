"""CogView as published: its rows, its sampler, and the import of its weights."""
