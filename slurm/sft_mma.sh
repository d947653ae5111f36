#!/usr/bin/env bash
# Instruction tuning (SFT) with Modality-Mutual Attention from a finished PT run: one job that trains to the end.
#
#   sbatch slurm/sft_mma.sh                                     the built-in demo, from runs/demo_pt
#   RECIPE=aki_4b_sft PT_RUN_DIR=runs/aki_4b_pt sbatch --nodes=4 slurm/sft_mma.sh
#   POLICY=causal sbatch slurm/sft_mma.sh                       another mask policy, for comparison
#   PT_RUN_DIR=none sbatch slurm/sft_mma.sh --train.lr 1e-4     without PT, with trainer flags
#
# Call sbatch in the folder that contains slurm/. The same command resumes; for a finished run it exits at once.
#   RECIPE       shipped recipe or YAML file                    (demo_sft)
#   PT_RECIPE    PT recipe, used to find its run                (demo_pt)
#   PT_RUN_DIR   finished run, checkpoint or exported model     (runs/<PT recipe>; none: the recipe's own init_from)
#   POLICY       mask policy, see `mma mask --help`             (mma)
#   RUN_DIR      run folder, on a file system shared by all nodes (runs/<recipe>; other policies: runs/<recipe>_<policy>)
#   EXTRA_FLAGS  more trainer flags, for slurm/chain.sh         (none)
#   DS_CONFIG    DeepSpeed file: zero1, zero2, zero3, ... or a path (zero3)
# Set your site's options in slurm/env.sh. Log: slurm/logs/mma-sft-JOB.log.
# The 300 s of --signal must cover one step and one save: raise it if yours take longer. A job that exceeds its time
# limit (TIMEOUT) is not requeued: sbatch again to resume from the newest checkpoint.
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
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the folder that contains slurm/" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/sft_mma.sh
activate
recipe=${RECIPE:-demo_sft} policy=${POLICY:-mma}
pt_run=${PT_RUN_DIR:-runs/$(run_name "${PT_RECIPE:-demo_pt}")}
split EXTRA_FLAGS
flags=("${words[@]}")
if [ "$pt_run" != none ]; then
  need_finished PT_RUN_DIR "$pt_run"
  flags=(--init-from "$pt_run" "${flags[@]}")
fi
train "$recipe" "${RUN_DIR:-$(sft_run "$recipe" "$policy")}" --mask.policy "$policy" "${flags[@]}" "$@"
