"""The version of the package, for the recipes that it writes and for whoever asks."""

__version__ = "0.1.0"
