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
#   sbatch --array=1-N [sbatch options] slurm/pretrain.sh --sweep FILE --config ... run.dir=SWEEP
#
# A sweep trains one run for each line of settings in FILE (sclong_ds/job/sweep.py), in SWEEP/task_N.
#
# Submit from the project root, or set SCLONG_HOME to it. Settings of the site: slurm/env.sh.
# All sbatch options above can be overridden on the command line.
#
# First the nodes are checked (sclong_ds/job/preflight.py): a bad one is named and nothing is trained.
# Then one srun starts one process per GPU, or one per node without GPUs (docs/operate/job.md: one `deepspeed`
# launcher per node instead).
#
# Before the time limit (USR1, 120 s ahead or as much as the last checkpoints took) and on preemption
# (TERM) every rank finishes its micro-batch, the run is saved and the job queues itself again; the
# next start of the job continues from there, in the same run folder and the same log, on as many nodes
# as it then gets: submit with --nodes=MIN-MAX, or `scontrol update JobId=J NumNodes=N` while it waits.
# Of nodes among whose ranks the batch cannot be shared out evenly it leaves the last ones idle.
#
# What is started again is decided in sclong_ds/job/restarts.py:
#   saved after a signal (75)                         yes
#   a rank was killed (137: out of memory, ...)       yes, when the run has made a step before
#   a device, network or disk failed a rank (71)      yes, when the run has made a step before
#   srun itself failed (69), here or in the check     yes, unless it refuses the step's options
#   a rank hung and the watchdog ended the run        yes, when the run has made a step before
#   a node failed                                     yes, Slurm does it by itself (--requeue)
#   the training reports its own error (1, 2)         no
#   preflight names bad nodes                         no; with SCLONG_EXCLUDE_BAD=1 yes, without them
# and none of it after SCLONG_MAX_STALLED starts in a row that made no new checkpoint. Where the job
# may not queue itself it ends with 75 instead, and slurm/resubmit.sh submits it again.
set -euo pipefail

readonly FORWARD_EVERY_S=5 ANSWER_S=180 SRUN_STATUS=69
# What srun says, in small letters, where the next start of the job may fare better.
readonly PASSING='contact|communication|connection|timed out|time out|not respond|busy|retrying|temporar|task launch|node fail|zero bytes|invalid job id|complet|expired|revoked'

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
  if [[ " $*" =~ " --sweep"[=\ ] ]]; then
    own=$(sweep_task "$@") || exit 2
    eval "set -- $own" # quoted for a shell
    echo "task $SLURM_ARRAY_TASK_ID of the sweep: $own"
  fi

  asked_to_stop=0
  trap 'asked_to_stop=1' USR1 TERM
  set_ranks
  nodes=$(restarts nodes --most "$SLURM_JOB_NUM_NODES" --ranks-per-node "$LOCAL_WORLD_SIZE" "$@")
  set_rendezvous
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NODELIST," \
    "$nodes x $LOCAL_WORLD_SIZE ranks of $cpus_per_rank CPUs," \
    "rendezvous $MASTER_ADDR:$MASTER_PORT"
  if ((nodes < SLURM_JOB_NUM_NODES)); then
    echo "only $nodes of $SLURM_JOB_NUM_NODES nodes are used: engine.train_batch_size cannot be shared" \
      "out evenly among the ranks of more"
  fi

  restarts begin "$@" || exit 1
  ask_in_time "$@" &
  asker=$!
  trap 'kill "$asker" 2>/dev/null || true' EXIT
  preflight "$@"
  launch sclong_ds.pretrain "$SCLONG_STRAGGLER_S" "$@" &
  wait_for_step $!
  finish "$status" "$@"
}

# Runs sclong_ds.job.restarts with a command, and with the training's arguments after that.
restarts() {
  # shellcheck disable=SC2086 # a command with its arguments
  $SCLONG_CONTAINER python -m sclong_ds.job.restarts "${@:1:1}" --max-stalled "$SCLONG_MAX_STALLED" \
    "${@:2}"
}

# Prints the arguments of this array task's training; checks those of all tasks.
sweep_task() {
  if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "error: --sweep FILE needs a job array: sbatch --array=1-N, N lines of settings in the file" >&2
    return 2
  fi
  # shellcheck disable=SC2086 # a command with its arguments
  $SCLONG_CONTAINER python -m sclong_ds.job.sweep --task "$SLURM_ARRAY_TASK_ID" \
    --last "$SLURM_ARRAY_TASK_MAX" "$@"
}

