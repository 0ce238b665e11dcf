#!/usr/bin/env bash
# How many ranks to start on this machine, at most N (2): one for each GPU that torch may use; N where it has none.
#   deepspeed --num_gpus "$(bash launchers/ranks.sh 2)" launchers/train_prior.sh ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -c 'import sys; from dalle_ds.ops.devices import ranks_here; print(ranks_here(int(sys.argv[1])))' "${1:-2}"
