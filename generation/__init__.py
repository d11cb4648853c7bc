"""The generator: rows of tokens, the transformer, drawing, captions, and training; what is CogView's own in
`cogview/`, and Janus' in `janus/`.

Read `rows/` first, then `transformer/model.py`, then `drawing/decoding.py`.
"""
