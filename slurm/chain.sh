#!/usr/bin/env bash
# Submits a full training chain: data preparation -> PT -> SFT -> export, evaluation and benchmarks. A stage starts when the
# previous one has succeeded; if a stage fails, Slurm cancels the stages that depend on it. Running the command again
# submits only the unfinished stages: a finished run gets no job, an unfinished run resumes.
#
#   slurm/chain.sh                                              the built-in demo on one node
#   slurm/chain.sh --dry-run                                    print the jobs without submitting them
#   slurm/chain.sh --policies mma,causal                        one PT run, one SFT run per mask policy, compared
#   TRAIN_SBATCH="--nodes=4" slurm/chain.sh --data aki_pt,aki_sft --shards 64 --pt aki_4b_pt --sft aki_4b_sft --eval none
#   slurm/chain.sh --pt pt_text_first.yaml,pt_image_first.yaml --sft sft_text_first.yaml,sft_image_first.yaml
#                                                               dual-order training: four chained stages
#   slurm/chain.sh --data none --pt none --bench all --bench-data bench_data --bench-shards 8
#                                                               the benchmarks as a last stage, in 8 array tasks
#
#   --data RECIPES    mma-prep recipes, separated by commas, or none                       (demo)
#   --shards N        array tasks that share the ingestion of each data recipe             (1: no array)
#   --pt RECIPES      PT recipes, each initialized from the previous run; or none          (demo_pt)
#   --sft RECIPES     SFT recipes, chained likewise, the first from the last PT; or none   (demo_sft)
#   --policies NAMES  mask policies; the SFT recipes are trained once per policy           (mma)
#   --eval PACKS      held-out pack folder, or none to export only                         (data/demo/packs/eval)
#   --bench NAMES     benchmarks of mma bench, all, or none                                (none)
#   --bench-data DIR  folder with one sub-folder per benchmark                             (none)
#   --bench-shards N  array tasks that share the questions                                 (1: no array)
#   --dry-run         print the jobs without submitting them
# DATA_FLAGS, EXTRA_FLAGS, EVAL_FLAGS and BENCH_FLAGS are passed to mma-prep, the trainer (PT and SFT), mma evaluate and
# mma bench; quote a word with spaces as in a shell. Set the sbatch options of your site in slurm/env.sh. Run it on a login node, in the folder
# that contains slurm/.
[ -f slurm/lib.sh ] || { echo "error: run slurm/chain.sh in the folder that contains slurm/" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2

jobs=() job='' dry_run=''

# submit DEPENDENCIES NAME=VALUE... SBATCH_OPTIONS... SCRIPT ARGUMENTS...: submit a job and set `job` to its id.
# DEPENDENCIES are ids joined by colons, or empty. --export=ALL overrides SBATCH_EXPORT: without the variables, every
# stage would train the demo.
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
    echo "$job $(shown "${variables[@]}") ${batch[*]} ${after[*]}${after:+ }$(shown "$@")"
  else
    job=$(env "${variables[@]}" "${batch[@]}" "${after[@]}" "$@") || give_up
    job=${job%%;*} # ID;CLUSTER where there are several clusters
    echo "$job $(shown "${variables[@]}") $(shown "$@")"
  fi
  jobs+=("$job")
}

# shown WORDS...: print words on one line, quoted where a shell needs it.
shown() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./=:,%+-]*$ ]] || word=$(printf '%q' "$word")
    line+=("$word")
  done
  echo "${line[*]}"
}

