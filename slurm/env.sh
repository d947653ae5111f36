# shellcheck shell=bash
# Settings of your site, read by every script in this folder, on the login node and inside jobs.
#
# A plain cluster needs no settings. Set the values of your site here; variables in the environment take precedence:
#     TRAIN_SBATCH="--nodes=4 --time=48:00:00" slurm/chain.sh
# sbatch itself reads SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, ... and prefers them to the #SBATCH lines of a
# script, so `. slurm/env.sh && sbatch slurm/pt.sh` and `slurm/chain.sh` both use what is exported here.
# The scripts take their options (RECIPE, RUN_DIR, ...) from the environment: if your site sets SBATCH_EXPORT=NONE, call
# sbatch with --export=ALL, as slurm/chain.sh does.

# Account and partition: uncomment what your site requires.
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_project}
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}

# sbatch options for the jobs of slurm/chain.sh; they override the #SBATCH lines of the scripts.
: "${TRAIN_SBATCH:=}" # PT and SFT, e.g. "--nodes=4 --gpus-per-node=4 --time=48:00:00"
: "${DATA_SBATCH:=}"  # data preparation, e.g. "--partition=cpu --cpus-per-task=32"
: "${EVAL_SBATCH:=}"  # export and evaluation, e.g. "--partition=debug"

# Software: modules to load in jobs, and the virtual environment (ignored if it does not exist).
: "${MODULES:=}" # e.g. "cuda/12.8 gcc/13"
: "${VENV:=.venv}"

# Training processes per node: one per GPU of the job, or one on a node without GPUs.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
# Maximum number of times a job is requeued, after its time limit or a lost node, before it fails.
: "${MAX_RESTARTS:=20}"
# After a failure, seconds a node has to start a process before it counts as lost.
: "${NODE_PATIENCE:=60}"
# Test the nodes of a job before its first step; "no" saves half a minute on trusted nodes.
: "${CHECK_NODES:=yes}"

# NCCL finds its network on most clusters. If it picks the wrong interface, set the right one for both libraries.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
