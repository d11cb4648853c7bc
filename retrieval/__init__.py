"""Image-text retrieval: two towers, their training and evaluation, embedding of shards, collections of vectors."""
