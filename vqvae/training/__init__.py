"""The training loop that every model shares: optimizers, processes, checkpoints.

Read `loop.py` first.
"""
