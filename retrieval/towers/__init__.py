"""The two towers: their interface, our own, BriVL, Chinese-CLIP, OpenCLIP, and the import of published weights.

Read `base.py` first, then `multiscale.py`.
"""
