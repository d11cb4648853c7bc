"""How good: bits, captions, objectives, styles, upscaling."""
