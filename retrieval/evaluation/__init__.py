"""Evaluation of towers: recall in both directions, zero-shot classification, tables and plots."""
