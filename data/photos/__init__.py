"""A folder of pictures as people keep them: which files are pictures, how each is read, and reading many at once.

Read `files.py` first, then `reading.py`; `decoding.py` reads in several processes.
"""
