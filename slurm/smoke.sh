#!/usr/bin/env bash
# Check that a cluster works: ten steps of a small model on two nodes, all ranks context parallel. Then
# compare the bytes sent with the plan's, and measure the bandwidth between ranks.
#
#   sbatch slurm/smoke.sh [section.key=value ...]
#SBATCH --job-name=smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:15:00
#SBATCH --no-requeue
#SBATCH --output=%x-%j.out
set -euo pipefail

cd "${LCDIST_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
source slurm/job.sh
export LCDIST_RANK_LOGS="runs/smoke-$SLURM_JOB_ID/slurm"
on_all_nodes -m lcdist smoke "runs/smoke-$SLURM_JOB_ID" "$@"
say "this cluster works"
