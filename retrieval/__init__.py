"""Image-text retrieval: two towers, their training and evaluation, vectors of shards, collections that are searched.

Read `towers/base.py` first, then `training/objectives.py`, then `collections/base.py`.
"""
