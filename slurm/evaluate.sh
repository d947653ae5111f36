#!/usr/bin/env bash
# Exports and evaluates finished runs: each run gets a model folder RUN/export, and the first run is evaluated on
# held-out packs, compared with each of the others.
#
#   sbatch slurm/evaluate.sh                                    the built-in demo: runs/demo_sft
#   sbatch slurm/evaluate.sh runs/demo_sft runs/demo_sft_causal
#   EVAL_PACKS=none sbatch slurm/evaluate.sh runs/aki_4b_sft    export only
#
# Call sbatch in the folder that contains slurm/. Existing exports are kept unless the run has been trained further;
# existing scores are kept unless the packs or flags have changed.
#   EVAL_PACKS  held-out pack folder, or none                   (data/demo/packs/eval)
#   EVAL_FLAGS  more flags of mma evaluate, e.g. "--limit 500"  (none)
# Set your site's options in slurm/env.sh. Log: slurm/logs/mma-eval-JOB.log.
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
    rm -rf "$1/export" "$1"/evaluation*.json
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

packs=${EVAL_PACKS:-data/demo/packs/eval}
split EVAL_FLAGS
flags=("${words[@]}")
[ $# -gt 0 ] || set -- runs/demo_sft
for run in "$@"; do
  need_finished RUN "$run"
  export_run "$run"
done
if [ "$packs" = none ]; then exit 0; fi
model=$1/export
if [ $# = 1 ]; then measure "$1/evaluation.json" "$model"; fi
for other in "${@:2}"; do
  measure "$1/evaluation_beside_$(label "$other" "$@").json" "$model" "$other/export"
done
