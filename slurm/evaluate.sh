#!/usr/bin/env bash
# Exports and evaluates finished runs: each run gets a model folder RUN/export, and the first run is evaluated on
# held-out packs and benchmarks, compared with each of the others.
#
#   sbatch slurm/evaluate.sh                                    the built-in demo: runs/demo_sft
#   sbatch slurm/evaluate.sh runs/demo_sft runs/demo_sft_causal
#   EVAL_PACKS=none sbatch slurm/evaluate.sh runs/aki_4b_sft    export only
#   BENCH=all BENCH_DATA=bench_data sbatch slurm/evaluate.sh runs/aki_4b_sft
#                                                               then the benchmarks, in one job
#   BENCH=all BENCH_DATA=bench_data sbatch --array=0-7 slurm/evaluate.sh runs/aki_4b_sft
#                                                               8 shares of the answers; needs an up-to-date export
#
# Call sbatch in the folder that contains slurm/. Existing exports are kept unless the run has been trained further;
# existing scores are kept unless the packs or flags have changed. Answers to benchmarks are kept batch by batch: the
# same command continues, and a plain job after an array prints the table (slurm/chain.sh --bench).
#   EVAL_PACKS   held-out pack folder, or none                      (data/demo/packs/eval)
#   EVAL_FLAGS   more flags of mma evaluate, e.g. "--limit 500"     (none)
#   BENCH        benchmarks separated by commas, all, or none       (none)
#   BENCH_DATA   folder with one sub-folder per benchmark           (none)
#   BENCH_FLAGS  more flags of mma bench, e.g. "--judge-url URL"    (none)
#   SHARES       number of shares, if the array covers only a part of them
# Set your site's options in slurm/env.sh. Log: slurm/logs/mma-eval-JOB.log; tables: RUN/bench*.txt.
#SBATCH --job-name=mma-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the folder that contains slurm/" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/evaluate.sh
activate

# export_run RUN: write RUN/export unless it already holds the run's last step; remove scores of an export it replaces.
export_run() {
  local saved last
  if [ -d "$1/export" ]; then
    saved=$(field "$1/export/config.json" step) last=$(status "$1" step)
    if [ -z "$last" ] || [ "$saved" = "$last" ]; then say "$1/export is up to date" && return; fi
    say "$1/export is from step ${saved:-?}, but the run is at step $last: exporting again"
    rm -rf "$1/export" "$1"/evaluation*.json "$1"/bench*.txt
  fi
  mma export "$1" "$1/export"
}

# measure JSON MODEL [OTHER]: evaluate a model unless its scores exist for the same packs, flags and steps, which a file
# beside the scores records.
measure() {
  local json=$1 of=${1%.json}.of wanted
  wanted=$(conditions "${@:2}")
  if [ -f "$json" ]; then
    if [ "$(cat "$of" 2> /dev/null)" = "$wanted" ]; then say "$json is up to date" && return; fi
    say "$json is from other packs, flags or steps: evaluating again"
  fi
  mma evaluate --json "$json" --model "$2" ${3:+--compare "$3"} --packs "$packs" "${flags[@]}"
  echo "$wanted" > "$of"
}

# conditions MODEL...: print everything that scores depend on, one item per line.
conditions() {
  local model
  printf '%s\n' "packs $packs $({ cksum < "$packs/manifest.json"; } 2> /dev/null || true)" "flags ${flags[*]}"
  for model in "$@"; do echo "model $model step $(field "$model/config.json" step)"; done
}

# label RUN RUNS...: print the name of a run in file names: its folder's, or its path if another run has that name too.
label() {
  local other same=0
  for other in "${@:2}"; do
    [ "$(basename "$other")" != "$(basename "$1")" ] || same=$((same + 1))
  done
  if [ "$same" -le 1 ]; then basename "$1"; else tr / = <<< "${1%/}"; fi
}

# benchmark TABLE MODEL [OTHER]: run the benchmarks on what is not answered yet, and write the table. In an array each
# task answers its share.
benchmark() {
  local command=(mma bench "$bench" --model "$2" ${3:+--compare "$3"} --data "$BENCH_DATA" "${bench_flags[@]}")
  if [ -n "$share" ]; then
    say "share $share of $bench"
    "${command[@]}" --shard "$share"
  else
    "${command[@]}" | tee "$1.new"
    mv "$1.new" "$1"
  fi
}

# need_export RUN: refuse an array task whose model is not exported yet: all tasks would write the same folder.
need_export() {
  [ -d "$1/export" ] || refuse "$1/export does not exist: run sbatch slurm/evaluate.sh $1 before the array"
  [ "$(field "$1/export/config.json" step)" = "$(status "$1" step)" ] ||
    refuse "$1/export is from an earlier step: run sbatch slurm/evaluate.sh $1 before the array"
}

packs=${EVAL_PACKS:-data/demo/packs/eval} bench=${BENCH:-none}
[ "$bench" = none ] || [ -n "${BENCH_DATA:-}" ] || refuse "BENCH=$bench needs BENCH_DATA: the folder of the benchmarks' files"
split EVAL_FLAGS
flags=("${words[@]}")
split BENCH_FLAGS
bench_flags=("${words[@]}")
share=$(share_of_array)
[ $# -gt 0 ] || set -- runs/demo_sft
for run in "$@"; do
  need_finished RUN "$run"
  if [ -n "$share" ]; then need_export "$run"; else export_run "$run"; fi
done
model=$1/export
if [ "$packs" != none ] && [ -z "$share" ]; then
  if [ $# = 1 ]; then measure "$1/evaluation.json" "$model"; fi
  for other in "${@:2}"; do
    measure "$1/evaluation_beside_$(label "$other" "$@").json" "$model" "$other/export"
  done
fi
if [ "$bench" != none ]; then
  if [ $# = 1 ]; then benchmark "$1/bench.txt" "$model"; fi
  for other in "${@:2}"; do
    benchmark "$1/bench_beside_$(label "$other" "$@").txt" "$model" "$other/export"
  done
elif [ -n "$share" ]; then
  refuse "an array answers benchmarks in shares: set BENCH, or leave --array out"
fi
