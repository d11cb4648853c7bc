"""Janus as published: its configuration, its keys in two layouts, and the import of its weights."""
