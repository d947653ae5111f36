# shellcheck shell=bash
# Functions shared by the job scripts. A script sources this file from the folder where sbatch was called.
#
# Life of a training job:
#   1. Every node is tested (slurm/check_nodes.py); a bad node is named and the job fails.
#   2. One srun step starts one process per GPU on all nodes; the trainer reads its rank from Slurm. It resumes from the
#      newest checkpoint of the run folder, so the first start and every restart are the same command.
#   3. Some minutes before the time limit Slurm sends USR1 to this shell only. The shell creates RUN_DIR/STOP: all ranks
#      save and stop after the same step, and the job is requeued. A lost node is named, and the job is requeued too;
#      Slurm may allocate the same node once it responds again: no node is excluded silently.
#   4. A job is requeued at most MAX_RESTARTS times. It fails after two consecutive starts without a new checkpoint.
#   5. The job succeeds only when the run is done, so jobs that depend on it (afterok) start only then.
# The log has the lines of all ranks, prefixed by rank: grep '^ *3: ' finds the lines of rank 3.
set -euo pipefail
# shellcheck source=slurm/env.sh
. slurm/env.sh

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

# refuse WORDS: report a user error; the exit code is 2 as everywhere in this project.
refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# activate: load the site's modules and the virtual environment.
activate() {
  local module
  for module in $MODULES; do module load "$module"; done
  find_software || refuse "mma is not installed in '$VENV' or on PATH: run 'make setup', or set VENV"
}

# find_software: activate the virtual environment if it exists; succeed if mma is on PATH.
find_software() {
  # shellcheck source=/dev/null
  if [ -f "$VENV/bin/activate" ]; then . "$VENV/bin/activate"; fi
  command -v mma > /dev/null
}

# split VARIABLE: set `words` to the words of a variable's value, which may be quoted as in a shell; nothing is expanded.
# shellcheck disable=SC2034 # the scripts read words
split() {
  words=()
  [ -n "${!1:-}" ] || return 0
  xargs printf '' <<< "${!1}" 2> /dev/null || refuse "$1=${!1}: a quote is not closed"
  mapfile -d '' -t words < <(xargs printf '%s\0' <<< "${!1}")
}

# need_job SCRIPT: refuse to run outside Slurm.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || refuse "$1 is a job script: sbatch $1"
}

# share_of_array: print the share i/n of this array task; nothing in a job without an array.
share_of_array() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
  [ -n "${SHARES:-}" ] || [ "$SLURM_ARRAY_TASK_MAX" = $((SLURM_ARRAY_TASK_COUNT - 1)) ] ||
    refuse "this array covers only a part of the shares: set SHARES to the total number of shares"
  echo "$SLURM_ARRAY_TASK_ID/${SHARES:-$SLURM_ARRAY_TASK_COUNT}"
}

# run_name RECIPE: print the run name of a shipped recipe or a YAML file.
run_name() { basename "$1" | sed 's/\.ya\{0,1\}ml$//'; }

# sft_run RECIPE POLICY: print the run folder of a recipe under a mask policy; mma, the default, adds no suffix.
sft_run() {
  local suffix=_$2
  [ "$2" != mma ] || suffix=''
  echo "runs/$(run_name "$1")$suffix"
}

# status RUN KEY: print "state" or "step" from a run's status.json; nothing before the first start.
status() {
  field "$1/status.json" "$2"
}

# field FILE KEY: print the word or number stored under a key of a JSON file; nothing if it is missing.
field() {
  sed -n "s/.*\"$2\": \"\\{0,1\\}\\([a-z0-9]*\\).*/\\1/p" "$1" 2> /dev/null || true
}

# need_finished VARIABLE RUN: refuse to start from a missing or unfinished run. A checkpoint folder or an exported model
# is always accepted.
need_finished() {
  local state
  if [ -f "$2/manifest.json" ] || [ -f "$2/config.json" ]; then return; fi
  [ -d "$2" ] || refuse "$1=$2 does not exist: train it first (sbatch slurm/pt.sh, or slurm/chain.sh for all stages)," \
    "or set $1 to a run folder, a checkpoint, an exported model, or none"
  state=$(status "$2" state)
  [ "$state" = "done" ] || refuse "$1=$2 is not finished (${state:-never started}${state:+ at step $(status "$2" step)}):" \
    "sbatch its script again to finish it, or set $1 to one of its checkpoints"
}

