"""Tests by the package that they test; `helpers/` is what they share, `golden/` holds tensors of the original code."""
