"""The two towers: their interface, our own, BriVL, Chinese-CLIP, OpenCLIP, those of transformers, and the import.

Read `base.py` first, then `multiscale.py`.
"""
