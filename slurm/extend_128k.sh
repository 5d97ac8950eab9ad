#!/usr/bin/env bash
# Extend a LLaMA-class model to 131,072 tokens from a checkpoint of lcdist. A job that is requeued or
# submitted again continues from its last checkpoint.
#
#   sbatch slurm/extend_128k.sh [CONFIG] [section.key=value ...]
#
# From the root of the repository, or with LCDIST_ROOT set to it. CONFIG: configs/7b/extend-128k.toml.
# checkpoint.load=RUN names the run to start from; checkpoint.load= starts from random weights. Options
# of sbatch go before the script and override the lines below, for example --nodes and --time. Change
# --signal if a checkpoint takes longer than three minutes: Slurm may send the signal a minute early or
# late, and a shared file system may show a file a minute late.
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
