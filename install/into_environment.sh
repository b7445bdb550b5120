#!/usr/bin/env bash
# Install sclong_ds into the environment of `python`, with the versions of the lock files.
#   bash install/into_environment.sh cuda|cpu [further options of pip, such as --find-links DIR]
# The images, the module and an installation for a group all do this.
set -euo pipefail
torch=${1:?cuda or cpu}
shift
cd "$(dirname "$0")/.."
lock="requirements-$torch.lock"
if [[ ! -f $lock ]]; then
  echo "error: $torch: must be cuda or cpu" >&2
  exit 2
fi
python -m pip install --no-deps --require-hashes -r requirements.lock -r "$lock" "$@"
python -m pip install --no-deps --no-build-isolation .
python -m sclong_ds --version
