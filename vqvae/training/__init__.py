"""The training loop that every model shares.

Read `loop.py` first, then `task.py` (what a model brings), `config.py` (the settings), `process.py` (devices and
torchrun), `optimizers.py`, `checkpoints.py` and `log.py`.
"""
