# shellcheck shell=bash
# Sourced by the launchers that start others: a step is a command that is run,
# or only printed where the first argument is --dry-run.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

dry_run=''
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi

# Words as a shell would take them back, quoted where they must be.
quoted() {
  local word words=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=${words:+ }$word
  done
  printf '%s' "$words"
}

step() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# What the trainer is started with, as one line for another shell. It takes the
# place of that shell, which would keep signals to itself.
trainer_line() { quoted exec bash launch/local.sh "$@"; }

# Hosts that come and go leave nothing behind but what is on shared storage.
shared_workdir() {
  [[ " $*" == *' --config.workdir=/'* ]] || fail 'no --config.workdir=/...:' \
    'name a folder on storage that all hosts mount.'
}

# needs PROGRAM REMEDY
needs() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "no $1 here; $2"
}

# Nothing travels that is not committed, so that every host runs one version.
pack() {
  if [[ -n $(git -C "$root" status --porcelain 2>/dev/null) ]]; then
    say 'what is not committed stays here'
  fi
  step git -C "$root" archive --format=tar.gz --output="$1" HEAD
}
