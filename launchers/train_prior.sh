#!/usr/bin/env bash
''':' # Train the prior. This file is valid shell and valid Python: Python reads the shell part as one string.
#   deepspeed launchers/train_prior.sh [ARGS]                 the launcher runs "python -u THIS_FILE --local_rank=N ARGS" per rank
#   deepspeed --num_gpus 1 launchers/train_prior.sh launchers/recipes/tiny.yaml
#   deepspeed --hostfile HOSTS launchers/train_prior.sh R.yaml       several hosts: launchers/README.md
#   bash launchers/train_prior.sh [ARGS]                      starts the deepspeed launcher on this file
#   srun bash launchers/train_prior.sh [ARGS]                 one task a GPU: Slurm is the launcher; see launchers/slurm
# DS_LAUNCH_ARGS="--num_gpus 8" adds launcher options to the bash form. With "--hostfile HOSTS" there, the bash form also passes
# the environment to the hosts. ARGS: see --help. The shell part must hold no backslash and no triple quote.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/../.venv/bin/deepspeed" ] && ! command -v deepspeed >/dev/null 2>&1; then
  PATH="$here/../.venv/bin:$PATH"
  export PATH
fi
# a task of a Slurm step; a batch script has a SLURM_PROCID too
if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ] || { [ -n "${RANK:-}" ] && [ -n "${LOCAL_RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; }; then
  exec "${PYTHON:-python}" -u "$0" "$@"
fi
case " ${DS_LAUNCH_ARGS:-}" in
  *" --hostfile"* | *" -H"*)
    hosts= before=
    for word in $DS_LAUNCH_ARGS; do
      case $word in --hostfile=*) hosts=${word#*=} ;; esac
      case $before in --hostfile | -H) hosts=$word ;; esac
      before=$word
    done
    if [ ! -f "$hosts" ]; then # DeepSpeed would only warn, and train on this host alone
      echo "error: hostfile $hosts does not exist: expected one line per host, as in node-a slots=8" >&2
      exit 2
    fi
    # ssh forwards no variables, and DeepSpeed shows those that it forwards, secrets too, in its log and in the process list
    names="PATH|LD_LIBRARY_PATH|LD_PRELOAD|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    ours="AWS|MLFLOW|DALLE_DS|DS|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|FSSPEC|HTTP|HTTPS|ALL|NO"
    torchs="TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|CUDA|CUBLAS|CUBLASLT|CUDNN|NVIDIA|OMP|KMP|GOMP|MKL|OPENBLAS"
    networks="NCCL|OFI|FI|EFA|RDMAV|IBV|MLX5|UCX|UCC|GLOO"
    # visible GPUs and process ids differ from host to host
    own="DALLE_DS_LAUNCHER_PID|CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES"
    line_end="
"
    # readable by this user only, and of a name that nobody can guess: at a known name, others could have put a link
    file=$(mktemp .environment.XXXXXXXXXX)
    for name in $(compgen -e | grep -iE "^(($names)|($ours|$torchs|$networks)_.*)$" | grep -vxE "$own"); do
      case ${!name} in
        *"$line_end"*) echo "warning: $name has a line break and is not passed to the hosts" >&2 ;;
        *) echo "$name=${!name}" ;;
      esac
    done >"$file"
    mv -T "$file" .environment
    set -- --environment "$PWD/.environment" "$@"
    ;;
esac
# the interpreter of the command deepspeed, which this replaces: DeepSpeed's own exits with 0 where its launcher is killed
python=$(dirname "$(command -v deepspeed || echo none)")/python
[ -x "$python" ] || python=python
exec "${PYTHON:-$python}" "$0" --run-deepspeed ${DS_LAUNCH_ARGS:-} "$0" "$@"
: <<'# end of the Python part'
'''
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-deepspeed"]:
        from dalle_ds.parallel.deepspeed_runner import run

        run(sys.argv[2:])
    else:
        from dalle_ds.cli import main

        main(["train", "prior", *sys.argv[1:]])
# end of the Python part
