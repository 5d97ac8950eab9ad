#!/usr/bin/env bash
# One node of a Slurm job: becomes a torchrun with a rank for each GPU. srun starts it, once a node:
#
#   srun --ntasks-per-node=1 launch/node.sh PROGRAM [ARGUMENT ...]
#
# LCDIST_HEAD, LCDIST_PORT: where the ranks meet, the job's first node. LCDIST_PYTHON: what has torch.
# LCDIST_PROCS_PER_NODE: ranks; the node's GPUs by default. LCDIST_RANK_LOGS: a folder for what every
# rank prints; the first of each node prints here too.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${SLURM_JOB_ID:?is not set: srun starts this, in a job}"
procs=${LCDIST_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs here, and LCDIST_PROCS_PER_NODE is not set}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > procs ? SLURM_CPUS_ON_NODE / procs : 1))}

words=(--nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$procs" --max-restarts=0)
# torchrun finds out who of them hosts the meeting by comparing names, which fails where a node's name
# has more than one address; here it is told. A restarted job must not meet its own past.
words+=(--rdzv-backend=c10d --rdzv-endpoint="$LCDIST_HEAD:$LCDIST_PORT")
words+=(--rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}")
words+=(--rdzv-conf="is_host=$((SLURM_NODEID == 0))")
if [[ ${LCDIST_RANK_LOGS:-} ]]; then
  mkdir -p "$LCDIST_RANK_LOGS/$(hostname -s)"
  words+=(--log-dir="$LCDIST_RANK_LOGS/$(hostname -s)" --redirects=3 --tee=0:3)
fi
# Nothing may stand between srun and torchrun: it would get the signals, and torchrun's ranks not.
exec "$LCDIST_PYTHON" -m torch.distributed.run "${words[@]}" "$@"
