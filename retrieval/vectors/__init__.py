"""Vectors of shards: embedding them on one machine or a Ray cluster, Parquet files, and the export to ONNX.

Read `embed.py` first.
"""