# train RECIPE RUN_DIR FLAGS...: train until the run is done, then exit; requeue the job when it is stopped or loses a
# node. Variables shared with the functions below: run_dir, the step `before` this start, and asked_to_stop.
train() {
  local recipe=$1 code=0
  run_dir=$2 before=$(status "$2" step) asked_to_stop=''
  before=${before:-0}
  if [ "$(status "$run_dir" state)" = "done" ]; then
    say "$run_dir is finished (step $before): nothing to do; to train it further, remove $run_dir/status.json"
    exit 0
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -le "$MAX_RESTARTS" ] ||
    refuse "job $SLURM_JOB_ID was restarted $SLURM_RESTART_COUNT times, but MAX_RESTARTS is $MAX_RESTARTS: sbatch again"
  claim
  rm -f "$run_dir/STOP"
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $run_dir on $SLURM_JOB_NODELIST" \
    "x $RANKS_PER_NODE ranks, from step $before"
  trap ask_to_stop USR1
  trap ended_by_slurm TERM
  name_master
  [ "$CHECK_NODES" = no ] || check_nodes
  launch "$RANKS_PER_NODE" python -m pipeline.train --deepspeed "${DS_CONFIG:-zero3}" \
    --recipe "$recipe" --run-dir "$run_dir" "${@:3}" &
  wait_for $! || code=$?
  finish "$code"
}

# claim: reserve the run folder for this job; two jobs in one folder would overwrite each other's checkpoints.
# RUN_DIR/slurm_job holds the job, the step of its latest start, and the number of earlier starts without a new
# checkpoint (`fruitless`).
claim() {
  local record owner
  record=$(cat "$run_dir/slurm_job" 2> /dev/null || true)
  owner=${record%% *} fruitless=0
  if [ -n "$owner" ] && [ "$owner" != "$SLURM_JOB_ID" ] && [ -n "$(squeue -h -j "$owner" -t R,CG -o %i 2> /dev/null)" ]; then
    refuse "job $owner is training $run_dir: wait for it, or scancel $owner"
  fi
  if [[ $record =~ ^"$SLURM_JOB_ID $before "([01])$ ]]; then fruitless=$((BASH_REMATCH[1] + 1)); fi
  [ "$fruitless" -lt 2 ] || stuck
  if ! { mkdir -p "$run_dir" && echo "$SLURM_JOB_ID $before $fruitless" > "$run_dir/slurm_job"; } 2> /dev/null; then
    refuse "RUN_DIR=$run_dir is not writable: choose another folder"
  fi
}

# finish EXIT_CODE: exit, or requeue the job, according to how training ended.
finish() {
  local code=$1 state step lost
  state=$(status "$run_dir" state) step=$(status "$run_dir" step)
  say "training ended with exit code $code: ${state:-never started} at step ${step:-0}"
  if [ "$code" = 0 ] && [ "$state" = "done" ]; then exit 0; fi
  if [ "$code" = 0 ] && [ "$state" = stopped ]; then
    [ -n "$asked_to_stop" ] || refuse "stopped by a STOP file or by train.max_hours, not by Slurm: sbatch again to continue"
    requeue "the time limit is near; saved at step $step"
  fi
  find_lost
  [ -z "$lost" ] || requeue "lost $lost; resuming from the newest checkpoint"
  say "failed; every node responds, so a restart would fail too$(failure)"
  say "output of rank N: grep '^ *N: ' $(own_log)$([ ! -d "$run_dir/logs" ] || echo ", or $run_dir/logs/rank-N.log")"
  exit 1
}

# failure: print the error that the trainer recorded for this start, if any.
failure() {
  [ "$run_dir/status.json" -nt "$run_dir/slurm_job" ] || return 0
  python -c 'import json, sys; print(":", json.load(open(sys.argv[1])).get("error", "see above"))' \
    "$run_dir/status.json" 2> /dev/null || true
}

