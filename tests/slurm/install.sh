#!/usr/bin/env bash
# Slurm's packages for the tests, where this is a Debian that can be changed: seconds, and nothing where
# they are there. Without them the tests say what is missing, and are skipped.
set -euo pipefail
commands=(sbatch slurmctld slurmd munged shellcheck ip)
packages=(slurm-client slurmctld slurmd munge shellcheck iproute2)

PATH=$PATH:/usr/sbin:/sbin
missing=()
for command in "${commands[@]}"; do
  command -v "$command" >/dev/null || missing+=("$command")
done
if [[ ${#missing[@]} = 0 ]]; then exit; fi
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "not installed: ${missing[*]}; as root on Debian this script installs them" >&2
  exit
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -qq && apt-get install -qq --no-install-recommends "${packages[@]}"; } \
  >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "not installed: ${missing[*]}" >&2
fi
