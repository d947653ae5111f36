# shellcheck shell=bash
# Settings of your site, read by every script in this folder, on the login node and inside jobs.
#
# On a plain cluster nothing needs to be set. What your site wants is set here once, or in the environment, which wins:
#     TRAIN_SBATCH="--nodes=4 --time=48:00:00" slurm/chain.sh
# Slurm reads SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, ... by itself and prefers them to what a script asks for, so
# `. slurm/env.sh && sbatch slurm/pt.sh` and `slurm/chain.sh` both follow what is exported here.
# What the scripts are told (RECIPE, RUN_DIR, ...) travels as variables: where your site sets SBATCH_EXPORT=NONE, call
# sbatch with --export=ALL, as slurm/chain.sh does.

# Who pays, and where jobs run: uncomment what your site asks for.
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_project}
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}

# Options of sbatch for the jobs of slurm/chain.sh; they win over the #SBATCH lines of the scripts.
: "${TRAIN_SBATCH:=}" # PT and SFT, e.g. "--nodes=4 --gpus-per-node=4 --time=48:00:00"
: "${DATA_SBATCH:=}"  # data preparation, e.g. "--partition=cpu --cpus-per-task=32"
: "${EVAL_SBATCH:=}"  # export and evaluation, e.g. "--partition=debug"

# Software: modules to load in jobs, and the virtual environment (left alone where there is none).
: "${MODULES:=}" # e.g. "cuda/12.8 gcc/13"
: "${VENV:=.venv}"

# Training processes of a node: one per GPU that Slurm gave the job, or one where it gave none.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
# How often a job goes back to the queue, by its time limit or by a lost node, before it ends as failed.
: "${MAX_RESTARTS:=20}"
# How many seconds a node has to start a process, once a job has failed, before it counts as lost.
: "${NODE_PATIENCE:=60}"
# Test the nodes of a job before its first step ("no" saves half a minute on nodes that you trust).
: "${CHECK_NODES:=yes}"

# NCCL finds its network on most clusters; where it picks a wrong interface, name the right one for both libraries.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
