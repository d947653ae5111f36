#!/usr/bin/env bash
# Pre-training (PT): one job that trains a recipe to the end, across time limits and lost nodes.
#
#   sbatch slurm/pt.sh                                          the built-in demo on one node
#   RECIPE=aki_4b_pt sbatch --nodes=4 slurm/pt.sh               a shipped recipe on four nodes
#   RECIPE=my_pt.yaml sbatch slurm/pt.sh --train.lr 1e-4        your own recipe, with trainer flags
#
# Call sbatch in the folder that contains slurm/. The same command resumes; for a finished run it exits at once.
#   RECIPE       shipped recipe or YAML file                    (demo_pt)
#   RUN_DIR      run folder, on a file system shared by all nodes (runs/<recipe>)
#   INIT_FROM    initialize the weights from another run        (the recipe's)
#   EXTRA_FLAGS  more trainer flags, for slurm/chain.sh         (none)
#   DS_CONFIG    DeepSpeed file: zero1, zero2, zero3, ... or a path (zero3)
# Set your site's options in slurm/env.sh. Log: slurm/logs/mma-pt-JOB.log.
# The 300 s of --signal must cover one step and one save: raise it if yours take longer. A job that exceeds its time
# limit (TIMEOUT) is not requeued: sbatch again to resume from the newest checkpoint.
#SBATCH --job-name=mma-pt
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
need_job slurm/pt.sh
activate
recipe=${RECIPE:-demo_pt}
split EXTRA_FLAGS
flags=("${words[@]}")
if [ -n "${INIT_FROM:-}" ]; then
  need_finished INIT_FROM "$INIT_FROM"
  flags=(--init-from "$INIT_FROM" "${flags[@]}")
fi
train "$recipe" "${RUN_DIR:-runs/$(run_name "$recipe")}" "${flags[@]}" "$@"
