#!/usr/bin/env bash
# Remakes constraints.txt: one exact version of every package for every Python
# from 3.11 on. Versions that still fit stay; --upgrade takes the newest.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$(find_python)
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install -q uv
cd "$root"
cp launch/constraints.txt "$scratch/" 2>/dev/null || true
"$scratch/venv/bin/uv" pip compile -q --universal --python-version 3.11 \
  --all-extras --no-annotate --no-header --no-emit-index-url \
  --no-emit-find-links -o "$scratch/constraints.txt" "$@" pyproject.toml
{
  echo '# Made by launch/make_constraints.sh from setup.cfg; not by hand.'
  grep -E '^[A-Za-z0-9._-]+==[^ ]+( ;.*)?$' "$scratch/constraints.txt"
} >launch/constraints.txt
