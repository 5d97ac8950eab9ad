#!/usr/bin/env bash
# What the job scripts share; they source it, on the first node of their job.
#
# A training job ends in one of these ways, told apart by files in the run folder, since a launcher's
# exit status says nothing of the kind:
#   DONE                    the job is over: exit 0
#   STOPPED                 saved on request. Requeued, unless this shell got SIGTERM (then Slurm is
#                           requeueing it already, or its owner cancelled it) or the owner made `stop`
#   neither, preempted      it was still starting: requeued
#   neither                 failed. Requeued where training had begun, a few times without progress
#
# Read from the environment or from slurm/site.sh:
#   LCDIST_MAX_FAILURES     failures in a row, without a new checkpoint, that are requeued (3)
#   LCDIST_MAX_REQUEUES     requeues of one job in all (100)

root=$PWD
site=${LCDIST_SITE:-slurm/site.sh}
# Options of every srun, and words before the program: what a container needs, say.
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

[[ ${SLURM_JOB_ID:-} ]] || refuse "start this with sbatch, from the root of the repository"
# shellcheck source=/dev/null
[[ ! -r $site ]] || source "$site"
source slurm/env.sh
[[ $LCDIST_PROCS_PER_NODE ]] || refuse "this job has no GPUs: ask for some with sbatch" \
  "--gpus-per-node, or set LCDIST_PROCS_PER_NODE to run without"

# Slurm warns with SIGUSR1 before the time limit. The file reaches the ranks; a signal to the job step
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

# The first port that nobody here listens on: this is the node where the ranks meet. Other jobs on it
# begin elsewhere.
free_port() {
  local first=$((20000 + SLURM_JOB_ID % 100 * 100)) port
  for ((port = first; port < first + 100; port++)); do
    # Connecting fails where nobody listens.
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  refuse "no free port from $first to $((first + 99)) on $(hostname): set LCDIST_PORT"
}

# A program of one node's, in the environment that training has.
on_one_node() {
  srun --export=ALL --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" "${container[@]}" "$@"
}

# launch/node.sh on every node, with what torchrun shall run; returns its status. A trap interrupts
# `wait`, and srun in the foreground would hold traps back until it has ended.
on_all_nodes() {
  local pid status
  read -r LCDIST_HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  LCDIST_PORT=${LCDIST_PORT:-$(free_port)} || exit
  export LCDIST_HEAD LCDIST_PORT
  # Where one launcher has ended the others have a little while: the last to write is never killed by
  # the first to be done, and nobody waits for ever. One task may use every core of its node.
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

# Back to the queue, under the same job id; exits. $1: the status where that cannot be.
requeue() {
  local restarts=${SLURM_RESTART_COUNT:-0}
  if ((restarts >= ${LCDIST_MAX_REQUEUES:-100})); then
    say "requeued $restarts times before: not again (LCDIST_MAX_REQUEUES)"
    exit 1
  fi
  # Asking for a job that is being cancelled would bring it back.
  [[ $(job_field JobState) == RUNNING ]] || exit "$1"
  say "requeueing"
  if scontrol requeue "$SLURM_JOB_ID"; then
    # At once: whoever lingers here is killed as slow to end.
    exit 0
  fi
  say "this cluster or this job allows no requeue: submit again, or keep a chain of jobs"
  exit "$1"
}

# Ends the job, that has nothing more to do; requeued where it was in the way of another.
give_up() {
  [[ ! $term ]] || exit 143
  ! preempted || requeue 1
  exit "$1"
}

# A run of stages has them, and what belongs to each, in folders of its own.
newest_checkpoint() {
  find "$run" -path "$run/checkpoints/step_*" -prune -o -path "$run/*/checkpoints/step_*" -prune |
    sort -V | tail -n 1
}

starts() { cat "$run/run.json" "$run"/*/run.json 2>/dev/null | cksum || true; }

# Exits as the head of this file says. $1: srun's status; $2: what `starts` said before.
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
      say "stopped by hand: not requeued; submit again to go on"
      exit 0
    fi
    requeue 0
  fi
  say "srun ended with status $1 and the run has left neither DONE nor STOPPED"
  [[ ! -d $LCDIST_RANK_LOGS ]] || say "what each rank printed is in $LCDIST_RANK_LOGS"
  if [[ $term || $(starts) == "$2" ]] || preempted; then give_up 1; fi
  newest=$(newest_checkpoint)
  echo "${newest:-no checkpoint}" >>"$failures"
  count=$(grep -cxF "${newest:-no checkpoint}" "$failures")
  if ((count > ${LCDIST_MAX_FAILURES:-3})); then
    say "failed $count times since ${newest:-the start}: not requeued (LCDIST_MAX_FAILURES)"
    exit 1
  fi
  requeue 1
}

# Train: [CONFIG] [section.key=value ...]; $1 is the configuration where none is named. Never returns.
train() {
  local config=$1 before status=0
  shift
  if [[ ${1:-} == *.toml ]]; then
    config=$1
    shift
  fi
  [[ -r $config ]] || refuse "$root/$config is not there: name a configuration, before the overrides"
  run=$(on_one_node "$LCDIST_PYTHON" -m lcdist run-folder \
    "$SLURM_JOB_NUM_NODES" "$LCDIST_PROCS_PER_NODE" "$config" "$@") || give_up 1
  mkdir -p "$run/slurm"
  # What an earlier start has left says nothing of this one.
  rm -f "$run/DONE" "$run/STOPPED" "$run/stop"
  before=$(starts)
  [[ ! $term ]] || exit 143
  [[ ! $usr1 ]] || requeue 1
  say "$config on $SLURM_JOB_NODELIST, in $run, start ${SLURM_RESTART_COUNT:-0} of this job"
  export LCDIST_RANK_LOGS="$run/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  on_all_nodes launch/train.py "$config" "$@" || status=$?
  conclude "$status" "$before"
}
