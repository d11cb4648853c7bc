"""Collections of vectors with metadata: the interface, the filter language, LanceDB, Milvus, and how they are filled.

Read `base.py` first, then `lance.py`.
"""
