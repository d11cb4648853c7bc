"""Model parts on disk: our own format, and the checkpoints of other projects.

Read `parts.py` first.
"""
