#!/usr/bin/env bash
# Measure perplexity by length of a run's latest checkpoint; write RUN/evaluation.json.
#
#   sbatch slurm/evaluate.sh RUN [section.key=value ...]
#
# All GPUs of the job are context parallel, unless parallel.* says otherwise. A requeued job goes on
# with what is not measured yet. After more training add --overwrite: it is another checkpoint.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

cd "${LCDIST_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
source slurm/job.sh
[[ -d ${1:-} ]] || refuse "no run folder given: sbatch slurm/evaluate.sh RUN [section.key=value ...]"
export LCDIST_RANK_LOGS="$1/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
on_all_nodes -m lcdist evaluate "$1" --output "$1/evaluation.json" "${@:2}" || give_up $?
