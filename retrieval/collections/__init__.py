"""Collections of vectors with metadata: the interface, the filter language, LanceDB and Milvus.

Read `base.py` first, then `lance.py`.
"""
