"""The transformer: configuration, model, attention and its views, the cache, packed rows, 8-bit weights, adapters.

Read `config.py` first, then `model.py`, then `views.py` (which tokens a token sees).
"""
