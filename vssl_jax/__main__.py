"""`python -m vssl_jax` is `python -m vssl_jax.main`."""

from vssl_jax import main

if __name__ == '__main__':
  main.run()
