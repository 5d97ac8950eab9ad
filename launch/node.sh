#!/usr/bin/env bash
# Start torch's launcher on one node of a Slurm job, with one rank for each GPU. srun starts it once per node:
#
#   srun --ntasks-per-node=1 launch/node.sh PROGRAM [ARGUMENT ...]
#
# LCDIST_HEAD, LCDIST_PORT: address where the ranks meet, on the job's first node.
# LCDIST_PYTHON: the Python with torch installed.
# LCDIST_PROCS_PER_NODE: ranks per node; by default the number of the node's GPUs.
# LCDIST_RANK_LOGS: folder for the output of every rank; the first rank of each node also prints here.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${SLURM_JOB_ID:?is not set: srun starts this, in a job}"
procs=${LCDIST_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs here, and LCDIST_PROCS_PER_NODE is not set}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > procs ? SLURM_CPUS_ON_NODE / procs : 1))}

words=(--nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$procs" --max-restarts=0)
# The launcher finds the host of the rendezvous by comparing names, which fails if a node's name has more
# than one address, so it is set here. The id differs for each start of a requeued job.
words+=(--rdzv-backend=c10d --rdzv-endpoint="$LCDIST_HEAD:$LCDIST_PORT")
words+=(--rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}")
words+=(--rdzv-conf="is_host=$((SLURM_NODEID == 0))")
if [[ ${LCDIST_RANK_LOGS:-} ]]; then
  mkdir -p "$LCDIST_RANK_LOGS/$(hostname -s)"
  words+=(--log-dir="$LCDIST_RANK_LOGS/$(hostname -s)" --redirects=3 --tee=0:3)
fi
# No process may stand between srun and the launcher: it would receive the signals instead. run.py calls
# torch's launcher in its own process.
exec "$LCDIST_PYTHON" launch/run.py "${words[@]}" "$@"
