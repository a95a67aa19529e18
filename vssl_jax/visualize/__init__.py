"""Pictures and the report of a run: `python -m vssl_jax.visualize <folder>`."""
