"""The image tokenizer: a VQ-VAE and its training, the upscaler, and what all models share: `training/`, `storage/`.

Read `quantizer.py` and `model.py` first, then `train_tokenizer.py`.
"""
