"""Recipes that build shards from public packages: the emoji set, its concepts, and the npm client."""
