#!/usr/bin/env bash
# Extend a LLaMA-class model to 131,072 tokens, from a checkpoint of lcdist's; submit again or let it
# be requeued, it goes on where it was.
#
#   sbatch slurm/extend_128k.sh [CONFIG] [section.key=value ...]
#
# From the root of the repository, or with LCDIST_ROOT set to it. CONFIG: configs/7b/extend-128k.toml.
# checkpoint.load=RUN names the run to start from; checkpoint.load= starts from nothing. Options of
# sbatch go before the script and override the lines below: --nodes, --time, and --signal where a
# checkpoint takes longer than three minutes: Slurm may be a minute early or late, and so may a shared
# file system in showing a file.
#SBATCH --job-name=extend_128k
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

cd "${LCDIST_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
source slurm/job.sh
train configs/7b/extend-128k.toml "$@"