# Sets LOCAL_WORLD_SIZE (ranks per node) and cpus_per_rank from the allocation.
set_ranks() {
  local cpus
  LOCAL_WORLD_SIZE="${SCLONG_RANKS_PER_NODE:-$(gpus_on_node)}"
  if ((LOCAL_WORLD_SIZE < 1)); then LOCAL_WORLD_SIZE=1; fi
  if [[ -n ${SLURM_GPUS:-} && -z $SCLONG_RANKS_PER_NODE ]] &&
    (($(sum_of_counts "$SLURM_GPUS") != LOCAL_WORLD_SIZE * SLURM_JOB_NUM_NODES)); then
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
  SCLONG_GPUS_ON_NODE=$(gpus_on_node)
  export LOCAL_WORLD_SIZE SCLONG_GPUS_ON_NODE
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus_per_rank}"
}

# Prints the number of GPUs that the job has on this node. Slurm before 20.11 knows --gres alone, and
# says only which they are.
gpus_on_node() {
  local ids="${SLURM_JOB_GPUS:-${GPU_DEVICE_ORDINAL:-}}"
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    echo "$SLURM_GPUS_ON_NODE"
  else
    tr ',' '\n' <<<"$ids" | sed '/^$/d' | wc -l
  fi
}

# Prints the sum of counts like "4", "a100:4" or "a100:2,h100:2".
sum_of_counts() {
  echo "$(($(tr ',' '\n' <<<"$1" | sed 's/.*://' | paste -sd+ -)))"
}

# Sets SCLONG_NODES (the nodes to use), MASTER_ADDR (the first) and MASTER_PORT (from the job id, new in
# each start of the job).
set_rendezvous() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  hosts=("${hosts[@]:0:nodes}")
  MASTER_ADDR="${hosts[0]}"
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    # A node name need not be a host name; Slurm knows the address.
    MASTER_ADDR=$(field NodeAddr "$(patient scontrol show node --oneliner "${hosts[0]}")")
  fi
  # Below 32768, where Linux starts to hand out ports of its own.
  MASTER_PORT=$(free_port $((15000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 15000)))
  export MASTER_ADDR MASTER_PORT SCLONG_NODES="${hosts[*]}"
}

# Prints a port, or the next one that nobody has on this node, the job's first; after 15 of them the port
# itself, so that the training says what is wrong.
free_port() {
  # shellcheck disable=SC2086 # a command with its arguments
  $SCLONG_CONTAINER python -c 'import socket, sys
first = int(sys.argv[1])
for port in [*range(first, first + 15), first]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            break
        except OSError:
            continue
print(port)' "$1"
}

# Sends this script USR1 early enough before the time limit to save, where --signal comes too late: the
# run's checkpoints, or an extended limit, may say something else later on, so it looks again whenever
# half of the time is over, and soon where Slurm or the run folder gives no answer.
ask_in_time() {
  local job end left save_s pause="" self=$BASHPID
  trap '[[ -z $pause ]] || kill "$pause"; exit' TERM # a sleep of hours must not outlive the job
  while true; do
    left=60
    if job=$(show_job) && end=$(field EndTime "$job") && save_s=$(restarts seconds-to-save "$@"); then
      end=$(date --date="$end" +%s 2>/dev/null) || return 0 # no time limit
      left=$((end - $(date +%s) - save_s))
    fi
    if ((left <= 0)); then break; fi
    sleep $((left <= 60 ? left : left / 2)) &
    pause=$!
    wait "$pause"
  done
  if (($(ps -o ppid= "$self") != $$)); then return; fi # killed: $$ may be somebody else by now
  echo "asking the run to save: its checkpoints need it $save_s s before the time limit"
  kill -USR1 $$
}

# Checks the nodes; ends the job when one is bad. It has a port of its own: the training's is to be free.
preflight() {
  step=0
  if ((SCLONG_PREFLIGHT == 0)); then return; fi
  # The first rank may end at once, and another judge when it has waited for it; python starts in 60 s.
  MASTER_PORT=$(free_port $((MASTER_PORT + 15))) launch sclong_ds.job.preflight "$((SCLONG_PREFLIGHT + 60))" \
    --timeout-s "$SCLONG_PREFLIGHT" "$@" &
  wait_for_step $!
  step=1
  if ((status == 0 && asked_to_stop)); then finish 75 "$@"; fi
  if ((status == 0)); then return; fi
  if ((status == SRUN_STATUS)); then finish "$status" "$@"; fi
  if [[ $SCLONG_EXCLUDE_BAD == 1 && $SCLONG_REQUEUE == 1 ]]; then exclude_bad_nodes "$@"; fi
  exit "$status"
}

