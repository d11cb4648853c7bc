"""How well towers find and name: recall both ways, zero-shot classification, tables and plots."""
