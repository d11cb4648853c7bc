"""The image tokenizer: a VQ-VAE, its training, and what the trained models are saved with."""
