#!/usr/bin/env bash
#
# Submits a training again and again until it is done, where a job may not queue itself again
# (sbatch --no-requeue, JobRequeue=0 of the cluster, or SCLONG_REQUEUE=0).
# Runs on the login node, from the project root, in tmux or the like, for as long as the training does:
#
#   bash slurm/resubmit.sh [sbatch options] slurm/pretrain.sh --config PRESET|FILE [key=value ...]
#
# Each job is a new one that continues in the same run folder; all append to one log,
# sclong-pretrain-CHAIN.out, unless --output says otherwise. A job that ended with status 75, lost a
# node, was preempted or out of time, is submitted again; SCLONG_MAX_STALLED counts over them all. Ends
# with the status of the last job. Interrupting this script leaves the job that runs alone.
set -euo pipefail

main() {
  local id status state
  if (($# == 0)); then
    echo "error: no job: bash slurm/resubmit.sh [sbatch options] slurm/pretrain.sh --config ..." >&2
    exit 2
  fi
  # Tells sclong_ds.job.restarts that these jobs are starts of one training.
  SCLONG_CHAIN="$(date +%Y%m%d-%H%M%S)-$$"
  export SCLONG_CHAIN SCLONG_REQUEUE=0
  while true; do
    status=0
    id=$(sbatch --parsable --wait --no-requeue --open-mode=append \
      --output="sclong-pretrain-$SCLONG_CHAIN.out" "$@" | tee /dev/stderr) || status=$?
    if [[ -z $id ]]; then exit "$status"; fi # sbatch has printed why
    until state=$(job_state "${id%%;*}") && [[ $state != COMPLETING ]]; do
      sleep 2 # a node still ends what the job has left there
    done
    echo "job $id: $state, status $status" >&2
    case $state in
      NODE_FAIL | PREEMPTED | BOOT_FAIL | TIMEOUT) ;;
      *) if ((status != 75)); then exit "$status"; fi ;;
    esac
  done
}

# Prints the state of a job; "unknown" when Slurm does not say, asked for some minutes.
job_state() {
  local job deadline=$((SECONDS + 180))
  until job=$(scontrol show job --oneliner "$1"); do
    if ((SECONDS >= deadline)); then break; fi
    sleep 10
  done
  if [[ $job =~ " JobState="([^ ]*) ]]; then echo "${BASH_REMATCH[1]}"; else echo unknown; fi
}

main "$@"
