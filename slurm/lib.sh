# shellcheck shell=bash
# What the job scripts share. A script sources this file from the repository root, which is where sbatch was called.
#
# How a training job lives:
#   1. Every node is tested (slurm/check_nodes.py); a bad one is named and the job ends.
#   2. One srun step starts one process per GPU on all nodes; the trainer reads its rank from Slurm. The run folder's
#      newest checkpoint is taken up, so that the first start and every later one are the same command.
#   3. Some minutes before the time limit Slurm sends USR1 to this shell only. It touches RUN_DIR/STOP: all ranks end
#      after the same step, saved, and the job goes back to the queue. So it does when one of its nodes is lost, which
#      it names; Slurm may give it the same node again once that answers: nothing is excluded in silence.
#   4. A job goes back at most MAX_RESTARTS times, and ends as failed when two starts in a row have saved nothing new.
#   5. The job ends well only when the run is done; jobs that wait for it (afterok) start then and not before.
# A log has the lines of all ranks, each behind its rank: grep '^ *3: ' finds what rank 3 said.
set -euo pipefail
# shellcheck source=slurm/env.sh
. slurm/env.sh

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

# refuse WORDS: what the user can mend; the exit code is 2 as everywhere in this project.
refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# activate: load the site's modules and the virtual environment into this shell and what it starts.
activate() {
  local module
  for module in $MODULES; do module load "$module"; done
  find_software || refuse "mma is not installed in '$VENV' or on PATH: run 'make setup', or set VENV"
}

# find_software: activate the virtual environment, where there is one; whether mma is there then.
find_software() {
  # shellcheck source=/dev/null
  if [ -f "$VENV/bin/activate" ]; then . "$VENV/bin/activate"; fi
  command -v mma > /dev/null
}

# need_job SCRIPT: refuse to run outside of Slurm.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || refuse "$1 is a job script: sbatch $1"
}

# run_name RECIPE: the name of a recipe's run, for a shipped recipe or a YAML file.
run_name() { basename "$1" | sed 's/\.ya\{0,1\}ml$//'; }

# sft_run RECIPE POLICY: the run folder of a recipe under a mask policy; MMA is what the recipes are for.
sft_run() {
  local suffix=_$2
  [ "$2" != mma ] || suffix=''
  echo "runs/$(run_name "$1")$suffix"
}

# status RUN KEY: the value of "state" or "step" in a run's status.json; nothing before the first start.
status() {
  field "$1/status.json" "$2"
}

# field FILE KEY: a word or number that a JSON file gives a key; nothing where there is none.
field() {
  sed -n "s/.*\"$2\": \"\\{0,1\\}\\([a-z0-9]*\\).*/\\1/p" "$1" 2> /dev/null || true
}

# need_finished VARIABLE RUN: refuse to start from a run that is missing or unfinished. A checkpoint folder or an
# exported model is taken as it is.
need_finished() {
  local state
  if [ -f "$2/manifest.json" ] || [ -f "$2/config.json" ]; then return; fi
  [ -d "$2" ] || refuse "$1=$2 does not exist: train it first (sbatch slurm/pt.sh, or slurm/chain.sh for all stages)," \
    "or set $1 to a run folder, a checkpoint, an exported model, or none"
  state=$(status "$2" state)
  [ "$state" = "done" ] || refuse "$1=$2 is not finished (${state:-never started}${state:+ at step $(status "$2" step)}):" \
    "sbatch its script again to finish it, or set $1 to one of its checkpoints"
}

# train RECIPE RUN_DIR FLAGS...: train until done; ends this shell. Goes back to the queue when stopped or struck.
# What the functions below share: run_dir, the step `before` this start, and asked_to_stop.
train() {
  local recipe=$1 code=0
  run_dir=$2 before=$(status "$2" step) asked_to_stop=''
  before=${before:-0}
  if [ "$(status "$run_dir" state)" = "done" ]; then
    say "$run_dir is finished (step $before): nothing to do; to train it further, remove $run_dir/status.json"
    exit 0
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -le "$MAX_RESTARTS" ] ||
    refuse "job $SLURM_JOB_ID was restarted $SLURM_RESTART_COUNT times, MAX_RESTARTS is $MAX_RESTARTS: sbatch again"
  claim
  rm -f "$run_dir/STOP"
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $run_dir on $SLURM_JOB_NODELIST" \
    "x $RANKS_PER_NODE ranks, from step $before"
  trap ask_to_stop USR1
  trap taken_away TERM
  name_master
  [ "$CHECK_NODES" = no ] || check_nodes
  launch "$RANKS_PER_NODE" python pipeline/train.py --deepspeed "${DS_CONFIG:-ds_configs/zero3.json}" \
    --recipe "$recipe" --run-dir "$run_dir" "${@:3}" &
  wait_for $! || code=$?
  verdict "$code"
}

# claim: make the run folder this job's own; two jobs in one folder would spoil each other's checkpoints. RUN_DIR/slurm_job
# holds the job, the step of its latest start, and how many starts before that one ended where they began (`fruitless`).
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
    refuse "RUN_DIR=$run_dir cannot be written: choose another"
  fi
}

