#!/bin/bash
# One shard of a study for each task of the array:   sbatch slurm.sh my-study.yaml
# When all have ended:   sbatch --dependency=afterany:JOBID --wrap 'dpguard merge reports/my-study reports/shards/*'
#SBATCH --job-name=dpguard
#SBATCH --array=0-7
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

study=${1:?the study file}
shards=${SHARDS:-reports/shards}              # a folder that every node sees
index=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))
count=${SLURM_ARRAY_TASK_COUNT:-1}

# run again (by --requeue or by hand) it does only what is missing
exec dpguard run "$study" --shard "$index/$count" --out "$shards/$index" --workers "${SLURM_CPUS_PER_TASK:-1}"
