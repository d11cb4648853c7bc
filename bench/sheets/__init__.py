"""Sheets of pictures for the documents."""
