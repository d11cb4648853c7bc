"""The two towers of image-text retrieval (to come)."""
