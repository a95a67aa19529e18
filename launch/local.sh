#!/usr/bin/env bash
# Sets up what is missing and runs the trainer; without arguments, the demo.
# Arguments pass through: bash launch/local.sh --config=configs/salt.py
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

choose_accelerator /
make_environment "$accelerator"
load_settings "${accelerator%1[23]}"
# -P: a file called random.py where the user stands must not shadow Python's.
exec "$venv/bin/python" -P -m vssl_jax.main "$@"
