#!/usr/bin/env bash
# The whole way on real pictures, on this machine: from raw pictures to generated ones, about ten minutes on two cores.
#   bash launchers/demo.sh [--out runs/demo] [--pictures DIR] [--quick]
#     --pictures DIR   your own pictures: NAME.jpg|png|webp with NAME.txt beside it, or a captions.jsonl of {"file", "caption"}
#     --quick          a few updates only: shows that everything works, not what it can draw
# You may stop it at any moment, also with kill -9. The same command then skips finished stages and resumes training from its last
# checkpoint.
set -euo pipefail

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
out=runs/demo
pictures=""
dvae_quick=() encode_quick=() prior_quick=() clip_quick=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$(absolute "${2:?--out needs a folder}"); shift 2 ;;
    --pictures) pictures=$(absolute "${2:?--pictures needs a folder}"); shift 2 ;;
    --quick)
      dvae_quick=(updates=10 schedules.tau.updates=8 learning_rate.decay_updates=10)
      encode_quick=(min_codes_used=0)
      prior_quick=(updates=10 checkpoint.every=5 validation.every=10)
      clip_quick=(updates=5 global_batch=32)
      shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
if [ -n "$pictures" ] && [ ! -d "$pictures" ]; then
  echo "error: --pictures $pictures: no such folder" >&2
  exit 2
fi

source launchers/setup.sh demo

mkdir -p "$out"
# Stages end when this shell ends, even by kill -9; otherwise a killed demo would run beside its successor.
export DALLE_DS_LAUNCHER_PID=$$
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$(cd "$out" && pwd)/mlflow.db}
DALLE_DS_PIPELINE=$(cd "$out" && pwd) # the MLflow run that is the parent of the stages' runs
export DALLE_DS_PIPELINE
child=""
forward() { [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT

began=$SECONDS
names=("fetch pictures" "ingest" "tokenizer" "dVAE" "encode" "prior" "export" "CLIP" "sample" "evaluate")
expected=(5 10 5 180 15 330 10 70 15 10) # seconds on two cores, for the ETA
stage() { # stage NUMBER COMMAND...
  local i=$(($1 - 1)) left=0 j
  shift
  for ((j = i; j < ${#names[@]}; j++)); do left=$((left + expected[j])); done
  printf '\n=== %d/%d %s   (%d s so far, about %d s to go)\n    %s\n' \
    $((i + 1)) ${#names[@]} "${names[i]}" $((SECONDS - began)) "$left" "$*" >&2
  local start=$SECONDS status=0
  "$@" &
  child=$!
  # a trapped signal interrupts `wait`: wait again until the stage has ended
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  if [ "$status" -ne 0 ]; then
    echo "stage '${names[i]}' ended with exit code $status; the same command resumes here" >&2
    exit "$status"
  fi
  printf '%s\t%d\n' "${names[i]}" $((SECONDS - start)) >>"$out/seconds.tsv"
}

recipe=launchers/recipes/tiny.yaml # a section for each stage
# convolutions in bf16 take five times as long as in fp32 on CPUs that have no instructions for it
has_bf16=$(python -c 'import torch; from dalle_ds.ops.devices import use_cuda
print(use_cuda() or torch.ops.mkldnn._is_mkldnn_bf16_supported())')
dvae_format=()
[ "$has_bf16" = True ] || dvae_format=(precision=fp32)
if [ -z "$pictures" ]; then
  pictures=$out/images
  stage 1 dalle-ds data fetch $recipe out="$pictures"
fi
stage 2 dalle-ds data ingest $recipe images="$pictures" out="$out/raw"
stage 3 dalle-ds data tokenizer $recipe raw="$out/raw" out="$out/tokenizer.model"
stage 4 dalle-ds train dvae $recipe data.raw="$out/raw" folder="$out/dvae" "${dvae_format[@]}" "${dvae_quick[@]}"
stage 5 dalle-ds data encode $recipe raw="$out/raw" dvae="$out/dvae/dvae.safetensors" tokenizer="$out/tokenizer.model" \
  out="$out/tokens" "${encode_quick[@]}"
stage 6 deepspeed --num_gpus "$(bash launchers/ranks.sh 2)" --master_port "$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" \
  launchers/train_prior.sh $recipe data.dataset="$out/tokens" folder="$out/prior" "${prior_quick[@]}"
# if the demo is finished, do nothing: each of these results is newer than its input
newer() { [ "$1" -nt "$2" ] && echo "=== $1 is up to date" >&2; }
newer "$out/export/config.json" "$out/prior/summary.json" ||
  stage 7 dalle-ds export "$out/prior" "$out/export"
newer "$out/clip/clip_report.json" "$out/tokenizer.model" ||
  stage 8 dalle-ds train clip $recipe data.raw="$out/raw" folder="$out/clip" "${clip_quick[@]}"
newer "$out/samples/samples.json" "$out/export/config.json" || {
  rm -rf "$out/samples" # drawn from an earlier export
  stage 9 dalle-ds sample $recipe export="$out/export" clip="$out/clip/model" out="$out/samples"
}
newer "$out/evaluation/evaluate.json" "$out/export/config.json" ||
  stage 10 dalle-ds eval loss $recipe export="$out/export" data="$out/tokens" out="$out/evaluation"

summary=$(python - "$out/evaluation/evaluate.json" <<'END'
import json, sys
e = json.load(open(sys.argv[1]))
print(f"Validation image loss, nats a token: {e['loss/validation/image']:.3f} with the right captions, {e['loss/validation/image_shuffled']:.3f} with shuffled ones:")
print(f"the caption gap is {e['caption_gap']:.3f} ({e['confidence']:.0%} interval {e['caption_gap_low']:.3f} to {e['caption_gap_high']:.3f}).")
END
)
cat >&2 <<END

$summary
Done in $((SECONDS - began)) s. Everything is in $out:
  $out/samples/grid.png                  pictures for captions that training never saw, the best 6 of 16 by the demo's CLIP
  $out/dvae/                             reconstructions and report of the codebook
  $out/evaluation/evaluate.json          validation loss with the right captions and with shuffled ones
  $out/export/                           prior, dVAE and tokenizer for sampling
All runs in MLflow:
  $(dirname "$(command -v mlflow)")/mlflow server --backend-store-uri $MLFLOW_TRACKING_URI --host 127.0.0.1 --port 5000
Pictures for your own caption:
  $(dirname "$(command -v dalle-ds)")/dalle-ds sample $out/export --caption "a red heart" --n 64 --keep 8 --clip $out/clip/model --out $out/mine
END