# Queues the job again, never to run on the nodes that preflight.json names.
exclude_bad_nodes() {
  local bad before job
  bad=$(restarts bad-nodes "$@") || return 0
  if [[ -z $bad ]]; then return; fi
  job=$(patient show_job) || return 0
  before=$(field ExcNodeList "$job")
  if [[ $before != "(null)" ]]; then bad="$before,$bad"; fi
  # Slurm changes this of waiting jobs only, and ends this script as soon as the job waits.
  trap '' TERM
  if requeue && scontrol update JobId="$(this_job)" ExcNodeList="$bad"; then
    echo "job $SLURM_JOB_ID is queued again without $bad"
  fi
}

# Prints how Slurm's commands name this job. The own id of an array's task may be that of the whole
# array, and a command with it would reach the other tasks as well.
this_job() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Prints Slurm's record of this job.
show_job() {
  scontrol show job --oneliner "$(this_job)"
}

# Prints one field of what show_job printed.
field() {
  [[ $2 =~ " $1="([^ ]*) ]] && echo "${BASH_REMATCH[1]}"
}

# Runs a command until it succeeds, for some minutes: a busy or restarted controller gives no answer.
patient() {
  local deadline=$((SECONDS + ANSWER_S))
  until "$@"; do
    if ((SECONDS >= deadline)); then return 1; fi
    sleep 10
  done
}

# Queues the job again. What Slurm refuses it refuses twice; what it did not hear it is told again.
requeue() {
  scontrol requeue "$(this_job)" || {
    patient show_job >/dev/null && scontrol requeue "$(this_job)"
  }
}

# Starts a module, one task per rank, in which the last ones get some seconds after the first has
# ended. The signals are ignored until python has installed its handlers: by default they would end
# the rank.
launch() {
  local module=$1 straggler_s=$2
  shift 2
  # shellcheck disable=SC2016 # the variables are those of the tasks
  as_step --wait="$straggler_s" bash -c 'trap "" USR1 TERM
      export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
      exec $SCLONG_CONTAINER python -u -m "$0" "$@"' "$module" "$@"
}

# Becomes srun with one task per rank; to be called in a process of its own, with more options and the
# command, and with `most_s` where it may take so many seconds at most. kill-on-bad-exit stays off: 75 is
# not a failure, and the rank that ends first with it must not take the one that still writes along;
# --wait ends the ranks of a dead run.
# srun must not read what the job asked for per task and GPU, which may be another layout: each task is
# to see all GPUs of its node. Nor what leaked into the job from one that it was submitted in (salloc, a
# notebook on a node): how its tasks were bound, distributed, given memory and time, where they ran and
# wrote. (--gpu-bind=none is no way to that: Slurm before 21.08 does not know it, and 22.05 then leaves
# CUDA_VISIBLE_DEVICES unset.)
as_step() {
  local gpus="" name
  for name in $(compgen -A export SLURM_; compgen -A export SRUN_); do
    case $name in
      SLURM_CPU_BIND* | SLURM_MEM_BIND* | SLURM_MEM_PER_* | SLURM_DISTRIBUTION | SLURM_DIST_* | \
        SLURM_CPU_FREQ_REQ | SLURM_HINT | SLURM_HOSTFILE | SLURM_ARBITRARY_NODELIST | \
        SLURM_EXACT | SLURM_EXCLUSIVE | SLURM_OVERLAP | SLURM_OVERCOMMIT | SLURM_SPREAD_JOB | \
        SLURM_USE_MIN_NODES | SLURM_RELATIVE | SLURM_CORE_SPEC | SLURM_THREAD_SPEC | SLURM_THREADS | \
        SLURM_THREADS_PER_CORE | SLURM_NCORES_PER_SOCKET | SLURM_NSOCKETS_PER_NODE | \
        SLURM_NTASKS_PER_* | SLURM_CPUS_PER_TASK | SLURM_CPUS_PER_GPU | SRUN_CPUS_PER_TASK | \
        SLURM_GPUS | SLURM_GPUS_PER_* | SLURM_GPU_BIND | SLURM_GPU_FREQ | SLURM_GRES | \
        SLURM_GRES_FLAGS | SLURM_TRES_* | SLURM_CONSTRAINT | SLURM_CLUSTERS | \
        SLURM_CLUSTER_CONSTRAINT | SLURM_TIMELIMIT | SLURM_IMMEDIATE | SLURM_EXIT_IMMEDIATE | \
        SLURM_TEST_EXEC | SLURM_WAIT | SLURM_KILL_BAD_EXIT | SLURM_EXPORT_ENV | SRUN_EXPORT_ENV | \
        SLURM_OPEN_MODE | SLURM_STD*MODE | SRUN_INPUT | SRUN_OUTPUT | SRUN_ERROR | SLURM_LABELIO | \
        SLURM_WORKING_DIR | SLURM_REMOTE_CWD | SLURM_STEP_*) unset "$name" ;;
    esac
  done
  if ((SCLONG_GPUS_ON_NODE)); then gpus="--gres=gpu:$SCLONG_GPUS_ON_NODE"; fi
  export SLURM_EXIT_ERROR=$SRUN_STATUS
  # shellcheck disable=SC2086 # an option or none
  exec ${most_s:+timeout -k 10 "$most_s"} srun --export=ALL --nodes="$nodes" \
    --nodelist="${SCLONG_NODES// /,}" \
    --ntasks="$((nodes * LOCAL_WORLD_SIZE))" --ntasks-per-node="$LOCAL_WORLD_SIZE" \
    --cpus-per-task="$cpus_per_rank" $gpus --kill-on-bad-exit=0 "$@"
}