# verdict EXIT_CODE: end this shell as the run has ended.
verdict() {
  local code=$1 state step lost
  state=$(status "$run_dir" state) step=$(status "$run_dir" step)
  say "training ended with exit code $code: ${state:-never started} at step ${step:-0}"
  if [ "$code" = 0 ] && [ "$state" = "done" ]; then exit 0; fi
  if [ "$code" = 0 ] && [ "$state" = stopped ]; then
    [ -n "$asked_to_stop" ] || refuse "stopped by a STOP file or by train.max_hours, not by Slurm: sbatch again to go on"
    requeue "the time limit is near; saved at step $step"
  fi
  find_lost
  [ -z "$lost" ] || requeue "lost $lost; the newest checkpoint goes on"
  say "failed; every node answers, so a restart would fail too$(failure)"
  say "what rank N said: grep '^ *N: ' $(own_log)$([ ! -d "$run_dir/logs" ] || echo ", or $run_dir/logs/rank-N.log")"
  exit 1
}

# failure: what the trainer says of this start's end, if it came to say something.
failure() {
  [ "$run_dir/status.json" -nt "$run_dir/slurm_job" ] || return 0
  python -c 'import json, sys; print(":", json.load(open(sys.argv[1])).get("error", "see above"))' \
    "$run_dir/status.json" 2> /dev/null || true
}

own_log() { scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p'; }

# stuck: this job ran twice from the same step and saved nothing; a third start would end alike.
stuck() {
  refuse "two starts of job $SLURM_JOB_ID have saved nothing after step $before, so it is not tried again:" \
    "see above what took their time or broke them; then allow more --time, or save more often, and sbatch again"
}

# requeue WHY: put this job back into the queue, under the same id; Slurm then ends this shell.
requeue() {
  local step
  step=$(status "$run_dir" step)
  say "$1"
  [ "$fruitless" = 0 ] || [ "${step:-0}" -gt "$before" ] || stuck
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ] || refuse "MAX_RESTARTS=$MAX_RESTARTS is reached: sbatch again to go on"
  say "back to the queue"
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" || refuse "this cluster does not requeue jobs: sbatch the same script again"
  sleep infinity
}

# ask_to_stop: the USR1 trap. The file is the message: a signal to the step would kill it half-way.
ask_to_stop() {
  say "USR1 from Slurm: asking the trainer to stop"
  asked_to_stop=yes
  interrupted=yes
  touch "$run_dir/STOP"
}

# taken_away: the TERM trap. When a node is lost, Slurm mostly notices first, and puts the job back into the queue itself.
taken_away() {
  local lost
  lost=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N %T' | awk '$2 ~ /down|fail|\*/ && !seen[$1]++ { printf " %s", $1 }')
  if [ -n "$lost" ]; then lost="lost$lost"; else lost="preempted, cancelled or out of time"; fi
  say "Slurm ends this start: $lost"
  exit 143
}

# wait_for PID: wait for a background job to its very end (a trap ends the shell's own wait early); its exit code.
wait_for() {
  local code
  while :; do
    interrupted='' code=0
    wait "$1" || code=$?
    [ -n "$interrupted" ] || return "$code"
  done
}

# name_master: where the ranks meet. The port differs from job to job and lies below those that Linux hands out.
name_master() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
  export MASTER_ADDR MASTER_PORT
  unset RANK WORLD_SIZE LOCAL_RANK # of whoever called sbatch: each process takes its own from Slurm
}

# A step's own processes, whatever the job was asked for in GPUs per task or CPUs per GPU: every process sees all GPUs
# that the job has on its node, and takes the one of its local rank.
srun=(env -u SLURM_CPUS_PER_GPU -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK -u SLURM_NTASKS_PER_GPU -u SLURM_GPU_BIND srun)

# launch PROCESSES_PER_NODE COMMAND...: one step over all nodes; when one process fails, all are ended.
launch() {
  local ranks=$1 cpus=$((${SLURM_CPUS_ON_NODE:-1} / $1))
  shift
  "${srun[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((ranks * SLURM_JOB_NUM_NODES))" \
    --ntasks-per-node="$ranks" --cpus-per-task="$((cpus > 0 ? cpus : 1))" --distribution=block \
    --label --kill-on-bad-exit=1 "$@"
}

# check_nodes: test every node; ends this shell when one is bad, which the test names. Code 3 is the test's own "bad".
check_nodes() {
  local code=0 lost
  # shellcheck disable=SC2016
  MASTER_PORT=$((MASTER_PORT + 10000)) launch 1 bash -c \
    'python "$@" || { code=$?; [ $code = 3 ] || [ $code -gt 128 ] || echo "bad node $SLURMD_NODENAME: python $1 ends with code $code"; exit $code; }' \
    bash slurm/check_nodes.py "$run_dir" "${SLURM_GPUS_ON_NODE:-0}" || code=$?
  [ "$code" = 0 ] && return
  find_lost
  [ -z "$lost" ] || requeue "lost $lost before the first step"
  refuse "a node is not fit for training: leave it out with sbatch --exclude=NODE, and tell its administrators"
}

# find_lost: set `lost` to the job's nodes that start no process. In the background, so that the TERM trap is not held up.
find_lost() {
  exec 3< <(silent_nodes)
  wait_for $! || true
  lost=$(cat <&3)
  lost=${lost% }
}

# silent_nodes: print the job's nodes that start no process within NODE_PATIENCE seconds. A step may be refused while the
# one before is still being cleared away: three refusals are needed.
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
