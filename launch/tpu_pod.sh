#!/usr/bin/env bash
# Makes a slice of TPU VMs, and runs the trainer on all of its hosts:
#
#   bash launch/tpu_pod.sh create
#   bash launch/tpu_pod.sh run --config=configs/salt.py:L --config.workdir=/mnt/run --config.data.source=/mnt/videos
#   bash launch/tpu_pod.sh delete
#
# --dry-run before the word prints the commands. Settings: env/tpu_pod.env. The
# project is gcloud's. The data and the working folder are on storage that all
# hosts mount. The ssh sessions are the run: keep this script in tmux.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
load_settings tpu_pod
needs gcloud 'install the Google Cloud CLI, or look with --dry-run.'

pod() { step gcloud compute tpus tpu-vm "$1" "${@:2}" "--zone=$TPU_ZONE"; }

create() {
  local words=("$TPU_NAME" "--accelerator-type=$TPU_TYPE"
    "--version=$TPU_VERSION")
  if [[ $TPU_SPOT == 1 ]]; then words+=(--spot); fi
  pod create "${words[@]}"
}

delete() { pod delete "$TPU_NAME" --quiet; }

# On TPU VMs only the metadata server knows the other hosts, so JAX is asked to
# look (VSSL_CLUSTER).
start() {
  local line
  # Only a folder with the mark of an earlier start is replaced.
  line='if [ -e vssl_jax ] && [ ! -e vssl_jax/.vssl_pod ]; then echo "error:'
  line+=' ~/vssl_jax on $(hostname) was not made by tpu_pod.sh; move it away"'
  line+=' >&2; exit 2; fi; rm -rf vssl_jax && mkdir vssl_jax'
  line+=' && touch vssl_jax/.vssl_pod && tar -xzf clone.tar.gz -C vssl_jax'
  line+=' && cd vssl_jax && export VSSL_ACCELERATOR=tpu VSSL_CLUSTER=1'
  line+=" VSSL_VENV=\$HOME/vssl_venv && $(trainer_line "$@")"
  pack "$logs/clone.tar.gz" &&
    pod scp "$logs/clone.tar.gz" "$TPU_NAME:" --worker=all &&
    pod ssh "$TPU_NAME" --worker=all "--output-directory=$logs" \
      "--command=$line"
}

run() {
  local status state
  shared_workdir "$@"
  logs=$PWD/runs/tpu_pod/$TPU_NAME
  step mkdir -p "$logs"
  if [[ -n $dry_run ]]; then
    start "$@"
    return
  fi
  while true; do
    rm -f "$logs"/*.log
    status=0
    say "a log for each host comes to $logs"
    start "$@" || status=$?
    if ((status == 0)); then return; fi
    state=$(pod describe "$TPU_NAME" '--format=value(state)') || state=GONE
    if [[ $state != READY && $TPU_SPOT == 1 ]]; then
      say "$TPU_NAME was taken away ($state): asking for another"
      if [[ $state != GONE ]]; then delete; fi
      create
    elif grep -qs 'SIGTERM: saved step' "$logs"/*.log; then
      say 'stopped by SIGTERM with a checkpoint; the same command goes on'
      exit 143
    else
      say "status $status; the first message:" \
        "$(grep -hs -m 1 '^error: ' "$logs"/*.log | head -n 1)"
      exit "$status"
    fi
  done
}

case ${1:-} in
  create | delete | run) "$@" ;;
  *) fail "found '${1:-}', wanted create, run or delete; see the head of" \
    'launch/tpu_pod.sh' ;;
esac
