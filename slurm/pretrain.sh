#!/usr/bin/env bash
# Train a model from random weights, at a length that needs no extension.
#
#   sbatch slurm/pretrain.sh [CONFIG] [section.key=value ...]
#
# CONFIG: configs/7b/pretrain.toml by default. Everything else is as in extend_128k.sh.
#SBATCH --job-name=pretrain
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
train configs/7b/pretrain.toml "$@"
