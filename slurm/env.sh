# shellcheck shell=bash
# Site settings of every Slurm job in this folder, and the environment the jobs run in.
#
# Edit the defaults below for your cluster, or leave the file alone and pass values at submission:
#   sbatch --export=ALL,SCLONG_VENV=/path/to/venv slurm/pretrain.sh ...
# A value from the environment wins over this file, and every setting is optional.
# Account, partition and the like are Slurm's own: `export SBATCH_ACCOUNT=... SBATCH_PARTITION=...`
# in the login shell, or sbatch options.
#
# Sourced by the job scripts, which set `root` (the checkout). Exports PATH, PYTHONPATH and what is
# below; every rank inherits it from the batch script.

# Environment with requirements.txt installed: a venv, by default the one `make setup` creates.
: "${SCLONG_VENV:=$root/.venv}"
# Names for `module load`, separated by spaces (for instance "cuda/12.8 gcc/13").
: "${SCLONG_MODULES:=}"
# Command that runs its arguments in a container (for instance "apptainer exec --nv sclong.sif");
# python is then the container's, and SCLONG_VENV is not used.
: "${SCLONG_CONTAINER:=}"
# Folder for compiled kernels and extensions, best on each node's own disk; empty: the libraries'
# defaults in the home folder.
: "${SCLONG_SCRATCH:=}"
# Ranks on each node; empty: one per GPU, or one on a node without GPUs.
: "${SCLONG_RANKS_PER_NODE:=}"
# 1: a job that was asked to stop, or lost a rank, queues itself again. 0: it exits with 75, or the
# status of the lost rank, and an outer loop does so.
: "${SCLONG_REQUEUE:=1}"
# Seconds that the last ranks get after the first one has ended, whether well or badly.
: "${SCLONG_STRAGGLER_S:=300}"
# Starts in a row of one job without a new checkpoint, after which it is not queued again.
: "${SCLONG_MAX_STALLED:=3}"
# Seconds that every node gets to answer the check before training; 0: no check.
: "${SCLONG_PREFLIGHT:=120}"
# 1: when the check names bad nodes, the job queues itself again without them. 0: it ends.
: "${SCLONG_EXCLUDE_BAD:=0}"
# MLflow server or store; empty: a file beside the run folder.
: "${MLFLOW_TRACKING_URI:=}"
# Network of NCCL (GPUs) and gloo (CPUs); empty: they choose themselves.
: "${NCCL_SOCKET_IFNAME:=}"
: "${GLOO_SOCKET_IFNAME:=}"

if [[ -n $SCLONG_MODULES ]]; then
  if ! command -v module >/dev/null; then
    echo "error: SCLONG_MODULES='$SCLONG_MODULES', but this node has no 'module' command" >&2
    exit 2
  fi
  set +u # module files read variables that may be unset
  # shellcheck disable=SC2086 # a list of names
  module load $SCLONG_MODULES
  set -u
fi

if [[ -z $SCLONG_CONTAINER && -d $SCLONG_VENV ]]; then
  export VIRTUAL_ENV="$SCLONG_VENV" PATH="$SCLONG_VENV/bin:$PATH"
fi
if [[ -z $SCLONG_CONTAINER ]] && ! command -v python >/dev/null; then
  echo "error: no python: $SCLONG_VENV does not exist (make setup creates it); or set SCLONG_VENV," \
    "SCLONG_MODULES or SCLONG_CONTAINER" >&2
  exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n $SCLONG_SCRATCH ]]; then
  export TRITON_CACHE_DIR="$SCLONG_SCRATCH/triton" TORCH_EXTENSIONS_DIR="$SCLONG_SCRATCH/torch"
fi
# An empty value is not "unset" to the programs that read these.
for name in MLFLOW_TRACKING_URI NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
  if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done
export SCLONG_CONTAINER
