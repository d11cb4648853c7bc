"""Collections of the pictures in a folder, which follow it: where they are kept, and how.

Read `places.py` first, then `indexing.py`.
"""
