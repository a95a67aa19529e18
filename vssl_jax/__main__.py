"""Runs `vssl_jax.main` for `python -m vssl_jax`."""

from vssl_jax.utils import interrupts

if __name__ == '__main__':
  interrupts.leave_at_once()  # the import below takes seconds

from vssl_jax import main

if __name__ == '__main__':
  main.run()
