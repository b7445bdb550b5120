# shellcheck shell=bash
# Site settings of every Slurm job in this folder, and the environment the jobs run in.
#
# Edit the defaults below for your cluster, or leave the file alone and set values in the shell or at
# submission (`sbatch --export=ALL,SCLONG_VENV=/path/to/venv ...`): a value from the environment wins
# over this file. Every setting is optional.
#
# On the login node, `source slurm/env.sh` (bash): sbatch takes account and partition from it, and
# python is the project's. The job scripts source it too. Sets `root`, the checkout; exports PATH,
# PYTHONPATH and what is below; every rank inherits it from the batch script.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --- for sbatch, where this file was sourced in the shell that submits ---
# Account, partition and quality of service of all jobs; sbatch options win over them.
: "${SBATCH_ACCOUNT:=}"
: "${SBATCH_PARTITION:=}"
: "${SBATCH_QOS:=}"

# --- software ---
# Environment with requirements.txt installed: a venv, by default the one `make setup` creates. Where
# that does not exist, python is the one of SCLONG_MODULES or of the PATH.
default_venv="$root/.venv"
: "${SCLONG_VENV:=$default_venv}"
# Names for `module load`, separated by spaces (for instance "cuda/12.8 gcc/13").
: "${SCLONG_MODULES:=}"
# Command that runs its arguments in a container (for instance "apptainer exec --nv sclong.sif");
# python is then the container's, and SCLONG_VENV is not used.
: "${SCLONG_CONTAINER:=}"
# Folder for compiled kernels and extensions, best on each node's own disk; a folder in it for each
# user and environment. Empty: extensions in the environment, or below ~/.cache/sclong_ds where that
# cannot be written, and kernels in ~/.triton.
: "${SCLONG_SCRATCH:=}"

# --- training ---
# Ranks on each node; empty: one per GPU, or one on a node without GPUs.
: "${SCLONG_RANKS_PER_NODE:=}"
# 1: a job that is to be started again queues itself. 0: it ends with status 75, and an outer loop
# (slurm/resubmit.sh) submits it again.
: "${SCLONG_REQUEUE:=1}"
# Seconds that the last ranks get after the first one has ended, whether well or badly.
: "${SCLONG_STRAGGLER_S:=300}"
# Starts in a row without a new checkpoint, after which the job is not started again.
: "${SCLONG_MAX_STALLED:=3}"
# Seconds that every node gets to answer the check before training; 0: no check.
: "${SCLONG_PREFLIGHT:=120}"
# 1: when the check names bad nodes, the job queues itself again without them. 0: it ends.
: "${SCLONG_EXCLUDE_BAD:=0}"

# --- tracking and network ---
# MLflow server or store; empty: a file beside the run folder.
: "${MLFLOW_TRACKING_URI:=}"
# Network interface and InfiniBand adapters of NCCL (GPUs), its messages (for instance WARN), and the
# network interface of gloo (CPUs); empty: they choose themselves.
: "${NCCL_SOCKET_IFNAME:=}"
: "${NCCL_IB_HCA:=}"
: "${NCCL_DEBUG:=}"
: "${GLOO_SOCKET_IFNAME:=}"

if [[ -n $SCLONG_MODULES ]]; then
  if ! command -v module >/dev/null; then
    echo "error: SCLONG_MODULES='$SCLONG_MODULES', but this node has no 'module' command" >&2
    return 2
  fi
  nounset=${-//[^u]/}
  set +u # module files read variables that may be unset
  # shellcheck disable=SC2086 # a list of names
  module load $SCLONG_MODULES
  ${nounset:+set -u}
fi

if [[ -z $SCLONG_CONTAINER && $SCLONG_VENV != "$default_venv" && ! -x $SCLONG_VENV/bin/python ]]; then
  echo "error: SCLONG_VENV=$SCLONG_VENV has no bin/python: set it to an environment with" \
    "requirements.txt installed, or leave it out" >&2
  return 2
fi
if [[ -z $SCLONG_CONTAINER && -d $SCLONG_VENV ]]; then
  export VIRTUAL_ENV="$SCLONG_VENV" PATH="$SCLONG_VENV/bin:$PATH"
fi
if [[ -z $SCLONG_CONTAINER ]] && ! python -c 'import sys
from importlib.util import find_spec
sys.exit(None in map(find_spec, ("torch", "deepspeed", "zarr")))' 2>/dev/null; then
  # Without this the job would end in a traceback of whatever python the node has.
  echo "error: $(command -v python || echo "no python;") cannot import torch, deepspeed and zarr:" \
    "$SCLONG_VENV does not exist (make setup creates it), or lacks them; or set SCLONG_VENV," \
    "SCLONG_MODULES or SCLONG_CONTAINER" >&2
  return 2
fi
unset default_venv
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n $SCLONG_SCRATCH ]]; then
  # Of this user and this environment alone: another one's files would be no use, or not to be written.
  scratch="$SCLONG_SCRATCH/$(id -u)-$(cksum <<<"$SCLONG_VENV $SCLONG_CONTAINER" | cut -d ' ' -f 1)"
  export TRITON_CACHE_DIR="$scratch/triton" TORCH_EXTENSIONS_DIR="$scratch/torch"
  unset scratch
fi
# An empty value is not "unset" to the programs that read these.
for name in SBATCH_ACCOUNT SBATCH_PARTITION SBATCH_QOS MLFLOW_TRACKING_URI \
  NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG GLOO_SOCKET_IFNAME; do
  if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done
export SCLONG_CONTAINER
