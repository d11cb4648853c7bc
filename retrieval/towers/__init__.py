"""The two towers: their common interface, our own, BriVL, Chinese-CLIP and OpenCLIP, and the import of published weights.

Read `base.py` first, then `multiscale.py`.
"""
