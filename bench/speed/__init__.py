"""How fast and how large: drawing, training, tokenizing, embedding, collections."""
