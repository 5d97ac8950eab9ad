#!/usr/bin/env bash
# Functions of the job scripts, which source this file on the first node of their job.
#
# Signal files in the run folder say how a training job ended, also after the launcher of a node was killed:
#   DONE                    all steps are finished: exit 0
#   STOPPED                 saved on request. Requeued, unless this shell got SIGTERM (then Slurm is
#                           requeueing the job, or the user cancelled it) or the user created `stop`
#   neither, preempted      the job was still starting: requeued
#   neither                 failed. Requeued if training had begun or a launcher was killed, a few times
#                           without progress
#
# Read from the environment or from slurm/site.sh:
#   LCDIST_MAX_FAILURES     failures in a row without a new checkpoint that are requeued (3)
#   LCDIST_MAX_REQUEUES     total requeues of one job (100)

root=$PWD
site=${LCDIST_SITE:-slurm/site.sh}
# Options of every srun, and words before the program, for example to enter a container.
srun_options=()
container=()
run=
usr1=
term=

say() { printf '%(%FT%T%z)T job %s: %s\n' -1 "${SLURM_JOB_ID:-}" "$*"; }
refuse() {
  say "$*" >&2
  exit 2
}

[[ ${SLURM_JOB_ID:-} ]] || refuse "start this with sbatch from the root of the repository"
# shellcheck source=/dev/null
[[ ! -r $site ]] || source "$site"
source slurm/env.sh
[[ $LCDIST_PROCS_PER_NODE ]] || refuse "this job has no GPUs: request some with sbatch" \
  "--gpus-per-node, or set LCDIST_PROCS_PER_NODE to run without"

# Slurm sends SIGUSR1 before the time limit. The ranks see the file `stop`; a signal to the job step
# would kill their launcher.
on_usr1() {
  usr1=1
  say "SIGUSR1: asking the run to save and stop"
  [[ ! $run ]] || : >"$run/stop"
}
on_term() {
  term=1
  say "SIGTERM"
}
trap on_usr1 USR1
trap on_term TERM

# Print the first free port of this node, where the ranks meet. The range depends on the job's number,
# so that other jobs on the node use other ports.
free_port() {
  local first=$((20000 + SLURM_JOB_ID % 100 * 100)) port
  for ((port = first; port < first + 100; port++)); do
    # Connecting fails if no process listens on the port.
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  refuse "no free port from $first to $((first + 99)) on $(hostname): set LCDIST_PORT"
}

# Run a program on one node in the environment of the training.
on_one_node() {
  srun --export=ALL --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" "${container[@]}" "$@"
}

# Run launch/node.sh on every node with a program for torchrun; return its status. srun runs in the
# background because a trap interrupts `wait`, but not a program in the foreground.
on_all_nodes() {
  local pid status
  read -r LCDIST_HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  LCDIST_PORT=${LCDIST_PORT:-$(free_port)} || exit
  export LCDIST_HEAD LCDIST_PORT
  # After one launcher has ended, the others have 120 s: the first to finish does not kill a rank that
  # still writes, and none waits for ever. One task may use every core of its node.
  srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit=0 --wait=120 "${srun_options[@]}" "${container[@]}" \
    launch/node.sh "$@" &
  pid=$!
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || return "$status"
  done
}

job_field() { scontrol show job -o "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

preempted() { [[ $(job_field PreemptTime) == 2* ]]; }

# Requeue the job under the same id and exit. $1: exit status if that is not possible.
requeue() {
  local restarts=${SLURM_RESTART_COUNT:-0}
  if ((restarts >= ${LCDIST_MAX_REQUEUES:-100})); then
    say "requeued $restarts times before: not again (LCDIST_MAX_REQUEUES)"
    exit 1
  fi
  # Requeueing a job that is being cancelled would bring it back.
  [[ $(job_field JobState) == RUNNING ]] || exit "$1"
  say "requeueing"
  # Slurm may signal this shell before scontrol returns: not a preemption.
  trap '' TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    # Exit at once: Slurm kills a batch script that still runs.
    exit 0
  fi
  say "this cluster or this job allows no requeue: submit the job again, or submit a chain of jobs"
  exit "$1"
}

# End the job with status $1; requeue it if it was preempted.
give_up() {
  [[ ! $term ]] || exit 143
  ! preempted || requeue 1
  exit "$1"
}

# A run of several stages has one folder per stage, with the checkpoints of that stage.
newest_checkpoint() {
  find "$run" -path "$run/checkpoints/step_*" -prune -o -path "$run/*/checkpoints/step_*" -prune |
    sort -V | tail -n 1
}

starts() { cat "$run/run.json" "$run"/*/run.json 2>/dev/null | cksum || true; }

# Exit as described at the top of this file. $1: srun's status; $2: output of `starts` before srun.
conclude() {
  local failures="$run/slurm/$SLURM_JOB_ID.failures" newest count
  if [[ -e $run/DONE ]]; then
    say "all steps are done"
    exit 0
  fi
  if [[ -e $run/STOPPED ]]; then
    say "stopped: $(<"$run/STOPPED")"
    [[ ! $term ]] || exit 143
    if [[ ! $usr1 ]] && grep -q "the file stop" "$run/STOPPED"; then
      say "stopped by hand: not requeued; submit the job again to continue"
      exit 0
    fi
    requeue 0
  fi
  say "srun ended with status $1, and there is neither DONE nor STOPPED in the run folder"
  [[ ! -d $LCDIST_RANK_LOGS ]] || say "the output of each rank is in $LCDIST_RANK_LOGS"
  if [[ $term ]] || preempted; then give_up 1; fi
  # A mistake in the configuration ends a start with another status than SIGTERM and SIGKILL do.
  if [[ $(starts) == "$2" ]] && (($1 != 143 && $1 != 137)); then give_up 1; fi
  newest=$(newest_checkpoint)
  echo "${newest:-no checkpoint}" >>"$failures"
  count=$(grep -cxF "${newest:-no checkpoint}" "$failures")
  if ((count > ${LCDIST_MAX_FAILURES:-3})); then
    say "failed $count times since ${newest:-the start}: not requeued (LCDIST_MAX_FAILURES)"
    exit 1
  fi
  requeue 1
}

# Train with [CONFIG] [section.key=value ...]; $1: default configuration. Does not return.
train() {
  local config=$1 before status=0
  shift
  if [[ ${1:-} == *.toml ]]; then
    config=$1
    shift
  fi
  [[ -r $config ]] || refuse "$root/$config does not exist: give a configuration before the overrides"
  run=$(on_one_node "$LCDIST_PYTHON" -m lcdist run-folder \
    "$SLURM_JOB_NUM_NODES" "$LCDIST_PROCS_PER_NODE" "$config" "$@") || give_up 1
  mkdir -p "$run/slurm"
  # Remove the signals of an earlier start.
  rm -f "$run/DONE" "$run/STOPPED" "$run/stop"
  before=$(starts)
  [[ ! $term ]] || exit 143
  [[ ! $usr1 ]] || requeue 1
  say "$config on $SLURM_JOB_NODELIST, in $run, start ${SLURM_RESTART_COUNT:-0} of this job"
  export LCDIST_RANK_LOGS="$run/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  on_all_nodes launch/train.py "$config" "$@" || status=$?
  conclude "$status" "$before"
}
