#!/usr/bin/env bash
# Environment of a job's programs, with the reason for each variable. Variables that are already set
# are kept. Settings of one cluster belong in slurm/site.sh.

# Show output at once, also of a program that is killed right after.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# Do not wrap log lines at 80 columns.
export COLUMNS=${COLUMNS:-200}

# Megatron's tensor parallelism overlaps a gradient's reduction with a matrix product, and relies on
# one queue to launch them in this order. (For GPUs before Blackwell.)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# NCCL prints its version once, and its warnings.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Ranks save a checkpoint after SIGTERM; by default their launcher would kill them after 30 s. Slurm
# decides how long they have (KillWait, GraceTime).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# Since Slurm 22.05 srun does not inherit this from sbatch.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# Errors name a remedy in the words of this command.
export LCDIST_STARTER=sbatch

# Use the clone's own environment, unless slurm/site.sh names another one.
if [[ ! ${LCDIST_PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then LCDIST_PYTHON=$PWD/.venv/bin/python; else LCDIST_PYTHON=python3; fi
fi
export LCDIST_PYTHON

# One rank for each GPU that Slurm allocated, the same number on every node.
export LCDIST_PROCS_PER_NODE=${LCDIST_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
