"""The transformer: configuration, model, attention, caches, packed rows, 8-bit weights, adapters.

Read `config.py` and `model.py` first.
"""
