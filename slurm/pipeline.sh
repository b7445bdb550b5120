#!/usr/bin/env bash
#
# Submits the whole way from raw datasets to a trained model as a chain of jobs, and prints their ids.
# Runs on the login node, from the project root:
#
#   bash slurm/pipeline.sh --manifest MANIFEST --out DIR [options] -- --config PRESET|FILE [key=value ...]
#   bash slurm/pipeline.sh --manifest manifest.tsv --out runs/atlas --tasks 64 \
#     --sbatch-train "--nodes=8 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00" \
#     -- --config sclong_1b
#
#   --manifest FILE     datasets, as for `python -m data_prep convert`
#   --from "..."        instead: what `python -m data_prep fetch --from` takes, such as
#                       "cellxgene --organism human --primary-only"; the list is made here and now and
#                       pinned in DIR/sources, and each task of convert fetches, converts and removes
#                       file by file, with --convert "--keep-bytes 200GB"
#   --out DIR           folder to make: DIR/corpus, DIR/graph.npz and the run folder DIR/run
#   --tasks N           tasks of the arrays that convert and finalize (1)
#   --keep-going        continue without datasets that cannot be converted; without it the chain ends
#   --convert "..."     more options of `python -m data_prep convert`
#   --finalize "..."    more options of `python -m data_prep finalize`
#   --graph "..."       more options of `python -m data_prep gene-graph`
#   --sbatch-prep "..."   sbatch options of the data preparation and the graph
#   --sbatch-train "..."  sbatch options of the training
#
# Options within quotes are split at spaces. The chain is
#   convert (array) -> finalize (array) -> verify and gene-graph -> pretrain
# A job begins when those before it have succeeded; when one fails, Slurm takes those after it out of
# the queue. Every step can be submitted again by hand, and the whole too: what is done is skipped.
set -euo pipefail

main() {
  local manifest="" from="" out="" tasks=1 after_convert=afterok
  local convert="" finalize="" graph="" prep="" train=""
  while (($#)); do
    case $1 in
      --manifest) manifest=$(value "$@") ;;
      --from) from=$(value "$@") ;;
      --out) out=$(value "$@") ;;
      --tasks) tasks=$(value "$@") ;;
      --convert) convert=$(value "$@") ;;
      --finalize) finalize=$(value "$@") ;;
      --graph) graph=$(value "$@") ;;
      --sbatch-prep) prep=$(value "$@") ;;
      --sbatch-train) train=$(value "$@") ;;
      --keep-going)
        after_convert=afterany
        shift
        continue
        ;;
      --)
        shift
        break
        ;;
      *) fail "unknown argument '$1': see the head of slurm/pipeline.sh" ;;
    esac
    shift 2
  done
  if [[ ! -f slurm/env.sh && ! -f ${SCLONG_HOME:-}/slurm/env.sh ]]; then
    fail "$PWD is not the project: run it from the project root, or set SCLONG_HOME"
  fi
  if [[ -z $out || $# == 0 ]]; then fail "--out DIR and, after --, --config PRESET|FILE are needed"; fi
  if [[ -n $from && -n $manifest ]]; then fail "give --manifest or --from, not both"; fi
  if [[ -z $from && ! -f $manifest ]]; then fail "--manifest '$manifest': no such file"; fi
  if [[ ! $tasks =~ ^[1-9][0-9]*$ ]]; then fail "--tasks $tasks: got no number above 0"; fi
  home="${SCLONG_HOME:-$PWD}"
  mkdir -p "$out"
  out=$(realpath "$out")
  if [[ -n $from ]]; then
    (
      # shellcheck source-path=SCRIPTDIR source=env.sh
      source "$home/slurm/env.sh"
      # shellcheck disable=SC2086 # several options in one string
      $SCLONG_CONTAINER python -m data_prep fetch --from $from --out "$out/sources" --list >&2
    ) || exit 2
    manifest="$out/sources/manifest.tsv"
  fi
  manifest=$(realpath "$manifest")

  local training=("$@" run.dir="$out/run" data.corpus="$out/corpus" model.gene_graph="$out/graph.npz")
  # The training begins hours after this.
  (
    # shellcheck source-path=SCRIPTDIR source=env.sh
    source "$home/slurm/env.sh"
    # shellcheck disable=SC2086 # a command with its arguments
    $SCLONG_CONTAINER python -m sclong_ds.job.restarts check "${training[@]}"
  ) || exit 2

  local -A ids=()
  # shellcheck disable=SC2086 # several options in one string
  {
    submit convert "" "--array=0-$((tasks - 1)) $prep" \
      data_prep.sh convert "$manifest" --out "$out/corpus" $convert
    submit finalize "$after_convert:${ids[convert]}" "--array=0-$((tasks - 1)) $prep" \
      data_prep.sh finalize "$out/corpus" $finalize
    submit verify "afterok:${ids[finalize]}" "$prep" data_prep.sh verify "$out/corpus"
    submit gene-graph "afterok:${ids[finalize]}" "$prep" \
      gene_graph.sh --genes "$out/corpus/genes.tsv" --out "$out/graph.npz" $graph
    submit pretrain "afterok:${ids[verify]}:${ids[gene-graph]}" "$train" \
      pretrain.sh "${training[@]}"
  }
}

# Prints the value that follows an option.
value() {
  if (($# < 2)); then fail "$1 needs a value"; fi
  printf '%s' "$2"
}

# Submits one job: its name, what it waits for, sbatch options, script, arguments. Prints its id, and
# notes it in `ids`.
submit() {
  local name=$1 after=$2 options=$3 script=$4 id
  shift 4
  if [[ -n $after ]]; then options="--dependency=$after --kill-on-invalid-dep=yes $options"; fi
  # shellcheck disable=SC2086 # several options in one string
  if ! id=$(sbatch --parsable --job-name="sclong-$name" $options "$home/slurm/$script" "$@"); then
    echo "error: Slurm refused the job of $name, see above; the chain is not complete." \
      "${ids[*]:+To cancel what is queued: scancel ${ids[*]}}" >&2
    exit 1
  fi
  ids[$name]=${id%%;*}
  printf '%s\t%s\n' "$name" "${ids[$name]}"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

main "$@"
