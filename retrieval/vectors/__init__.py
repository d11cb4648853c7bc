"""Vectors of shards: embedding, on one machine or a Ray cluster, Parquet files, ONNX export.

Read `embed.py` first.
"""
