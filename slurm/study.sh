#!/usr/bin/env bash
# Makes the runs of a study. Every task of the array takes the next run that is ready and that no other task makes.
#
#   sbatch --array=0-15 slurm/study.sh masks_nlvr
#   sbatch --array=0-15 slurm/study.sh my_study.yaml --arms causal,mma
#   mma study run masks_nlvr --slurm 16                          the same
#
# Call sbatch in the folder that contains slurm/. The same command continues; finished runs are skipped. A task trains
# one run at a time, with the ranks that the study file names, on one node. The study's folder must be on a file system
# that all nodes share and that has file locks. A task that reaches its time limit is requeued and resumes its run from
# the newest checkpoint.
# Set your site's options in slurm/env.sh. Logs: slurm/logs/mma-study-JOB_TASK.log, and OUT/logs of the study.
#SBATCH --job-name=mma-study
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the folder that contains slurm/" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/study.sh
[ $# -gt 0 ] || refuse "name a study: sbatch --array=0-15 slurm/study.sh masks_nlvr"
activate
say "task ${SLURM_ARRAY_TASK_ID:-0} of $*"
mma study run "$@" &
work=$!
# Near the time limit: end the work, which resumes from its checkpoints, and go back into the queue.
trap 'say "time limit near: requeued"; kill -TERM "$work"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
wait "$work"
