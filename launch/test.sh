#!/usr/bin/env bash
# Sets up what is missing and runs the tests, on CPU; slow ones apart.
# Arguments go to pytest: bash launch/test.sh tests/test_floors.py
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

make_environment cpu test
cd "$root"
exec "$venv/bin/python" -m pytest "$@"