# give_up: cancel what was submitted; a chain is submitted as a whole or not at all.
give_up() {
  [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"
  refuse "sbatch refused a stage (see above), so all jobs of this chain were cancelled; set your site's options in slurm/env.sh"
}

# prepare_data RECIPE: submit an ingestion array if --shards is above 1, then the job that plans and writes the packs.
prepare_data() {
  local before=''
  if [ "$shards" -gt 1 ]; then
    submit '' "RECIPE=$1" "SHARES=$shards" "${data_options[@]}" --array="0-$((shards - 1))" slurm/data_prep.sh
    before=$job
  fi
  submit "$before" "RECIPE=$1" "${data_options[@]}" slurm/data_prep.sh
}

# finished RUN: succeed if a run needs no job; the next stage then depends on the previous job.
finished() {
  [ "$(status "$1" state)" = "done" ] || return 1
  echo "- $1 is finished (step $(status "$1" step))"
}

# pretrain AFTER: submit the PT recipes in sequence; set `job` and `run` to the last one (AFTER and empty if none).
pretrain() {
  local recipe start
  job=$1 run=''
  for recipe in "${pt[@]}"; do
    start=$run run=runs/$(run_name "$recipe")
    finished "$run" || submit "$job" "RECIPE=$recipe" "RUN_DIR=$run" "INIT_FROM=$start" "${train_options[@]}" slurm/pt.sh
  done
}

# tune POLICY AFTER START: submit the SFT recipes under one mask, the first from the run START; set `job` and `run`.
tune() {
  local recipe start
  job=$2 run=$3
  for recipe in "${sft[@]}"; do
    start=${run:-none} run=$(sft_run "$recipe" "$1")
    finished "$run" || submit "$job" "RECIPE=$recipe" "POLICY=$1" "PT_RUN_DIR=$start" "RUN_DIR=$run" \
      "${train_options[@]}" slurm/sft_mma.sh
  done
}

# evaluate AFTER RUNS...: submit export and evaluation, with the benchmarks in the same job, or in an array after it and
# a job that prints the table.
evaluate() {
  local measured=("EVAL_PACKS=$packs") benched=("BENCH=$bench" "BENCH_DATA=$bench_data")
  [ "$bench" = none ] || [ "$bench_shards" -gt 1 ] || measured+=("${benched[@]}")
  submit "$1" "${measured[@]}" "${eval_options[@]}" slurm/evaluate.sh "${@:2}"
  if [ "$bench" = none ] || [ "$bench_shards" = 1 ]; then return; fi
  submit "$job" EVAL_PACKS=none "${benched[@]}" "SHARES=$bench_shards" "${eval_options[@]}" \
    --array="0-$((bench_shards - 1))" slurm/evaluate.sh "${@:2}"
  submit "$job" EVAL_PACKS=none "${benched[@]}" "${eval_options[@]}" slurm/evaluate.sh "${@:2}"
}

# check_folders: refuse two stages with the same run folder: the second would look finished and never be trained.
check_folders() {
  local twice
  twice=$(run_folders | sort | uniq -d | head -n 1)
  [ -z "$twice" ] || refuse "two recipes would share the run folder $twice: rename one"
}

# run_folders: print the run folder of every stage, one per line.
run_folders() {
  local recipe policy
  for recipe in "${pt[@]}"; do echo "runs/$(run_name "$recipe")"; done
  for recipe in "${sft[@]}"; do
    for policy in "${policies[@]}"; do sft_run "$recipe" "$policy"; done
  done
}

# check_names: refuse unknown recipes and policies now instead of in a queued job. Needs the software on this node.
check_names() {
  local name masks=()
  find_software || return 0
  split DATA_FLAGS
  for name in "${data[@]}"; do
    [ "$name" = demo ] || accepted python slurm/check_recipe.py "$name" "${words[@]}"
  done
  for name in "${pt[@]}" "${sft[@]}"; do
    accepted python -m pipeline.train --print-config --recipe "$name"
  done
  for name in "${policies[@]}"; do masks+=(--policy "$name"); done
  accepted mma mask "V1 Q1 A1" "${masks[@]}"
  [ "$bench" = none ] || accepted python slurm/check_bench.py "$bench"
}

# accepted COMMAND...: run a check; if it reports a user error, exit with its message.
accepted() {
  local code=0 message
  message=$("$@" 2>&1 > /dev/null) || code=$?
  message=${message#error: }
  [ "$code" != 2 ] || refuse "${message#mma: }"
}

# list VARIABLE: turn comma-separated names into an array; "none" into an empty one.
# shellcheck disable=SC2034 # the array is read by its own name
list() {
  local text=${!1}
  declare -n names=$1
  if [ "$text" = none ]; then names=(); else IFS=, read -ra names <<< "$text"; fi
}

data=demo pt=demo_pt sft=demo_sft policies=mma shards=1 packs=data/demo/packs/eval
bench=none bench_data='' bench_shards=1
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes && shift && continue ;;
    --help | -h) sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' slurm/chain.sh && exit 0 ;;
    --data | --pt | --sft | --policies | --shards | --eval | --bench | --bench-data | --bench-shards) [ $# -gt 1 ] || refuse "$1 needs a value; see --help" ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
  [[ ! $2 =~ (^|,)(,|$) ]] || refuse "$1 '$2': a name is empty$([ "$1" = --policies ] || echo "; use none to skip the stage")"
  case $1 in
    --data) data=$2 ;; --pt) pt=$2 ;; --sft) sft=$2 ;; --policies) policies=$2 ;; --eval) packs=$2 ;;
    --shards) shards=$2 ;; --bench) bench=$2 ;; --bench-data) bench_data=$2 ;; --bench-shards) bench_shards=$2 ;;
  esac
  shift 2
done
[[ $shards =~ ^[1-9][0-9]*$ ]] || refuse "--shards $shards: give 1 or more"
[[ $bench_shards =~ ^[1-9][0-9]*$ ]] || refuse "--bench-shards $bench_shards: give 1 or more"
[ "$bench" = none ] || [ -d "$bench_data" ] || refuse "--bench $bench needs --bench-data: the folder of the benchmarks' files"
[ "$policies" != none ] || refuse "--policies none: name a mask policy, or skip SFT with --sft none"
split TRAIN_SBATCH && train_options=("${words[@]}")
split DATA_SBATCH && data_options=("${words[@]}")
split EVAL_SBATCH && eval_options=("${words[@]}")
for stage in data pt sft policies; do list "$stage"; done

check_folders
check_names

data_jobs='' tuned_jobs='' runs=()
for recipe in "${data[@]}"; do
  prepare_data "$recipe"
  data_jobs+=${data_jobs:+:}$job
done
pretrain "$data_jobs"
pt_job=$job pt_run=$run
if [ ${#sft[@]} -gt 0 ]; then
  for policy in "${policies[@]}"; do
    tune "$policy" "$pt_job" "$pt_run"
    tuned_jobs+=${job:+${tuned_jobs:+:}$job}
    runs+=("$run")
  done
  evaluate "$tuned_jobs" "${runs[@]}"
fi
[ -n "$dry_run" ] || echo "submitted ${#jobs[@]} jobs (squeue --me); logs: slurm/logs/; cancel all: scancel ${jobs[*]}"
