#!/usr/bin/env bash
# Environment of a job's programs, each line with its reason. What is set already stays as it is; what
# depends on the cluster is set in slurm/site.sh, or not at all.

# Output shows when it is written, also of a program that is killed a moment later.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# Lines of a log are not folded, as they would be at 80 columns.
export COLUMNS=${COLUMNS:-200}

# Megatron's tensor parallelism overlaps a gradient's reduction with a product, and relies on one queue
# to launch them in this order. (For GPUs before Blackwell.)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# NCCL says its version once, and what it finds wrong.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# After a SIGTERM ranks save; their launcher would kill them after 30 s. How long they have is for
# Slurm to say (KillWait, GraceTime).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# From Slurm 22.05, srun does not take this over from sbatch by itself.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# A clone's own environment, unless slurm/site.sh names another.
if [[ ! ${LCDIST_PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then LCDIST_PYTHON=$PWD/.venv/bin/python; else LCDIST_PYTHON=python3; fi
fi
export LCDIST_PYTHON

# A rank for each GPU that Slurm gave, the same on every node.
export LCDIST_PROCS_PER_NODE=${LCDIST_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
