#!/usr/bin/env bash
#SBATCH --job-name=sclong-embed
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#
# Embeds the cells of one input with an exported model (one GPU where the job has one, else CPU).
#
#   sbatch --gpus=1 [sbatch options] slurm/embed.sh MODEL_DIR INPUT --out OUT.h5ad [options]
#
# The arguments are those of `python -m sclong_ds embed`. Submit from the project root, or set
# SCLONG_HOME to it. Settings of the site: slurm/env.sh.
set -euo pipefail

root="${SCLONG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f $root/slurm/env.sh ]]; then
  echo "error: $root is not the project: submit from its root, or set SCLONG_HOME" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$root/slurm/env.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# shellcheck disable=SC2086 # a command with its arguments
exec $SCLONG_CONTAINER python -m sclong_ds embed "$@"
