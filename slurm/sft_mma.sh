#!/usr/bin/env bash
# Instruction tuning (SFT) with Modality-Mutual Attention, from a finished PT run: one job, until it is done.
#
#   sbatch slurm/sft_mma.sh                                     the built-in demo, from runs/demo_pt
#   RECIPE=aki_4b_sft PT_RUN_DIR=runs/aki_4b_pt sbatch --nodes=4 slurm/sft_mma.sh
#   POLICY=causal sbatch slurm/sft_mma.sh                       the same with another mask, to compare
#   PT_RUN_DIR=none sbatch slurm/sft_mma.sh --train.lr 1e-4     without PT, with flags of the trainer
#
# Call sbatch in the repository root. The same command resumes; a finished run ends at once.
#   RECIPE       shipped recipe or YAML file                    (demo_sft)
#   PT_RECIPE    the PT recipe, to find its run                 (demo_pt)
#   PT_RUN_DIR   finished run, checkpoint or exported model     (runs/<PT recipe>; none: the recipe's own start)
#   POLICY       mask policy, see `mma mask --help`             (mma)
#   RUN_DIR      run folder, on a file system all nodes share   (runs/<recipe>, or runs/<recipe>_<policy> but for mma)
#   EXTRA_FLAGS  more flags of the trainer, for slurm/chain.sh  (none)
#   DS_CONFIG    DeepSpeed configuration                        (ds_configs/zero3.json)
# Settings of your site are in slurm/env.sh, the log is slurm/logs/mma-sft-JOB.log.
# The 300 s of --signal must hold one step and one save: raise them where yours take longer. A start that outlives its
# limit is a TIMEOUT to Slurm and does not go back to the queue: sbatch again resumes from the newest checkpoint.
#SBATCH --job-name=mma-sft
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the repository root" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/sft_mma.sh
activate
recipe=${RECIPE:-demo_sft} policy=${POLICY:-mma}
pt_run=${PT_RUN_DIR:-runs/$(run_name "${PT_RECIPE:-demo_pt}")}
read -ra flags <<< "${EXTRA_FLAGS:-}"
if [ "$pt_run" != none ]; then
  need_finished PT_RUN_DIR "$pt_run"
  flags=(--init-from "$pt_run" "${flags[@]}")
fi
train "$recipe" "${RUN_DIR:-$(sft_run "$recipe" "$policy")}" --mask.policy "$policy" "${flags[@]}" "$@"
