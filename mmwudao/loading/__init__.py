"""Model directories: finding, checking and loading the parts of a model, devices, and the memory report.

Read `model_dir.py` first (what a model directory holds), then `loaded.py` (its parts in memory).
"""
