# shellcheck shell=bash
# What the job scripts share. A script sources this file from the repository root, which is where sbatch was called.
#
# How a training job lives:
#   1. Every node is tested (slurm/check_nodes.py); a bad one is named and the job ends.
#   2. One srun step starts one process per GPU on all nodes; the trainer reads its rank from Slurm. The run folder's
#      newest checkpoint is taken up, so that the first start and every later one are the same command.
#   3. Some minutes before the time limit Slurm sends USR1 to this shell only. It touches RUN_DIR/STOP: all ranks end
#      after the same step, saved, and the job goes back to the queue. So it does when one of its nodes is lost.
#   4. The job ends well only when the run is done; jobs that wait for it (afterok) start then and not before.
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
  # shellcheck source=/dev/null
  if [ -f "$VENV/bin/activate" ]; then . "$VENV/bin/activate"; fi
  command -v mma-prep > /dev/null || refuse "mma-prep is not installed in '$VENV' or on PATH: run 'make setup', or set VENV"
}

# need_job SCRIPT: refuse to run outside of Slurm.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || refuse "$1 is a job script: sbatch $1"
}

# run_name RECIPE: the name of a recipe's run, for a shipped recipe or a YAML file.
run_name() { basename "${1%.*}"; }

# sft_run RECIPE POLICY: the run folder of a recipe under a mask policy; MMA is what the recipes are for.
sft_run() {
  local suffix=_$2
  [ "$2" != mma ] || suffix=''
  echo "runs/$(run_name "$1")$suffix"
}

# status RUN KEY: the value of "state" or "step" in a run's status.json; nothing before the first start.
status() {
  sed -n "s/.*\"$2\": \"\\{0,1\\}\\([a-z0-9]*\\).*/\\1/p" "$1/status.json" 2> /dev/null || true
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
train() {
  local recipe=$1 run_dir=$2 code=0 before
  before=$(status "$run_dir" step)
  if [ "$(status "$run_dir" state)" = "done" ]; then
    say "$run_dir is finished (step $before): nothing to do; to train it further, remove $run_dir/status.json"
    exit 0
  fi
  restarts_left || refuse "job $SLURM_JOB_ID was restarted $SLURM_RESTART_COUNT times, MAX_RESTARTS is $MAX_RESTARTS"
  claim "$run_dir"
  rm -f "$run_dir/STOP"
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $run_dir on $SLURM_JOB_NODELIST" \
    "x $RANKS_PER_NODE ranks, from step ${before:-0}"
  asked_to_stop=''
  trap 'ask_to_stop '"$(printf %q "$run_dir")" USR1
  name_master
  [ "$CHECK_NODES" = no ] || check_nodes "$run_dir"
  launch "$RANKS_PER_NODE" python pipeline/train.py --deepspeed "${DS_CONFIG:-ds_configs/zero3.json}" \
    --recipe "$recipe" --run-dir "$run_dir" "${@:3}" &
  wait_for $! || code=$?
  verdict "$run_dir" "$code" "${before:-0}"
}

# claim RUN_DIR: make the run folder this job's own; two jobs in one folder would spoil each other's checkpoints.
claim() {
  local owner
  owner=$(cat "$1/slurm_job" 2> /dev/null || true)
  if [ -n "$owner" ] && [ "$owner" != "$SLURM_JOB_ID" ] && [ -n "$(squeue -h -j "$owner" -t R,CG -o %i 2> /dev/null)" ]; then
    refuse "job $owner is training $1: wait for it, or scancel $owner"
  fi
  if ! { mkdir -p "$1" && echo "$SLURM_JOB_ID" > "$1/slurm_job"; }; then
    refuse "RUN_DIR=$1 cannot be written: choose another"
  fi
}

# verdict RUN_DIR EXIT_CODE STEP_BEFORE: end this shell as the run has ended.
verdict() {
  local run_dir=$1 code=$2 state step lost
  state=$(status "$run_dir" state) step=$(status "$run_dir" step)
  say "training ended with exit code $code: ${state:-never started} at step ${step:-0}"
  if [ "$code" = 0 ] && [ "$state" = "done" ]; then exit 0; fi
  if [ "$code" = 0 ] && [ "$state" = stopped ]; then
    [ -n "$asked_to_stop" ] || refuse "stopped by a STOP file or by train.max_hours, not by Slurm: sbatch again to go on"
    [ "$step" -gt "$3" ] || refuse "no new step since step $3: allow more --time, or look above for what is slow"
    requeue "the time limit is near; saved at step $step"
  fi
  lost=$(lost_nodes)
  [ -z "$lost" ] || requeue "lost $lost; the newest checkpoint goes on"
  say "failed; every node answers, so a restart would fail too: see above"
  exit 1
}

restarts_left() { [ "${SLURM_RESTART_COUNT:-0}" -le "$MAX_RESTARTS" ]; }

# requeue WHY: put this job back into the queue, under the same id; Slurm then ends this shell.
requeue() {
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ] || refuse "$1, but MAX_RESTARTS=$MAX_RESTARTS is reached: sbatch again"
  say "back to the queue: $1"
  scontrol requeue "$SLURM_JOB_ID" || refuse "this cluster does not requeue jobs: sbatch the same script again"
  sleep infinity
}

# ask_to_stop RUN_DIR: the USR1 trap. The file is the message: a signal to the step would kill it half-way.
ask_to_stop() {
  say "USR1 from Slurm: asking the trainer to stop"
  asked_to_stop=yes
  interrupted=yes
  touch "$1/STOP"
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

# launch PROCESSES_PER_NODE COMMAND...: one step over all nodes; when one process fails, all are ended. Every process
# sees all GPUs of its node and takes the one of its local rank.
launch() {
  local ranks=$1 cpus=$((${SLURM_CPUS_ON_NODE:-1} / $1))
  shift
  env -u SLURM_CPUS_PER_GPU srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((ranks * SLURM_JOB_NUM_NODES))" \
    --ntasks-per-node="$ranks" --cpus-per-task="$((cpus > 0 ? cpus : 1))" --distribution=block \
    --kill-on-bad-exit=1 "$@"
}

# check_nodes RUN_DIR: test every node; ends this shell when one is bad, which the test names.
check_nodes() {
  local code=0
  MASTER_PORT=$((MASTER_PORT + 10000)) launch 1 python slurm/check_nodes.py "$1" "${SLURM_GPUS_ON_NODE:-0}" || code=$?
  [ "$code" = 0 ] && return
  lost=$(lost_nodes)
  [ -z "$lost" ] || requeue "lost $lost before the first step"
  refuse "a node is not fit for training: leave it out with sbatch --exclude=NODE, and tell its administrators"
}

# lost_nodes: the job's nodes that start no process within a minute.
lost_nodes() {
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    timeout 60 env -u SLURM_CPUS_PER_GPU srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 \
      --nodelist="$node" true > /dev/null 2>&1 || printf '%s ' "$node"
  done
}
