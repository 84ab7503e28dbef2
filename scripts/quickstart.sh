#!/usr/bin/env bash
# The main job on what the repository ships: no account, no GPU, no network beyond installing packages.
#
#   bash scripts/quickstart.sh [OUTPUT_DIR]       (default: outputs/quickstart)
#
# Bundled formula images -> data.csv -> train.json, val.json -> LoRA training of a tiny model -> metrics before and
# after -> merged checkpoint -> a prediction -> the line that opens the dashboard. A second run reuses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare_environment dashboard
cd "$ROOT"
out=${1:-outputs/quickstart}
latexocr="$VENV/bin/latexocr"
export TOKENIZERS_PARALLELISM=false

step() { echo; echo "== $*"; }

step "1/7 data2csv: the bundled sample -> images and data.csv"
"$latexocr" data2csv --source data/sample --output-dir "$out/data"

step "2/7 csv2json: data.csv -> train.json and val.json, no formula on both sides; doctor: what could harm a training"
"$latexocr" csv2json --csv "$out/data/data.csv" --train-json "$out/data/train.json" \
    --val-json "$out/data/val.json" --val-size 40
"$latexocr" doctor --data "$out/data/train.json" --val-data "$out/data/val.json" --html "$out/doctor.html"

step "3/7 build: a tiny model of the Qwen2-VL architecture with random weights"
if [ ! -f "$out/model/config.json" ]; then
    "$latexocr" build --output "$out/model" --corpus "$out/data/data.csv"
fi

step "4/7 evaluate: before training"
if [ ! -f "$out/before/metrics.json" ]; then
    "$latexocr" evaluate --model "$out/model" --data "$out/data/val.json" --output-dir "$out/before" \
        --max-new-tokens 64
fi

step "5/7 train: LoRA, settings in scripts/quickstart.yaml"
if [ ! -f "$out/run/adapter/latexocr.json" ]; then
    resume=()
    compgen -G "$out/run/checkpoint-*" >/dev/null && resume=(--resume_from_checkpoint true)
    "$latexocr" train --config scripts/quickstart.yaml --model_name_or_path "$out/model" \
        --train_json "$out/data/train.json" --val_json "$out/data/val.json" --output_dir "$out/run" "${resume[@]}"
fi

step "6/7 evaluate: after training; merge: adapter -> stand-alone checkpoint"
if [ ! -f "$out/after/metrics.json" ]; then
    "$latexocr" evaluate --model "$out/model" --adapter "$out/run/adapter" --data "$out/data/val.json" \
        --output-dir "$out/after" --max-new-tokens 64
fi
if [ ! -f "$out/merged/config.json" ]; then
    "$latexocr" merge --adapter "$out/run/adapter" --model "$out/model" --output "$out/merged"
fi

step "7/7 predict: one image with the merged checkpoint"
image=$("$VENV/bin/python" - "$out/after/predictions.jsonl" <<'PYTHON'
import json, sys
print(json.loads(open(sys.argv[1], encoding="utf-8").readline())["image_path"])
PYTHON
)
echo "$image"
"$latexocr" predict --model "$out/merged" "$image" --max-new-tokens 64

"$VENV/bin/python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
before, after = (json.loads((out / when / "metrics.json").read_text()) for when in ("before", "after"))
print(f"\n{'40 validation formulas':<24}{'before':>10}{'after':>10}")
for name in before:
    counts_and_variants = ("num_", "un", "missing_", "bleu_", "edit_distance_", "exact_match_", "picture_match_")
    if name in after and not name.startswith(counts_and_variants) and not name.endswith(("_low", "_high")):
        print(f"{name:<24}{before[name]:>10.3f}{after[name]:>10.3f}")
PYTHON
echo
echo "A tiny model with random weights cannot learn to read in minutes: this run shows that every stage works."
echo "For a real model see the recipe in README.md. Everything is in $out."
echo "report:     $out/after/report.html"
echo "dashboard:  source .venv/bin/activate && swanlab watch $out/run/swanlog --host 127.0.0.1 --port 5092"
