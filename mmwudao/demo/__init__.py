"""The demo in a browser, in Chinese and English: `mmwudao demo`."""
