"""Data loading: video sources, decoding, transforms and NumPy batches."""
