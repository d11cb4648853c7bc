"""Emu3-Gen as transformers stores it: its configuration, its keys, and the import of its weights."""
