#!/usr/bin/env bash
# Runs the trainer on a GKE cluster that xpk made, and waits for it:
#
#   bash launch/xpk.sh --config=configs/salt.py:L --config.workdir=/mnt/run --config.data.source=/mnt/videos
#
# --dry-run as the first word prints the commands. Settings: env/xpk.env. The
# project is gcloud's. The data and the working folder are on storage that xpk
# mounts (xpk storage attach). xpk restarts on the statuses 42 and 127 to 255,
# with 143 among them, and not on the trainer's errors, 1 and 2.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
load_settings xpk
needs xpk 'pip install xpk, or look with --dry-run.'

shared_workdir "$@"
packed=$PWD/runs/xpk/$XPK_WORKLOAD
where=("--cluster=$XPK_CLUSTER" "--zone=$XPK_ZONE")
if [[ -e $packed && ! -e $packed/clone.tar.gz ]]; then
  fail "$packed was not made by xpk.sh; move it away, or set XPK_WORKLOAD."
fi
step rm -rf "$packed"
step mkdir -p "$packed/clone"
pack "$packed/clone.tar.gz"
step tar -xzf "$packed/clone.tar.gz" -C "$packed/clone"
# The name goes into labels that pods are looked up by below.
step xpk workload create "--workload=$XPK_WORKLOAD" "${where[@]}" \
  "--tpu-type=$XPK_TPU_TYPE" "--num-slices=$XPK_SLICES" \
  "--base-docker-image=$XPK_IMAGE" "--script-dir=$packed/clone" \
  "--max-restarts=$XPK_RESTARTS" --termination-grace-period-seconds=300 \
  --env=VSSL_ACCELERATOR=tpu "--command=$(trainer_line "$@")"
status=0
step xpk workload list "${where[@]}" \
  "--wait-for-job-completion=$XPK_WORKLOAD" || status=$?
if [[ -z $dry_run ]] && ((status != 0)); then
  say "status $status; the first message:" "$(kubectl logs --prefix \
    --tail=-1 --selector="xpk.google.com/workload=$XPK_WORKLOAD" |
    grep -m 1 'error: ' || echo none)"
fi
exit "$status"
