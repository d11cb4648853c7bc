"""Drawing: sampling, decoding with a cache, and how one step is run.

Read `decoding.py` first, then `engines.py`.
"""
