"""The HTTP service: vectors, search, pictures and captions for many clients at once; `ray/` runs it on a cluster.

Read `settings.py` and `app.py` first, then `queues.py`.
"""
