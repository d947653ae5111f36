#!/usr/bin/env bash
# Data preparation: raw corpora -> packs, for one mma-prep recipe. In an array job each task ingests its share; a plain
# job does all remaining work and writes the packs.
#
#   sbatch slurm/data_prep.sh                                   draw and pack the built-in demo
#   RECIPE=aki_pt sbatch slurm/data_prep.sh                     all steps in one job
#   job=$(RECIPE=aki_pt sbatch --parsable --array=0-63 slurm/data_prep.sh)
#   RECIPE=aki_pt sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes slurm/data_prep.sh
#                                                               64 shares, then plan and packs (slurm/chain.sh --shards)
#   RECIPE=aki_pt SHARES=64 sbatch --array=3,17 slurm/data_prep.sh
#                                                               repeat two of the 64 shares
#
# Call sbatch in the folder that contains slurm/. The same command resumes; finished shards are kept, also those of
# failed tasks.
#   RECIPE      shipped recipe or YAML file                     (demo)
#   SHARES      number of shares the array divides the work into (the size of the array, which must then be 0-N)
#   DATA_FLAGS  more flags of mma-prep, e.g. "--out /big/aki"   (none)
# Set your site's options in slurm/env.sh. Log of each job or task: slurm/logs/mma-data-JOB.log.
#SBATCH --job-name=mma-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
[ -f slurm/lib.sh ] || { echo "error: call sbatch in the folder that contains slurm/" >&2 && exit 2; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh || exit 2
need_job slurm/data_prep.sh
activate
recipe=${RECIPE:-demo}
split DATA_FLAGS
flags=(--workers "${SLURM_CPUS_PER_TASK:-1}" "${words[@]}")
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  say "all remaining work of $recipe"
  if [ "$recipe" = demo ]; then mma-prep demo data/demo "${flags[@]}"; else mma-prep run "$recipe" "${flags[@]}"; fi
elif [ "$recipe" = demo ]; then
  say "the demo is not ingested in shares; the job after this array makes it"
else
  share=$(share_of_array)
  say "share $share of $recipe"
  mma-prep ingest "$recipe" --shard "$share" "${flags[@]}"
fi
