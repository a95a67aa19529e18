"""Pictures of a run; `python -m vssl_jax.show <run folder>` makes them all."""
