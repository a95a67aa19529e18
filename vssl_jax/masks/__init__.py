"""Mask sampling in batches with `jax.random`."""
