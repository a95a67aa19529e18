#!/usr/bin/env bash
# Sets up what is missing and runs the tests, on CPU; slow ones apart.
# Arguments go to pytest: bash launch/test.sh tests/test_floors.py
# Without any, files are shared out to two processes; workers start slowly, and
# tests of speed and memory, which are among the slow ones, want no neighbours.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

make_environment cpu test
cd "$root"
if (($# == 0)); then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi
exec "$venv/bin/python" -m pytest "$@"
