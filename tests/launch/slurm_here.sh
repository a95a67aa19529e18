#!/usr/bin/env bash
# A cluster of SLURM that is this machine alone, for the tests that need one; as
# root, with Debian's slurm-wlm and munge:
#
#   bash tests/launch/slurm_here.sh start /tmp/slurm   what it says is exported
#   bash tests/launch/slurm_here.sh stop /tmp/slurm
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf

start() {
  mkdir -p "$folder/state" "$folder/spool"
  # No cgroups and no accounting: it runs in containers too.
  cat >"$SLURM_CONF" <<CONF
ClusterName=here
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2
PartitionName=here Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  if ! munge -n >/dev/null 2>&1; then
    install -d -o munge /run/munge
    su -s /bin/sh munge -c /usr/sbin/munged
  fi
  slurmctld
  slurmd -N "$(hostname -s)"
  for _ in $(seq 60); do
    if sinfo -h -t idle -o %D 2>/dev/null | grep -q 1; then
      echo "SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 1
  done
  tail "$folder"/*.log >&2
  return 1
}

# munged stays: other clusters may use it.
stop() {
  scontrol shutdown
}

"$1"
