"""Training of towers: pairs, objectives, the training command.

Read `objectives.py` first, then `train_towers.py`.
"""
