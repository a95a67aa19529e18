"""The demo that the package carries: `python -m vssl_jax.main` runs it too.

Makes labelled video, runs a method on it and probes the encoder; needs
nothing but a CPU. `:salt` (default) is both phases of SALT, `:layerlock` an
MAE with three locks, `:pmd` and `:kdhiera` (interpretation of the abstract)
students of two teachers. `vssl_jax/demo.py` explains the choices.
Command: bash launch/local.sh --config=configs/demo.py:layerlock
"""

from vssl_jax import demo


def get_config(variant=''):
  return demo.get_config(variant)
