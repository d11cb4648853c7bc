"""The label of what a picture shows: samples of one label show the same."""

from __future__ import annotations

import hashlib

from data.sample import Sample


def concept_label(name: str) -> int:
    """A label for a concept that is the same in every process: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def label_of(sample: Sample) -> int:
    """The label of the sample's concept; a picture without one is a concept of its own."""
    return concept_label(sample.concept if sample.concept else f"picture {sample.id}")
