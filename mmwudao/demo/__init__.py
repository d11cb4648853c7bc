"""The demo in a browser, in Chinese and English: `mmwudao demo`.

Read `app.py` first, then `tabs.py`; `actions.py` does the work.
"""
