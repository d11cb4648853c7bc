"""The HTTP service: vectors, search, pictures and captions for many clients at once, in one process."""
