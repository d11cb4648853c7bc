"""The command line: parsing, calling and printing, and nothing else.

Read `app.py` first (the tree of commands and the exit codes), then `draw.py`.
"""
