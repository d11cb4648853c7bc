"""Text encoders that were trained elsewhere: read, pruned, distilled, and stored in four bits."""
