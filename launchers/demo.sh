#!/usr/bin/env bash
# The whole way on this machine, in nine to twenty minutes on two cores: from captioned images to generated ones, and how right they are.
#   bash launchers/demo.sh [--out DIR] [--seed N] [--quick]       drawn scenes with an exact judge
#   bash launchers/demo.sh --emoji [--out DIR] [--quick]          the same way on fetched pictures of emoji
#   bash launchers/demo.sh --families [--out DIR] [--quick]       emoji in five styles at 66 pixels, judged by a CLIP: an hour or more
#   bash launchers/demo.sh --pictures DIR [--out DIR] [--quick]   as --emoji on your own pictures, at least 24
#     --pictures DIR   NAME.jpg|png|webp with NAME.txt beside it, or a captions.jsonl of {"file", "caption"}
#     --any-language   with --pictures: keeps captions that are not English, which are otherwise left out
#     --out DIR        folder of all results; runs/demo, runs/emoji or runs/pictures if not given, with --quick runs/demo_quick, ...
#     --seed N         other initial weights, noise, order of samples and drawn tokens; the images stay the same
#     --quick          a few updates only: shows that everything works, not what it can draw
# You may stop it at any moment, also with kill -9. The same command then skips finished stages and resumes training from its last
# checkpoint.
set -euo pipefail

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
out="" pictures="" way=demo quick="" ways=() seed=0 ingest_settings=()
while [ $# -gt 0 ]; do
  case $1:${2-} in
    --out: | --pictures: | --out:--* | --pictures:--*) echo "error: $1 needs a folder; see --help" >&2; exit 2 ;;
  esac
  case $1 in
    --out) out=$(absolute "$2"); shift 2 ;;
    --pictures) ways+=("--pictures $2"); pictures=$(absolute "$2"); shift 2 ;;
    --emoji | --families) ways+=("$1"); way=${1#--}; shift ;;
    --seed)
      if ! [[ ${2-} =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
        echo "error: --seed ${2-}: expected a number from 0 to 999999999" >&2
        exit 2
      fi
      seed=$2; shift 2 ;;
    --quick) quick=yes; shift ;;
    --any-language) ingest_settings=(filters.language=null); shift ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
