#!/usr/bin/env bash
# Train on N processes of this machine, on its GPUs or its CPU:
#
#   launch/local.sh N CONFIG [section.key=value ...]
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "$0")")")

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "error: launch/local.sh $*: expected launch/local.sh N CONFIG [section.key=value ...], with" \
    "N the number of processes, such as launch/local.sh 2 configs/debug/full.toml" >&2
  exit 2
fi
python=${LCDIST_PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
exec "$python" "$root/launch/run.py" --standalone --nproc-per-node="$1" \
  "$root/launch/train.py" "${@:2}"
