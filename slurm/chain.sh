#!/usr/bin/env bash
# Submits a whole training: data preparation -> PT -> SFT -> export and evaluation. Each stage starts when the one before
# has ended well; when one fails, what waits for it is cancelled. The command again takes up what is left: a finished run
# gets no job, an unfinished one resumes.
#
#   slurm/chain.sh                                              the built-in demo, on one node
#   slurm/chain.sh --dry-run                                    print what would be submitted
#   slurm/chain.sh --policies mma,causal                        one PT, an SFT for each mask, compared
#   TRAIN_SBATCH="--nodes=4" slurm/chain.sh --data aki_pt,aki_sft --shards 64 --pt aki_4b_pt --sft aki_4b_sft --eval none
#   slurm/chain.sh --pt pt_text_first.yaml,pt_image_first.yaml --sft sft_text_first.yaml,sft_image_first.yaml
#                                                               dual-order training: four chained stages
#
#   --data RECIPES    recipes of mma-prep, with commas, or none                            (demo)
#   --shards N        array tasks that share the ingestion of each data recipe             (1: no array)
#   --pt RECIPES      PT recipes; each starts from the weights of the one before; or none  (demo_pt)
#   --sft RECIPES     SFT recipes, chained likewise, the first from the last PT; or none   (demo_sft)
#   --policies NAMES  mask policies: the SFT recipes are trained with each                 (mma)
#   --eval PACKS      held-out pack folder, or none to export only                         (data/demo/packs/eval)
#   --dry-run         print, submit nothing
# DATA_FLAGS, EXTRA_FLAGS and EVAL_FLAGS reach mma-prep, the trainer (in PT and SFT) and mma evaluate; what your site
# wants of sbatch is set in slurm/env.sh. Call it in the repository root, on a login node.
[ -f slurm/lib.sh ] || { echo "error: call slurm/chain.sh in the repository root" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2

jobs=() job='' dry_run=''

# submit DEPENDENCIES NAME=VALUE... SBATCH_OPTIONS... SCRIPT ARGUMENTS...: set `job` to the new job's id.
# DEPENDENCIES are ids joined by colons, or nothing. The variables travel in the job's environment, whatever SBATCH_EXPORT
# says: without them every stage would train the demo.
submit() {
  local variables=() after=() batch=(sbatch --parsable --export=ALL)
  [ -z "$1" ] || after=("--dependency=afterok:$1" --kill-on-invalid-dep=yes)
  shift
  while [[ $1 =~ ^[A-Z_]+= ]]; do
    variables+=("$1")
    shift
  done
  if [ -n "$dry_run" ]; then
    job="<$((${#jobs[@]} + 1))>"
    echo "$job ${variables[*]} ${batch[*]} ${after[*]}${after:+ }$*"
  else
    job=$(env "${variables[@]}" "${batch[@]}" "${after[@]}" "$@") || give_up
    job=${job%%;*} # ID;CLUSTER where there are several clusters
    echo "$job ${variables[*]} $*"
  fi
  jobs+=("$job")
}

# give_up: all stages or none.
give_up() {
  [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"
  refuse "sbatch refused a stage (see above), so nothing is left in the queue; options for your site: slurm/env.sh"
}

# prepare_data RECIPE: an array that ingests, where it is shared, and the job that does the rest.
prepare_data() {
  local before=''
  if [ "$shards" -gt 1 ]; then
    submit '' "RECIPE=$1" "SHARES=$shards" "${data_options[@]}" --array="0-$((shards - 1))" slurm/data_prep.sh
    before=$job
  fi
  submit "$before" "RECIPE=$1" "${data_options[@]}" slurm/data_prep.sh
}

# finished RUN: whether a stage needs no job; what comes after it then waits for what came before it.
finished() {
  [ "$(status "$1" state)" = "done" ] || return 1
  echo "- $1 is finished (step $(status "$1" step))"
}

# pretrain AFTER: the PT recipes, one after the other; sets `job` and `run` to the last one, or leaves AFTER and nothing.
pretrain() {
  local recipe start
  job=$1 run=''
  for recipe in $(list "$pt"); do
    start=$run run=runs/$(run_name "$recipe")
    finished "$run" || submit "$job" "RECIPE=$recipe" "RUN_DIR=$run" "INIT_FROM=$start" "${train_options[@]}" slurm/pt.sh
  done
}

# tune POLICY AFTER START: the SFT recipes under one mask, the first from the run START; sets `job` and `run` likewise.
tune() {
  local recipe start
  job=$2 run=$3
  for recipe in $(list "$sft"); do
    start=${run:-none} run=$(sft_run "$recipe" "$1")
    finished "$run" || submit "$job" "RECIPE=$recipe" "POLICY=$1" "PT_RUN_DIR=$start" "RUN_DIR=$run" \
      "${train_options[@]}" slurm/sft_mma.sh
  done
}

# check_folders: two stages in one run folder would be one to everything that looks at it: the second would not be trained.
check_folders() {
  local twice
  twice=$(run_folders | sort | uniq -d | head -n 1)
  [ -z "$twice" ] || refuse "two recipes would share $twice: rename one"
}

# run_folders: the run folder of every stage, one a line.
run_folders() {
  local recipe policy
  for recipe in $(list "$pt"); do echo "runs/$(run_name "$recipe")"; done
  for recipe in $(list "$sft"); do
    for policy in $(list "$policies"); do sft_run "$recipe" "$policy"; done
  done
}

# check_names: a name that is wrong is better refused now than by a job of next week. Needs the software on this node.
check_names() {
  local name masks=() flags
  [ -f pipeline/train.py ] && find_software || return 0
  read -ra flags <<< "${DATA_FLAGS:-}"
  for name in $(list "$data"); do
    [ "$name" = demo ] || accepted python slurm/check_recipe.py "$name" "${flags[@]}"
  done
  for name in $(list "$pt") $(list "$sft"); do
    accepted python pipeline/train.py --print-config --recipe "$name"
  done
  for name in $(list "$policies"); do masks+=(--policy "$name"); done
  accepted mma mask "V1 Q1 A1" "${masks[@]}"
}

# accepted COMMAND...: end this shell with the words of a command that refuses what it is given.
accepted() {
  local code=0 words
  words=$("$@" 2>&1 > /dev/null) || code=$?
  words=${words#error: }
  [ "$code" != 2 ] || refuse "${words#mma: }"
}

# list NAMES: the names between commas, one a line; no line for "none".
list() { [ "$1" = none ] || tr , '\n' <<< "$1"; }

data=demo pt=demo_pt sft=demo_sft policies=mma shards=1 packs=data/demo/packs/eval
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes && shift && continue ;;
    --help | -h) sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' slurm/chain.sh && exit 0 ;;
    --data | --pt | --sft | --policies | --shards | --eval) [ $# -gt 1 ] || refuse "$1 needs a value; see --help" ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
  [[ ! $2 =~ (^|,)(,|$) ]] || refuse "$1 '$2': a name is empty$([ "$1" = --policies ] || echo "; for no such stage: none")"
  case $1 in
    --data) data=$2 ;; --pt) pt=$2 ;; --sft) sft=$2 ;; --policies) policies=$2 ;; --eval) packs=$2 ;;
    --shards) shards=$2 ;;
  esac
  shift 2
done
[[ $shards =~ ^[1-9][0-9]*$ ]] || refuse "--shards $shards: give 1 or more"
[ "$policies" != none ] || refuse "--policies none: name a mask policy; for no SFT give --sft none"
read -ra train_options <<< "$TRAIN_SBATCH"
read -ra data_options <<< "$DATA_SBATCH"
read -ra eval_options <<< "$EVAL_SBATCH"

check_folders
check_names

data_jobs='' tuned_jobs='' runs=()
for recipe in $(list "$data"); do
  prepare_data "$recipe"
  data_jobs+=${data_jobs:+:}$job
done
pretrain "$data_jobs"
pt_job=$job pt_run=$run
if [ "$sft" != none ]; then
  for policy in $(list "$policies"); do
    tune "$policy" "$pt_job" "$pt_run"
    tuned_jobs+=${job:+${tuned_jobs:+:}$job}
    runs+=("$run")
  done
  submit "$tuned_jobs" "EVAL_PACKS=$packs" "${eval_options[@]}" slurm/evaluate.sh "${runs[@]}"
fi
[ -n "$dry_run" ] || echo "submitted ${#jobs[@]} jobs; squeue --me shows them, slurm/logs/ is what they say; scancel ${jobs[*]} ends all"
