#!/usr/bin/env bash
#SBATCH --job-name=sclong-gene-graph
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#
# Builds the Gene Ontology graph of the gene encoder (CPU).
#
#   sbatch [sbatch options] slurm/gene_graph.sh --obo F --associations F --genes F --out graph.npz
#
# The arguments are those of `python -m data_prep gene-graph`. Submit from the project root, or set
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
exec $SCLONG_CONTAINER python -m data_prep gene-graph "$@"
