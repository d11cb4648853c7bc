"""Drawing: sampling, decoding with a cache, and how one step is run.

Read `decoding.py` first, then `blocks.py` (how many rows at once) and `engines.py` (how a step runs).
"""
