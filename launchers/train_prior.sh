#!/usr/bin/env bash
''':' # Train the prior. Valid shell AND valid Python: to Python, all down to the closing quotes is one string.
#   deepspeed launchers/train_prior.sh [ARGS]                 the launcher runs "python -u THIS_FILE --local_rank=N ARGS" per rank
#   deepspeed --num_gpus 2 launchers/train_prior.sh --recipe launchers/recipes/tiny.yaml
#   deepspeed --hostfile HOSTS launchers/train_prior.sh --recipe R
#   bash launchers/train_prior.sh [ARGS]                      starts the deepspeed launcher on this very file
#   srun bash launchers/train_prior.sh [ARGS]                 one task a GPU: Slurm is the launcher
# DS_LAUNCH_ARGS="--num_gpus 2" adds launcher options to the bash form. ARGS: --help. Defaults live on the Python side.
# No backslash and no triple quote up here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/../.venv/bin/deepspeed" ] && ! command -v deepspeed >/dev/null 2>&1; then
  PATH="$here/../.venv/bin:$PATH"
  export PATH
fi
if [ -n "${SLURM_PROCID:-}" ] && [ -z "${RANK:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  MASTER_PORT=${MASTER_PORT:-29500}
  export RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
fi
if [ -n "${RANK:-}" ] && [ -n "${LOCAL_RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; then
  exec "${PYTHON:-python}" -u "$0" "$@"
fi
exec deepspeed ${DS_LAUNCH_ARGS:-} "$0" "$@"
: <<'# end of the Python part'
'''
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    # read where torch is imported; else the ranks that are left by another one bury its name under frames of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dalle_ds.training.prior_command import main

    main(default_recipe=ROOT / "launchers" / "recipes" / "tiny.yaml")
# end of the Python part
