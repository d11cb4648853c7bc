"""LlamaGen as published: its keys, the import of its weights, and the text encoder that its captions go through."""
