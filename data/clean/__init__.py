"""Cleaning of shards and texts: language, script, privacy, listed words, near duplicates, captions that do not fit.

Read `judged.py` first (what a filter is), then `run.py`; each other file is one filter around one library.
"""
