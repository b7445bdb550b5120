#!/usr/bin/env bash
#SBATCH --job-name=sclong-data-prep
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#
# Runs one `python -m data_prep` command; `convert`, `finalize` and `compact` are shared out over the tasks of a
# job array.
#
#   sbatch --array=0-63 [sbatch options] slurm/data_prep.sh convert MANIFEST --out CORPUS [options]
#   sbatch --array=0-63 [sbatch options] slurm/data_prep.sh finalize CORPUS [options]
#   sbatch [sbatch options] slurm/data_prep.sh verify CORPUS
#
# Submit from the project root, or set SCLONG_HOME to it. Settings of the site: slurm/env.sh.
# Task I of N takes the datasets, and row ranges of large ones, that data_prep gives it (--task I
# --tasks N): the largest first, evenly by size. A task that is started again skips what is done. `convert` fails where a dataset failed, so after it use
# --dependency=afterany, look at `python -m data_prep status CORPUS`, or correct and submit again.
# Tasks of `finalize` do what no other one is at, whether all of them run or a few: one that begins
# late finds the corpus finished. Their locks must hold between nodes (NFS 4; Lustre mounted with flock,
# not localflock). Without --array it runs as one job, --jobs N processes at a time, and needs none.
set -euo pipefail

main() {
  if (($# == 0)); then
    echo "error: no command: sbatch slurm/data_prep.sh convert|finalize|verify|status ..." >&2
    exit 2
  fi
  root="${SCLONG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
  if [[ ! -f $root/slurm/env.sh ]]; then
    echo "error: $root is not the project: submit from its root, or set SCLONG_HOME" >&2
    exit 2
  fi
  # shellcheck source-path=SCRIPTDIR source=env.sh
  source "$root/slurm/env.sh"
  # numpy's own threads would only compete with each other: a task works on one dataset at a time.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

  share=()
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then set_share "$1"; fi
  # shellcheck disable=SC2086 # a command with its arguments
  exec $SCLONG_CONTAINER python -m data_prep "$@" "${share[@]}"
}

# Sets `share`, the part of the work that this array task takes.
set_share() {
  # shellcheck disable=SC2153 # Slurm sets all of them
  local span=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN))
  if [[ $1 != convert && $1 != finalize && $1 != compact ]]; then
    echo "error: --array is for 'convert', 'finalize' and 'compact'; '$1' runs as one job" >&2
    exit 2
  fi
  if ((span + 1 != SLURM_ARRAY_TASK_COUNT)); then
    # With holes no task could know its place, and the datasets of a missing one would be left out.
    echo "error: the array has $SLURM_ARRAY_TASK_COUNT tasks between $SLURM_ARRAY_TASK_MIN and" \
      "$SLURM_ARRAY_TASK_MAX: use --array=FIRST-LAST without gaps" >&2
    exit 2
  fi
  share=(--task "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" --tasks "$SLURM_ARRAY_TASK_COUNT")
  echo "array job $SLURM_ARRAY_JOB_ID: task ${share[1]} of ${share[3]} on $SLURMD_NODENAME"
}

main "$@"
