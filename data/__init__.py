"""Image-text pairs: building, packing and reading webdataset shards, and the text tokenizer.

Read `sample.py` and `shards.py` first (what a shard holds), then `reading.py`; `recipes/` builds data sets,
and `clean/` leaves out what is wrong in them.
"""
