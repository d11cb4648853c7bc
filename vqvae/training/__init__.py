"""The training loop that every model shares.

Read `loop.py` first, then `task.py` (what a model brings), `config.py` (the settings), `process.py` (devices, torchrun,
the mesh), `sharding.py` (who has which part of a weight), `optimizers.py`, `state.py`, `checkpoints.py`, `stored.py`,
`lease.py` and `log.py`.
"""