if [ ${#ways[@]} -gt 1 ]; then
  echo "error: ${ways[0]} and ${ways[1]}: expected one of them" >&2
  exit 2
fi
if [ -n "$pictures" ]; then
  if [ ! -d "$pictures" ]; then
    echo "error: --pictures $pictures: no such folder" >&2
    exit 2
  fi
  way=pictures
elif [ ${#ingest_settings[@]} -gt 0 ]; then
  echo "error: --any-language without --pictures: expected both" >&2
  exit 2
fi
out=${out:-runs/$way${quick:+_quick}}

fetch_quick=() dvae_quick=() encode_quick=() prior_quick=() clip_quick=() score_quick=()
if [ -n "$quick" ]; then
  case $way in
    demo) fetch_quick=(limit=600 scenes.evaluation_captions=2) ;;
    families) fetch_quick=(limit=100 families.evaluation_captions=6) ;;
  esac
  dvae_quick=(updates=10 codebook_start.updates=4 codebook_start.cells=2000 schedules.tau.updates=8 learning_rate.decay_updates=10)
  encode_quick=(min_codes_used=0)
  prior_quick=(updates=10 checkpoint.every=5 validation.every=10)
  clip_quick=(updates=5)
  score_quick=(among=5)
fi

source launchers/setup.sh demo

mkdir -p "$out"
# Stages end when this shell ends, even by kill -9; otherwise a killed demo would run beside its successor.
export DALLE_DS_LAUNCHER_PID=$$
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$(cd "$out" && pwd)/mlflow.db}
DALLE_DS_PIPELINE=$(cd "$out" && pwd) # the MLflow run that is the parent of the stages' runs
export DALLE_DS_PIPELINE
child="" beside="" # processes of this stage, and of the one that runs beside others
forward() {
  local process
  for process in $child $beside; do kill -"$1" "$process" 2>/dev/null || true; done
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# seconds on two cores, for the ETA; `stage` corrects them by how long this machine has taken so far
# (CLIP, which trains beside the dVAE and the encoder, by what it takes after them)
names=("get images" "ingest" "tokenizer" "dVAE" "encode" "CLIP" "prior" "export")
if [ $way = demo ]; then
  recipe=launchers/recipes/tiny.yaml # a section for each stage
  names+=("sample" "score" "sample, best of 16" "score, best of 16" "grid")
  expected=(15 33 3 85 50 45 350 3 8 8 16 9 10)
elif [ $way = families ]; then
  recipe=launchers/recipes/families.yaml
  names+=("judge" "sample seen" "score seen" "sample zero-shot" "score zero-shot" "sample best of 8" "score best of 8" "grid")
  expected=(60 10 2 380 70 40 2400 4 260 15 14 16 14 100 14 13)
else
  recipe=launchers/recipes/emoji.yaml
  names+=("sample" "evaluate")
  expected=(5 10 5 125 20 2 330 10 15 10)
fi

began=$SECONDS planned=0 took=0
stage() { # stage NAME COMMAND...
  local i=0 left=0 j
  while [ "${names[i]}" != "$1" ]; do i=$((i + 1)); done
  shift
  for ((j = i; j < ${#names[@]}; j++)); do left=$((left + expected[j])); done
  [ $planned -lt 20 ] || left=$((left * took / planned))
  printf '\n=== %d/%d %s   (%d s so far, about %d s to go)\n    %s\n' \
    $((i + 1)) ${#names[@]} "${names[i]}" $((SECONDS - began)) "$left" "$*" >&2
  local start=$SECONDS status=0
  if [ -n "$beside" ] && [ "${names[i]}" = "CLIP" ]; then
    child=$beside beside=""
    tail -n 1 -f --pid "$child" "$out/clip.log" >&2 &
  else
    "$@" &
    child=$!
  fi
  # a trapped signal interrupts `wait`: wait again until the stage has ended
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  if [ "$status" -ne 0 ]; then
    [ -z "$beside" ] || { kill "$beside"; wait "$beside"; } 2>/dev/null || true # it saves its state
    [ "${names[i]}" != "CLIP" ] || tail -n 20 "$out/clip.log" >&2
    local hint="the same command resumes here"
    [ "$status" -ne 2 ] || hint="mend the cause first; then $hint"
    echo "stage '${names[i]}' ended with exit code $status; $hint" >&2
    exit "$status"
  fi
  local seconds=$((SECONDS - start))
  [ $((4 * seconds)) -lt "${expected[i]}" ] || planned=$((planned + expected[i])) took=$((took + seconds)) # else it had little to do
  printf '%s\t%d\n' "${names[i]}" $seconds >>"$out/seconds.tsv"
}
newer() { [ "$1" -nt "$2" ] && echo "=== $1 is up to date" >&2; }

# ---- from images to a prior and a CLIP, whatever the images ------------------------------------------------------------

# on CPUs: bf16 where it is faster than fp32. A demo that goes on after a kill keeps to its choice.
[ -s "$out/format" ] || python -c 'from dalle_ds.ops.devices import use_cuda
from dalle_ds.ops.products import fastest_cpu_format
print("cuda" if use_cuda() else fastest_cpu_format())' >"$out/format"
format=$(cat "$out/format")
dvae_format=() prior_format=() clip_format=()
case $format in
  bf16) prior_format=(deepspeed_config=ds_configs/zero3_bf16_cpu.json) clip_format=(precision=bf16) ;;
  fp32) dvae_format=(precision=fp32) prior_format=(deepspeed_config=ds_configs/zero3_fp32.json) ;;
esac
launch() { # launch ARGUMENTS...     by deepspeed, on two ranks or on the GPUs of this machine; replaces the stage's process
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  exec deepspeed --num_gpus "$(bash launchers/ranks.sh 2)" --master_port "$port" "$@"
}
if [ $way != pictures ]; then
  pictures=$out/images
  stage "get images" dalle-ds data fetch $recipe out="$pictures" "${fetch_quick[@]}"
fi
ingest=(images="$pictures" "${ingest_settings[@]}")
[ $way != pictures ] || [ -e "$out/raw/raw.json" ] || python -m preprocessing.stages.own_pictures count $recipe "${ingest[@]}"
stage "ingest" dalle-ds data ingest $recipe "${ingest[@]}" out="$out/raw"
split=() data_split=() clip_batch=${quick:+32} # the split is the same in all stages
if [ $way = pictures ]; then
  fitting=$(python -m preprocessing.stages.own_pictures fit $recipe "$out/raw")
  read -r fraction largest <<<"$fitting"
  encode_quick=(min_codes_used=0) # a handful of validation pictures cannot use a quarter of the codebook
  [ -n "$clip_batch" ] && [ "$clip_batch" -le "$largest" ] || clip_batch=$largest
  split=(validation_fraction="$fraction") data_split=(data.validation_fraction="$fraction")
fi
[ -z "$clip_batch" ] || clip_quick+=(global_batch="$clip_batch")
stage "tokenizer" dalle-ds data tokenizer $recipe raw="$out/raw" out="$out/tokenizer.model" "${split[@]}"
clip=(dalle-ds train clip $recipe data.raw="$out/raw" "${data_split[@]}" folder="$out/clip" seed=$seed "${clip_format[@]}" "${clip_quick[@]}")
if ! newer "$out/clip/clip_report.json" "$out/tokenizer.model"; then
  echo "=== CLIP begins beside the next stages; its output is in $out/clip.log" >&2
  "${clip[@]}" >"$out/clip.log" 2>&1 & # on the second core: the dVAE's updates are too small for two
  beside=$!
fi
stage "dVAE" dalle-ds train dvae $recipe data.raw="$out/raw" "${data_split[@]}" folder="$out/dvae" seed=$seed \
  "${dvae_format[@]}" "${dvae_quick[@]}"
stage "encode" dalle-ds data encode $recipe raw="$out/raw" dvae="$out/dvae/dvae.safetensors" tokenizer="$out/tokenizer.model" \
  out="$out/tokens" "${split[@]}" "${encode_quick[@]}"
[ -z "$beside" ] || stage "CLIP" "${clip[@]}"
stage "prior" launch launchers/train_prior.sh $recipe data.dataset="$out/tokens" folder="$out/prior" seed=$seed \
  "${prior_format[@]}" "${prior_quick[@]}"
# if the demo is finished, do nothing: each of these results is newer than its input
newer "$out/export/config.json" "$out/prior/summary.json" ||
  stage "export" dalle-ds export "$out/prior" "$out/export"

draw() { # draw STAGE FOLDER N_CAPTIONS CAPTIONS SETTING...     samples for the first captions of a list
  local name=$1 folder=$2 n=$3 captions=$4
  shift 4
  newer "$folder/samples.json" "$out/export/config.json" || {
    rm -rf "$folder" # drawn from an earlier export
    head -n "$n" "$pictures/$captions" >"$folder.txt"
    stage "$name" dalle-ds sample $recipe export="$out/export" captions="$folder.txt" out="$folder" seed=$seed "$@"
  }
}

# ---- scenes: how many samples show what their caption says ---------------------------------------------------------------

judge() { # judge STAGE FOLDER SCORES METRICS
  newer "$3/scenes.json" "$2/samples.json" || {
    rm -rf "$3" # of earlier samples
    stage "$1" dalle-ds eval scenes $recipe images="$2" export="$out/export" out="$3" name="$4"
  }
}
if [ $way = demo ]; then
  captions=evaluation_captions.txt # of all categories, in turns
  draw "sample" "$out/plain" 10000 $captions n=1
  judge "score" "$out/plain" "$out/scores" scenes
  draw "sample, best of 16" "$out/best" 88 $captions n=16 keep=1 clip="$out/clip/model"
  judge "score, best of 16" "$out/best" "$out/scores_best" scenes_best_of_16
  draw "grid" "$out/samples" 11 $captions n=16 keep=6 clip="$out/clip/model"
  summary=$(python - "$out/scores/scenes.json" "$out/scores_best/scenes.json" <<'END'
import json, sys
plain, best = (json.load(open(file)) for file in sys.argv[1:])
print("Images that show every object of their caption and nothing else, mean over categories:")
print(f"{'':<38}{'seen':>8}{'zero-shot':>12}   zero-shot: combinations that training never saw")
rows = {"one sample a caption": plain, "the best of 16 by the demo's CLIP": best, "real scenes, reconstructed": plain.get("reconstructed", {})}
for name, scores in rows.items():
    seen, zero_shot = (f"{scores[split]['mean']['value']:.3f}" if split in scores else "-" for split in ("seen", "zero_shot"))
    print(f"  {name:<36}{seen:>8}{zero_shot:>12}")
END
)
  files="  $out/samples/grid.png                  captions of all categories, the best 6 of 16 by the demo's CLIP
  $out/scores/scenes.png, judged.png     the score by category; the samples, wrong ones first, in red frames
  $out/scores_best/                      the same with the best of 16"
  caption="two small blue stars"
fi

# ---- families: how many samples a CLIP of its own takes for what they should show ------------------------------------------

recognise() { # recognise STAGE FOLDER SCORES
  newer "$3/image_metrics.json" "$2/samples.json" || {
    rm -rf "$3" # of earlier samples
    stage "$1" dalle-ds eval images $recipe images="$2" reference="$out/raw" clip="$out/judge/model" export="$out/export" out="$3" \
      "${score_quick[@]}"
  }
}
if [ $way = families ]; then
  newer "$out/judge/clip_report.json" "$out/tokenizer.model" || # as in the recipe's first lines
    stage "judge" launch --no_local_rank --module dalle_ds.cli train clip $recipe data.raw="$out/raw" folder="$out/judge" \
      seed=$((seed + 1)) model.n_image_layers=4 "${clip_format[@]}" "${clip_quick[@]}"
  draw "sample seen" "$out/seen" 10000 seen_captions.txt
  recognise "score seen" "$out/seen" "$out/scores_seen"
  draw "sample zero-shot" "$out/zero_shot" 10000 zero_shot_captions.txt
  recognise "score zero-shot" "$out/zero_shot" "$out/scores_zero_shot"
  draw "sample best of 8" "$out/best" 10000 zero_shot_captions.txt n=8 keep=1 clip="$out/clip/model"
  recognise "score best of 8" "$out/best" "$out/scores_best"
  draw "grid" "$out/samples" 12 zero_shot_captions.txt n=8 keep=4 clip="$out/clip/model"
  summary=$(python - "$out" <<'END'
import json, sys
scores = {name: json.load(open(f"{sys.argv[1]}/scores_{name}/image_metrics.json")) for name in ("seen", "zero_shot", "best")}
among, chance = scores["seen"]["among"], scores["seen"]["chance"]
rows = {
    "seen in this style": scores["seen"]["retrieval_images"],
    "zero-shot: never seen in this style": scores["zero_shot"]["retrieval_images"],
    "zero-shot, the best of 8 by another CLIP": scores["best"]["retrieval_images"],
    "real images that no stage has seen": scores["zero_shot"]["retrieval_reference"],
}
print(f"Images that a CLIP of its own recognises among {among} captions of the same style (chance {chance:.3f}):")
for name, found in rows.items():
    print(f"  {name:<42}{found['top1']:.3f}   ({found['top1_low']:.3f} to {found['top1_high']:.3f})")
END
)
  files="  $out/samples/grid.png                  things in styles that training never showed them in, the best 4 of 8
  $out/scores_*/image_metrics.json       the score of each style"
  caption="red apple in glossy style"
fi

# ---- pictures: captions that training never saw --------------------------------------------------------------------------

if [ $way = emoji ] || [ $way = pictures ]; then
  newer "$out/samples/samples.json" "$out/export/config.json" || {
    rm -rf "$out/samples" # drawn from an earlier export
    stage "sample" dalle-ds sample $recipe export="$out/export" clip="$out/clip/model" out="$out/samples" seed=$seed
  }
  newer "$out/evaluation/evaluate.json" "$out/export/config.json" || {
    rm -rf "$out/evaluation" # of an earlier export
    stage "evaluate" dalle-ds eval loss $recipe export="$out/export" data="$out/tokens" out="$out/evaluation"
  }
  summary=$(python - "$out/evaluation/evaluate.json" <<'END'
import json, sys
e = json.load(open(sys.argv[1]))
print(f"Validation image loss, nats a token: {e['loss/validation/image']:.3f} with the right captions, {e['loss/validation/image_shuffled']:.3f} with shuffled ones:")
print(f"the caption gap is {e['caption_gap']:.3f} ({e['confidence']:.0%} interval {e['caption_gap_low']:.3f} to {e['caption_gap_high']:.3f}).")
END
)
  files="  $out/samples/grid.png                  pictures for captions that training never saw, the best 6 of 16 by the demo's CLIP
  $out/evaluation/evaluate.json          validation loss with the right captions and with shuffled ones"
  caption="a red heart"
fi

[ -z "$quick" ] || summary+="
After the few updates of --quick these figures say nothing: the run shows only that all stages work."
cat >&2 <<END

$summary
Done in $((SECONDS - began)) s. Everything is in $out:
$files
  $out/dvae/                             reconstructions and report of the codebook
  $out/export/                           prior, dVAE and tokenizer for sampling
All runs in MLflow:
  $(dirname "$(command -v mlflow)")/mlflow server --backend-store-uri $MLFLOW_TRACKING_URI --host 127.0.0.1 --port 5000
Pictures for your own caption:
  $(dirname "$(command -v dalle-ds)")/dalle-ds sample $out/export --caption "$caption" --n 64 --keep 8 --clip $out/clip/model --out $out/mine
END
