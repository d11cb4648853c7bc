"""The generator: rows of tokens, the transformer, drawing, captions, and training; CogView's own ways in `cogview/`.

Read `rows/` first, then `transformer/model.py`, then `drawing/decoding.py`.
"""
