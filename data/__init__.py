"""Image-text pairs: building, packing and reading webdataset shards, and the text tokenizer."""
