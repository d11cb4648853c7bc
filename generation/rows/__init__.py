"""How a caption and a picture become one row of tokens: the vocabulary, rows and batches, the kinds of rows.

Read `vocabulary.py` and `draw.py` first.
"""