own_log() { scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p'; }

# stuck: give up, because this job has started twice from the same step without a new checkpoint.
stuck() {
  refuse "two consecutive starts of job $SLURM_JOB_ID saved nothing after step $before, so it is not requeued:" \
    "find the cause above, raise --time or save more often, then sbatch again"
}

# requeue WHY: requeue this job under the same id; Slurm then ends this shell.
requeue() {
  local step
  step=$(status "$run_dir" step)
  say "$1"
  [ "$fruitless" = 0 ] || [ "${step:-0}" -gt "$before" ] || stuck
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ] || refuse "MAX_RESTARTS=$MAX_RESTARTS is reached: sbatch again to continue"
  say "requeued"
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" || refuse "this cluster does not requeue jobs: sbatch the same script again"
  sleep infinity
}

# ask_to_stop: the USR1 trap. It creates a file, because a signal to the step would kill it in the middle of a step.
ask_to_stop() {
  say "USR1 from Slurm: asking the trainer to stop"
  asked_to_stop=yes
  interrupted=yes
  touch "$run_dir/STOP"
}

# ended_by_slurm: the TERM trap. Slurm usually notices a lost node first and requeues the job itself.
ended_by_slurm() {
  local lost
  lost=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N %T' | awk '$2 ~ /down|fail|\*/ && !seen[$1]++ { printf " %s", $1 }')
  if [ -n "$lost" ]; then lost="lost$lost"; else lost="preempted, cancelled or out of time"; fi
  say "ended by Slurm: $lost"
  exit 143
}

# wait_for PID: wait for a background process and return its exit code; a trap interrupts the shell's own wait.
wait_for() {
  local code
  while :; do
    interrupted='' code=0
    wait "$1" || code=$?
    [ -n "$interrupted" ] || return "$code"
  done
}

# name_master: set the rendezvous of the ranks. The port depends on the job and is below Linux's ephemeral ports.
name_master() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
  export MASTER_ADDR MASTER_PORT
  unset RANK WORLD_SIZE LOCAL_RANK # inherited from the caller of sbatch; each process reads its own from Slurm
}

# srun without the job's per-task GPU settings: every process sees all GPUs of the job on its node and uses the one of
# its local rank.
srun=(env -u SLURM_CPUS_PER_GPU -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK -u SLURM_NTASKS_PER_GPU -u SLURM_GPU_BIND srun)

# launch PROCESSES_PER_NODE COMMAND...: run one step on all nodes; if one process fails, srun ends all.
launch() {
  local ranks=$1 cpus=$((${SLURM_CPUS_ON_NODE:-1} / $1))
  shift
  "${srun[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((ranks * SLURM_JOB_NUM_NODES))" \
    --ntasks-per-node="$ranks" --cpus-per-task="$((cpus > 0 ? cpus : 1))" --distribution=block \
    --label --kill-on-bad-exit=1 "$@"
}

# check_nodes: test every node and exit if one is bad. Exit code 3 means that the test has already named a bad node.
check_nodes() {
  local code=0 lost
  # shellcheck disable=SC2016
  MASTER_PORT=$((MASTER_PORT + 10000)) launch 1 bash -c \
    'python "$@" || { code=$?; [ $code = 3 ] || [ $code -gt 128 ] || echo "bad node $SLURMD_NODENAME: python $1 exits with code $code"; exit $code; }' \
    bash slurm/check_nodes.py "$run_dir" "${SLURM_GPUS_ON_NODE:-0}" || code=$?
  [ "$code" = 0 ] && return
  find_lost
  [ -z "$lost" ] || requeue "lost $lost before the first step"
  refuse "a node is unfit for training: exclude it with sbatch --exclude=NODE, and report it to your administrators"
}

# find_lost: set `lost` to the job's nodes that start no process. It runs in the background so the TERM trap can run.
find_lost() {
  exec 3< <(silent_nodes)
  wait_for $! || true
  lost=$(cat <&3)
  lost=${lost% }
}

# silent_nodes: print the job's nodes that start no process within NODE_PATIENCE seconds. Slurm may refuse a step while
# it cleans up the previous one, so a node is lost only after three refusals.
silent_nodes() {
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    # shellcheck disable=SC2016
    timeout "$NODE_PATIENCE" bash -c 'for pause in 1 4 0; do "$@" && exit; sleep $pause; done; exit 1' bash \
      "${srun[@]}" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 \
      --nodelist="$node" true > /dev/null 2>&1 || printf '%s ' "$node" &
  done
  wait
}
