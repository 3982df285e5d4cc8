#!/usr/bin/env bash
# From the quickstart's checkpoint through the chain pro -> dev on its small world, in outputs/distill: a teacher with a
# step gap, LADD, the regression that it is held against, guidance distillation, and one table of numbers.
# It can be interrupted and run again: it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/distill}
QUICKSTART=${QUICKSTART:-outputs/quickstart}
PYTHON=${PYTHON:-.venv/bin/python}
STUDENT_MU=0.7  # of the student's times: a second step from 0.67 still sees what the first one drew, and mends it
STARTED=$SECONDS
LANE=           # the process group of what runs beside LADD; it ends with this script, however that ends
trap '[ -z "$LANE" ] || { kill -- "-$LANE" && wait "$LANE"; } 2> /dev/null || true' EXIT
say() { printf '\n[%4d s] %s\n' $((SECONDS - STARTED)) "$*"; }
both() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m "$@"; }   # a process on each core

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
[ -e "$QUICKSTART/run/config.yaml" ] || { echo "run launch/quickstart.sh first: $QUICKSTART/run is missing"; exit 1; }
mkdir -p "$OUT"
FLOW=(flow.base_mu=1.7 flow.max_mu=1.7)  # of the teacher: more weight where things are committed to than the quickstart
QUIET=(logging.progress_bar=false logging.wandb=disabled)

say "drawing pictures of one thing, and edits, and encoding them once: $OUT/one_thing, $OUT/edits, $OUT/encoded"
[ -e "$OUT/edits/index.arrow" ] || {
  rm -rf "$OUT/one_thing" "$OUT/asked" "$OUT/edits" "$OUT/encoded"
  "$PYTHON" -m quickstart.distill data --out "$OUT"
  "$PYTHON" -m data_tools.index_shards "$OUT/one_thing" "$OUT/asked" "$OUT/edits"
}
for name in one_thing edits; do
  [ -e "$OUT/encoded/$name/index.arrow" ] || both data_tools.encode_shards "$OUT/$name" --out "$OUT/encoded/$name" \
    --encoders quickstart/encoders --t5 --t5-tokens 12 --samples-at-once 64
done
EDITS=$OUT/encoded/edits
MIX=(data=mixture "data.sources.edits.path=$EDITS" "data.sources.text_to_image.path=$OUT/encoded/one_thing"
  data.sources.text_to_image.prompt_dropout=null)

say "teaching the quickstart's model pictures of one thing: $OUT/teacher"
[ "$OUT/quickstart.safetensors" -nt "$QUICKSTART/run/checkpoints" ] ||
  "$PYTHON" -m kontext_train.export "checkpoint=$QUICKSTART/run" "out=$OUT/quickstart.safetensors" dtype=float32
both kontext_train.train experiment=quickstart "${MIX[@]}" data.sources.text_to_image.weight=0.7 \
  data.sources.edits.weight=0.3 parallel.param_dtype=float32 "weights.student=$OUT/quickstart.safetensors" \
  "run.dir=$OUT/teacher" "${FLOW[@]}" "${QUIET[@]}" run.steps=2000 optimizer.muon_lr=1.5e-2 ema.half_life_images=8000
[ "$OUT/teacher.safetensors" -nt "$OUT/teacher/checkpoints" ] ||
  "$PYTHON" -m kontext_train.export "checkpoint=$OUT/teacher" "out=$OUT/teacher.safetensors" dtype=float32

say "the teacher's own pictures, by 28 steps: $OUT/targets"
[ "$OUT/targets/index.arrow" -nt "$OUT/teacher.safetensors" ] ||
  both data_tools.generate_targets "$OUT/asked" --out "$OUT/targets" --teacher "$OUT/teacher.safetensors" \
    --guidance 1 --steps 28 --samples-at-once 256
TEACHER=("weights.teacher=$OUT/teacher.safetensors" "${QUIET[@]}")

say "on one core pro by LADD and a control by regression, on the other dev by guidance distillation and a control"
regress() { # shards, options
  "$PYTHON" -m quickstart.distill regress --out "$OUT" --mu "$STUDENT_MU" --teacher "$OUT/teacher.safetensors" \
    --pictures "$OUT/$1" "${@:2}"
}
set -m   # a group of its own
{
  "$PYTHON" -m kontext_train.train stage=guidance_distillation experiment=distill_dev "data.train=$EDITS" \
    "${TEACHER[@]}" "weights.student=$OUT/teacher.safetensors" "run.dir=$OUT/dev" &&
    regress one_thing
} &
LANE=$!
set +m
"$PYTHON" -m kontext_train.train stage=ladd experiment=distill_pro "${MIX[@]}" "${TEACHER[@]}" \
  data.sources.text_to_image.weight=0.6 data.sources.edits.weight=0.4 \
  "weights.student=$OUT/teacher.safetensors" "run.dir=$OUT/pro" \
  "flow.base_mu=$STUDENT_MU" "flow.max_mu=$STUDENT_MU"
regress targets --same-noise
wait "$LANE"
LANE=

say "sampling all of them"
OMP_NUM_THREADS=2 "$PYTHON" -m quickstart.distill evaluate --out "$OUT" --teacher "$OUT/teacher.safetensors" \
  --student "$OUT/pro" --dev "$OUT/dev"
cat "$OUT/table.md"

cat <<EOF

Done in $((SECONDS - STARTED)) s. Look at:
  $OUT/table.md         accuracy, places and edits by steps, with intervals; guidance and its cost
  $OUT/pictures.png     teacher by 28 steps | student by 4 | student by 1
  $OUT/summary.json     the numbers
EOF
