"""Measurements: every figure in the documents comes from one of these scripts. `run_all.py` runs them."""
