#!/usr/bin/env bash
# From nothing to pretrained weights, on data of its own:
#
#   bash launch/quickstart.sh
#
# makes .venv and installs (once), makes a demo scene with its land-cover map, packs it into records, checks them,
# pretrains a ResNet-18, validates it on held-out blocks, exports its weights, compares them with random ones and with
# mere colours, and says what came out and where it lies.
# It needs Python 3.11 or newer with pip. What is done already is not done again; cut short, it goes on where it was.
# OUT (out/quickstart) is the folder it works in. It uses a GPU where there is one.
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

if [ $# -gt 0 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  [ "$1" = -h ] || [ "$1" = --help ] || die "quickstart.sh takes no arguments; set OUT to work in another folder"
  exit 0
fi
OUT=${OUT:-out/quickstart}
case $OUT in
  /*) ;;
  *) OUT=$PWD/$OUT ;;
esac

step() {
  say ""
  say "== $* =="
}

step "1/7 environment"
geokr_env pack train
say "$("$PY" --version) in ${PY#"$ROOT/"}"
cd "$ROOT"
OUT=${OUT#"$ROOT/"} # shorter to read and to copy
began=$SECONDS

step "2/7 demo scene: 36 x 36 km, four bands, land cover in two UTM zones"
"$PY" preprocess/make_demo.py --out "$OUT/demo" | sed '/^next:/d'

step "3/7 scenes and land cover to records"
# Tiles of 1.28 km; blocks of 5 km are held out whole, so no validation pixel is ever trained on. This seed's
# held-out blocks have every class in them.
"$PY" preprocess/pack_records.py --scenes "$OUT/demo/scenes/*.tif" --land-cover "$OUT/demo/landcover/*.tif" \
  --product globeland30 --out "$OUT/records" --config configs/pack_globeland30.yaml 'tile.bands=[red,green,blue]' \
  tile.size=128 tile.step=64 split.val_fraction=0.2 split.block_m=5120 seed=2 | sed '/^next:/d; /^records:/d'
"$PY" preprocess/verify_records.py "$OUT/records"

step "4/7 pretraining"
"$PY" -m geokr.pretrain --config configs/smoke.yaml data.records="$OUT/records" run.dir="$OUT/run" \
  data.image_size=64 train.max_steps=250

step "5/7 export"
"$PY" -m geokr.export --run "$OUT/run" --out "$OUT/backbone.safetensors"

step "6/7 what the weights are worth: shares of classes on held-out tiles, from few labels"
"$PY" -m geokr.evaluate --weights "$OUT/backbone.safetensors" --data "$OUT/records" --task knn --labels 5 100 \
  --seeds 2 --json "$OUT/evaluation.json" --picture "$OUT/evaluation.png"

step "7/7 what came out"
"$PY" launch/summary.py "$OUT" --seconds "$((SECONDS - began))"