# After what may be an error of srun itself: prints why Slurm refuses a step of these options whatever it runs, or
# nothing. A refusal comes again at once, from a controller that answers; a controller that was away, a
# busy or a failed node may be well at the next start of the job.
refusal() {
  local said="" code
  for _ in 1 2; do
    patient show_job >/dev/null || return 0
    # It begins within half a minute, or nodes are busy. It does not end on a node that hangs (124, 137).
    code=0
    said=$(most_s=$ANSWER_S as_step --immediate=30 true 2>&1 >/dev/null) || code=$?
    if ((code == 0 || code == 124 || code == 137)) || [[ ${said,,} =~ $PASSING ]]; then return 0; fi
    sleep "$FORWARD_EVERY_S"
  done
  grep -m 1 -E '^srun: (error|fatal|unrecognized|invalid)' <<<"$said" || sed -n 1p <<<"$said"
}

# Waits until the step has really ended and sets `status` and `refused`. A trapped signal ends bash's `wait` early;
# it goes to the tasks through Slurm, again and again, since one that comes before python is ready
# is lost. Signals never go to srun itself: it would abort the step and kill the tasks.
wait_for_step() {
  local pid=$1 pause
  while kill -0 "$pid" 2>/dev/null; do
    if ((asked_to_stop)); then
      # scancel fails when the step has not begun or has just ended: the next round sees which.
      scancel --signal=USR1 "$(this_job).$step" || true
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
  refused=""
  # Of options that it cannot read srun says 255 or 1, as its tasks may.
  if ((!asked_to_stop && (status == SRUN_STATUS || status == 255 || status == 1))); then
    refused=$(refusal)
    if [[ -n $refused ]]; then status=$SRUN_STATUS; fi
  fi
}

# Ends the job with the training's exit status, or queues it again. Where it is to be started again but
# cannot queue itself, it ends with 75.
finish() {
  local ended=$1 job state starts
  shift
  if ((ended == 0)); then exit 0; fi
  restarts end --status "$ended" --refused "${refused:-}" "$@" || exit "$ended"
  job=$(patient show_job) || job=""
  state=$(field JobState "$job") || state=unknown
  starts=$(field Restarts "$job") || starts=0
  if ((starts > ${SLURM_RESTART_COUNT:-0})); then
    echo "Slurm queues job $SLURM_JOB_ID again"
  elif [[ $state =~ CANCELLED|COMPLET|PREEMPTED|TIMEOUT|DEADLINE|FAIL|OUT_OF_MEMORY|REVOKED ]]; then
    # A user's scancel also reaches the ranks as TERM: it must not bring the job back.
    echo "job $SLURM_JOB_ID was ended ($state): submit the same command to continue"
  elif [[ $SCLONG_REQUEUE != 1 ]]; then
    echo "exit 75 (SCLONG_REQUEUE=$SCLONG_REQUEUE): submit the same command to continue"
  elif requeue; then
    echo "job $SLURM_JOB_ID is queued again"
  else
    echo "exit 75, Slurm refused to queue the job again: submit the same command to continue"
  fi
  exit 75
}

main "$@"
