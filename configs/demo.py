"""The demo that the package carries: `python -m vssl_jax.main` runs it too.

Makes labelled video, runs both phases of SALT on it and probes the encoder;
needs nothing but a CPU. `vssl_jax/demo.py` explains the choices.
Command: bash launch/local.sh --config=configs/demo.py:salt
"""

from vssl_jax import demo


def get_config(variant=''):
  return demo.get_config(variant)
