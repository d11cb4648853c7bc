"""Training of the generator and of styles: pairs of captions and codes, batches, losses.

Read `config.py` and `batches.py` first, then `train_generator.py`.
"""
