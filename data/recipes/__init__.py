"""Recipes that build shards from public packages: the emoji set, icons and flags, with what they share; and texts.

Read `emoji.py` or `icons.py` first; `rendering.py` writes the shards, and `splits.py` says what is held out.
`texts.py` writes short texts for a text encoder, `easy_vqa.py` and `questions.py` ask about pictures.
"""
