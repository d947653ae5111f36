#!/usr/bin/env bash
# Export and evaluation of finished runs: RUN/export becomes a model folder, and the first run is measured on held-out
# packs, beside each of the others.
#
#   sbatch slurm/evaluate.sh                                    the built-in demo: runs/demo_sft
#   sbatch slurm/evaluate.sh runs/demo_sft runs/demo_sft_causal
#   EVAL_PACKS=none sbatch slurm/evaluate.sh runs/aki_4b_sft    export only
#
# Call sbatch in the repository root. What is there already is kept, unless the run was trained further since; so
# are scores, unless they are asked for with other packs or flags.
#   EVAL_PACKS  held-out pack folder, or none                   (data/demo/packs/eval)
#   EVAL_FLAGS  more flags of mma evaluate, e.g. "--limit 500"  (none)
# Settings of your site are in slurm/env.sh, the log is slurm/logs/mma-eval-JOB.log.
#SBATCH --job-name=mma-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the repository root" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/evaluate.sh
activate

# export_run RUN: make RUN/export, unless it holds the run's last step; scores of an export that it replaces go with it.
export_run() {
  local saved last
  if [ -d "$1/export" ]; then
    saved=$(field "$1/export/config.json" step) last=$(status "$1" step)
    if [ -z "$last" ] || [ "$saved" = "$last" ]; then say "$1/export is there already" && return; fi
    say "$1/export is of step ${saved:-?}, the run is at step $last: it is made anew"
    rm -rf "$1/export" "$1"/evaluation*.json
  fi
  mma export "$1" "$1/export"
}

# measure JSON MODEL [OTHER]: evaluate a model, unless the scores are there, of the same packs, flags and steps. A file
# beside the scores says of which.
measure() {
  local json=$1 of=${1%.json}.of wanted
  wanted=$(conditions "${@:2}")
  if [ -f "$json" ]; then
    if [ "$(cat "$of" 2> /dev/null)" = "$wanted" ]; then say "$json is there already" && return; fi
    say "$json is of other packs, flags or steps: measured anew"
  fi
  mma evaluate --json "$json" --model "$2" ${3:+--compare "$3"} --packs "$packs" "${flags[@]}"
  echo "$wanted" > "$of"
}

# conditions MODEL...: what scores depend on, one thing a line.
conditions() {
  local model
  printf '%s\n' "packs $packs $({ cksum < "$packs/manifest.json"; } 2> /dev/null || true)" "flags ${flags[*]}"
  for model in "$@"; do echo "model $model step $(field "$model/config.json" step)"; done
}

packs=${EVAL_PACKS:-data/demo/packs/eval}
read -ra flags <<< "${EVAL_FLAGS:-}"
[ $# -gt 0 ] || set -- runs/demo_sft
for run in "$@"; do
  need_finished RUN "$run"
  export_run "$run"
done
if [ "$packs" = none ]; then exit 0; fi
model=$1/export
if [ $# = 1 ]; then measure "$1/evaluation.json" "$model"; fi
for other in "${@:2}"; do
  measure "$1/evaluation_beside_$(basename "$other").json" "$model" "$other/export"
done
