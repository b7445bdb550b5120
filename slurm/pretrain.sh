#!/usr/bin/env bash
#SBATCH --job-name=sclong-pretrain
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Pretrains a model on any number of nodes, with one srun and without ssh.
#
#   sbatch [sbatch options] slurm/pretrain.sh --config PRESET|FILE [key=value ...]
#   sbatch --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=12 --time=24:00:00 \
#     slurm/pretrain.sh --config sclong_1b data.corpus=CORPUS model.gene_graph=GRAPH run.dir=RUN
#
# Submit from the project root, or set SCLONG_HOME to it. Settings of the site: slurm/env.sh.
# All sbatch options above can be overridden on the command line.
#
# Before the time limit (USR1, 120 s ahead) and on preemption (TERM) every rank finishes its step, the
# run is saved and the job queues itself again; the next life of the job continues from there, in the
# same run folder and the same log. Any other exit status of the training is the job's own.
set -euo pipefail

readonly REQUEUE_STATUS=75 # sclong_ds.pretrain: saved because of a signal, wants to be started again
readonly FORWARD_EVERY_S=10

main() {
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: not in a Slurm job: submit with 'sbatch slurm/pretrain.sh --config PRESET|FILE'" >&2
    exit 2
  fi
  root="${SCLONG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
  if [[ ! -f $root/slurm/env.sh ]]; then
    echo "error: $root is not the project: submit from its root, or set SCLONG_HOME" >&2
    exit 2
  fi
  if (($# == 0)); then
    echo "error: no arguments: sbatch slurm/pretrain.sh --config PRESET|FILE [key=value ...]" >&2
    exit 2
  fi
  # shellcheck source-path=SCRIPTDIR source=env.sh
  source "$root/slurm/env.sh"

  set_ranks
  set_rendezvous
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NODELIST," \
    "$SLURM_JOB_NUM_NODES x $LOCAL_WORLD_SIZE ranks of $cpus_per_rank CPUs," \
    "rendezvous $MASTER_ADDR:$MASTER_PORT"

  asked_to_stop=0
  trap 'asked_to_stop=1' USR1 TERM
  launch "$@" &
  wait_for_step $!
  finish "$status"
}

# Sets LOCAL_WORLD_SIZE (ranks per node) and cpus_per_rank from the allocation.
set_ranks() {
  local cpus
  LOCAL_WORLD_SIZE="${SCLONG_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
  if ((LOCAL_WORLD_SIZE < 1)); then LOCAL_WORLD_SIZE=1; fi
  if [[ -n ${SLURM_GPUS:-} && -z $SCLONG_RANKS_PER_NODE ]] &&
    ((${SLURM_GPUS##*:} != LOCAL_WORLD_SIZE * SLURM_JOB_NUM_NODES)); then
    echo "error: $SLURM_GPUS GPUs are spread unevenly over $SLURM_JOB_NUM_NODES nodes:" \
      "ask with --gpus-per-node" >&2
    exit 2
  fi
  # "48(x2),24" is two nodes of 48 and one of 24; the smallest node decides.
  cpus=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)
  cpus_per_rank=$((cpus / LOCAL_WORLD_SIZE))
  if ((cpus_per_rank < 1)); then
    echo "error: $LOCAL_WORLD_SIZE ranks per node, but only $cpus CPUs per node:" \
      "ask with --ntasks-per-node and --cpus-per-task" >&2
    exit 2
  fi
  # LOCAL_SIZE is DeepSpeed's name: its shared-memory path must know that not all ranks are local.
  export LOCAL_WORLD_SIZE LOCAL_SIZE=$LOCAL_WORLD_SIZE
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus_per_rank}"
}

# Sets MASTER_ADDR (the first node) and MASTER_PORT (from the job id, new in each life of the job).
set_rendezvous() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR="${hosts[0]}"
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    # A node name need not be a host name; Slurm knows the address.
    MASTER_ADDR=$(scontrol show node --oneliner "${hosts[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  fi
  # Below 32768, where Linux starts to hand out ports of its own.
  MASTER_PORT=$((15000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 15000))
  export MASTER_ADDR MASTER_PORT
}

# Starts one task per rank. kill-on-bad-exit stays off: 75 is not a failure, and the rank that ends
# first with it must not take the one that still writes along; --wait ends the ranks of a dead run.
# USR1 is ignored until python has installed its handler: by default it would end the rank.
# srun must not read the job's own CPU request, which may be for another number of tasks.
launch() {
  unset SLURM_CPUS_PER_TASK
  if [[ ${SLURM_TRES_PER_TASK:-} != *gpu* ]]; then unset SLURM_TRES_PER_TASK; fi
  # shellcheck disable=SC2016 # the variables are those of the tasks
  exec srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" \
    --ntasks="$((SLURM_JOB_NUM_NODES * LOCAL_WORLD_SIZE))" --ntasks-per-node="$LOCAL_WORLD_SIZE" \
    --cpus-per-task="$cpus_per_rank" --gpu-bind=none \
    --kill-on-bad-exit=0 --wait="$SCLONG_STRAGGLER_S" \
    bash -c 'trap "" USR1
      export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
      exec $SCLONG_CONTAINER python -u -m sclong_ds.pretrain "$@"' pretrain "$@"
}

# Waits until the step has really ended and sets `status`. A trapped signal ends bash's `wait` early;
# it goes to the tasks through Slurm, again and again, since one that comes before python is ready
# is lost. Signals never go to srun itself: it would abort the step and kill the tasks.
wait_for_step() {
  local pid=$1 pause
  while kill -0 "$pid" 2>/dev/null; do
    if ((asked_to_stop)); then
      # scancel fails when the step has not begun or has just ended: the next round sees which.
      scancel --signal=USR1 "$SLURM_JOB_ID.0" || true
      sleep "$FORWARD_EVERY_S" &
      pause=$!
      wait -n "$pid" "$pause" || true
      kill "$pause" 2>/dev/null || true
    else
      wait "$pid" || true
    fi
  done
  status=0
  wait "$pid" || status=$? # bash keeps the status of a child that has ended
}

# Ends the job with the training's exit status, or queues it again.
finish() {
  local state
  if (($1 != REQUEUE_STATUS)); then exit "$1"; fi
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
  if [[ $SCLONG_REQUEUE != 1 ]]; then
    echo "saved; exit $1 (SCLONG_REQUEUE=$SCLONG_REQUEUE): submit the same command to continue"
  elif [[ $state != RUNNING ]]; then
    # A user's scancel also reaches the ranks as TERM: it must not bring the job back.
    echo "saved; Slurm ends the job ($state), it is not queued again: submit the same command to continue"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "saved; job $SLURM_JOB_ID is queued again"
  else
    echo "saved; Slurm refused to queue the job again: submit the same command to continue" >&2
  fi
  exit "$1"
}

main "$@"
