"""Training of towers: picture-caption pairs, objectives, and the training run.

Read `objectives.py` first, then `train_towers.py`.
"""
