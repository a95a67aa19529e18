# shellcheck shell=bash
# Sourced by local.sh and test.sh: makes the Python environment that both use.
#
# What it chooses can be chosen for it:
#   VSSL_PYTHON        the Python to build on
#   VSSL_ACCELERATOR   cpu, cuda12, cuda13 or tpu
#   VSSL_VENV          where the environment goes (default: .venv in the clone);
#                      a new folder, or one that these scripts made
#   VSSL_EXTRAS        more extras of setup.cfg, e.g. parity,tensorboard
#
# Everything it says goes to stderr: stdout belongs to the program it starts.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${VSSL_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
while [[ $venv == ?*/ ]]; do venv=${venv%/}; done

say() { printf 'launch: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

# Runs the candidate rather than asking for its name: a pyenv shim answers to
# python3.13 whether that Python is there or not, and some systems ship Python
# without the modules that make an environment.
fits() {
  "$1" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
  local name
  if [[ -n ${VSSL_PYTHON:-} ]]; then
    fits "$VSSL_PYTHON" || fail "VSSL_PYTHON=$VSSL_PYTHON is not a Python" \
      '3.11 to 3.14 with the modules venv and ensurepip.'
    command -v "$VSSL_PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11 python3.14 python \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python; do
    if fits "$name"; then
      command -v "$name"
      return
    fi
  done
  fail 'no Python 3.11 to 3.14 with the modules venv and ensurepip was found' \
    '(looked for python3, python3.14 ... python3.11, python and pyenv).' \
    'Install one (apt install python3 python3-venv) or name one with' \
    'VSSL_PYTHON=/path/to/python.'
}

# The PCI ids of TPU chips, v2 to 7x. Google's network and disk cards have its
# vendor id too, so the vendor alone says nothing.
tpu_ids='0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076'

on_tpu() {
  local device
  for device in "$1"/sys/bus/pci/devices/*; do
    [[ -r $device/vendor && $(<"$device/vendor") == 0x1ae0 ]] || continue
    [[ " $tpu_ids " == *" $(<"$device/device") "* ]] && return
  done
  return 1
}

# The driver's version, e.g. 580.65.06, or nothing. Containers may have the
# driver without nvidia-smi; a driver without a device file has no GPU to give.
nvidia_driver() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader \
    2>/dev/null | head -n 1) || version=
  if [[ ! $version =~ ^[0-9]+\. && -e $1/dev/nvidia0 &&
    -r $1/proc/driver/nvidia/version ]]; then
    version=$(grep -oE -m 1 '[0-9]{3,}\.[0-9]+(\.[0-9]+)?' \
      "$1/proc/driver/nvidia/version" | head -n 1) || version=
  fi
  if [[ $version =~ ^[0-9]+\. ]]; then printf '%s\n' "$version"; fi
}

# choose_accelerator ROOT: sets `accelerator` and says why. ROOT is where the
# system's files are: / but in tests.
choose_accelerator() {
  local driver reason
  accelerator=cpu
  reason='no TPU and no NVIDIA driver were found'
  if [[ -n ${VSSL_ACCELERATOR:-} ]]; then
    accelerator=$VSSL_ACCELERATOR
    reason='VSSL_ACCELERATOR says so'
    [[ $accelerator =~ ^(cpu|cuda12|cuda13|tpu)$ ]] || fail \
      "VSSL_ACCELERATOR=$accelerator is none of cpu, cuda12, cuda13, tpu."
    say "using $accelerator: $reason"
    return
  fi
  driver=$(nvidia_driver "$1")
  if on_tpu "$1"; then
    accelerator=tpu
    reason='a TPU is attached'
  elif [[ -n $driver && ${driver%%.*} -ge 580 ]]; then
    accelerator=cuda13
    reason="NVIDIA driver $driver"
  elif [[ -n $driver && ${driver%%.*} -ge 525 ]]; then
    accelerator=cuda12
    reason="NVIDIA driver $driver is older than 580"
  elif [[ -n $driver ]]; then
    reason="NVIDIA driver $driver is older than 525, which CUDA 12 needs"
  fi
  say "using $accelerator: $reason"
}

# Settings of launch/env/<name>.env, where the caller has set nothing himself.
load_settings() {
  local key value
  while IFS='=' read -r key value; do
    if [[ $key =~ ^[A-Z_]+$ && -z ${!key+set} ]]; then
      export "$key=$value"
    fi
  done <"$root/launch/env/$1.env"
}

# What decides whether an environment is still right: the files that name its
# packages, the Python, and where the clone stands.
stamp() {
  {
    printf '%s\n' "$root"
    "$venv/bin/python" -VV
    cat "$root/pyproject.toml" "$root/setup.cfg" "$root/launch/constraints.txt"
    cat "$root/launch/parity.txt"
  } | cksum
}

# This script's marks in the environment that it makes:
#   .vssl_own    this script made the folder: it was not there, or empty
#   .vssl_begun  packages are being installed
#   .vssl_made   they are complete: the stamp, then the extras

# Whether the environment's folder holds anything.
holds_something() {
  local path
  for path in "$venv"/* "$venv"/.[!.]* "$venv"/..?*; do
    if [[ -e $path || -L $path ]]; then return; fi
  done
  return 1
}

# Fails where the environment's place holds what is not this script's.
check_place() {
  local remedy='Nothing in it was touched. Set VSSL_VENV to a folder that does'
  remedy+=' not exist yet, or move this one away.'
  if [[ -e $venv && ! -d $venv ]]; then
    fail "$venv is not a folder. $remedy"
  fi
  if [[ ! -e $venv/.vssl_own && ! -e $venv/.vssl_made ]] && holds_something
  then
    fail "$venv is not an environment that this script made. $remedy"
  fi
}

# Makes way for a new environment. The old one, complete or half made, may hold
# what the user put there: nothing is removed, all of it is moved aside.
clear_place() {
  local aside=$venv.old
  while [[ -e $aside || -L $aside ]]; do aside+=.old; done
  mv "$venv" "$aside" || fail "$venv cannot be moved to $aside. Nothing was" \
    'touched. Move it away yourself, or set VSSL_VENV to another folder.'
  say "the last set-up of $venv did not finish, or its Python is gone:" \
    "starting afresh. What was there is now $aside; remove it when nothing in" \
    'it is needed.'
}

# make_environment EXTRA...: an environment with the project and these extras.
make_environment() {
  local made=$venv/.vssl_made begun=$venv/.vssl_begun own=$venv/.vssl_own
  local wanted missing='' have='' name python parent=${venv%/*}
  local unwritable="$venv cannot be written. Set VSSL_VENV to another folder."
  wanted=$(printf '%s ' "$@" "${VSSL_EXTRAS:-}" | tr ',' ' ')
  check_place
  mkdir -p "${parent:-/}" || fail "$unwritable"

  # One start at a time, of all clones that share the environment; the
  # descriptor is closed again below, so that the program does not hold the
  # lock while it runs.
  exec 9<"${parent:-/}"
  if command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
    say 'waiting for another start that is setting up'
    flock 9 || say "no locks in ${parent:-/}: start one set-up at a time"
  fi
  check_place

  if [[ -e $begun || ( -e $made && ! -x $venv/bin/python ) ]]; then
    clear_place
  fi
  if [[ -r $made && $(head -n 1 "$made") == "$(stamp)" ]]; then
    have=$(tail -n 1 "$made")
  fi
  for name in $wanted; do
    [[ " $have " == *" $name "* ]] || missing+=${missing:+,}$name
  done
  if [[ -z $have || -n $missing ]]; then
    # A program that is interrupted may end as if it had failed by itself.
    trap 'fail "interrupted while setting up $venv; start again to go on."' \
      INT TERM
    if [[ ! -x $venv/bin/python ]]; then
      python=$(find_python)
      say "making $venv with $("$python" -V) ($python)"
      mkdir -p "$venv" || fail "$unwritable"
      touch "$own" "$begun" || fail "$unwritable"
      "$python" -m venv "$venv" || fail "$python could not make $venv."
    fi
    touch "$begun" || fail "$unwritable"
    install "${missing:-cpu}"
    for name in $wanted; do
      [[ " $have " == *" $name "* ]] || have+="${have:+ }$name"
    done
    printf '%s\n%s\n' "$(stamp)" "${have:-cpu}" >"$made"
    rm "$begun"
    trap - INT TERM
  fi
  exec 9<&-
}

# cpu is no extra of setup.cfg: it needs nothing more than everyone has.
install() {
  local extras=",$1,"
  extras=${extras/,cpu,/,}
  extras=${extras#,}
  extras=${extras%,}
  say "installing${extras:+ with $extras}, a minute or a few the first time"
  pip_install -c "$root/launch/constraints.txt" -e "$root${extras:+[$extras]}"
  if [[ ,$extras, == *,parity,* ]]; then
    pip_install --no-deps -r "$root/launch/parity.txt"
  fi
}

# pip that fails by itself leaves an environment that it can go on with; after
# one that was ended from outside, the next start begins afresh.
pip_install() {
  local quiet=(-q)
  if [[ -t 2 ]]; then quiet=(); fi
  "$venv/bin/python" -m pip install --disable-pip-version-check \
    ${quiet[@]+"${quiet[@]}"} "$@" >&2 && return
  if (($? < 128)); then rm "$venv/.vssl_begun"; fi
  fail 'pip failed (its message is above); start again when that is mended.'
}
