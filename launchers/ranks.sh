#!/usr/bin/env bash
# Print how many ranks to start on this machine: the number of GPUs that torch may use, at most N (default 2); without GPUs N.
#   deepspeed --num_gpus "$(bash launchers/ranks.sh 2)" launchers/train_prior.sh ...
set -euo pipefail
case ${1:-2} in
  -h | --help) sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  0 | *[!0-9]*) echo "error: $1: expected the largest number of ranks, such as 2" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -c 'import sys; from dalle_ds.ops.devices import ranks_here; print(ranks_here(int(sys.argv[1])))' "${1:-2}"
