#!/usr/bin/env bash
# The main job on what the repository ships: no account, no GPU, no network beyond installing packages.
#
#   bash scripts/quickstart.sh [OUTPUT_DIR]       (default: outputs/quickstart)
#
# data/base, a small model that reads printed formulas, is taught pencil on grey paper, which it cannot read:
# pictures -> data.csv -> train.json, val.json -> metrics before -> LoRA training -> metrics after -> merged checkpoint
# -> a prediction -> report and dashboard. A second run reuses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare_environment dashboard
cd "$ROOT"
out=${1:-outputs/quickstart}
latexocr="$VENV/bin/latexocr"
export TOKENIZERS_PARALLELISM=false

step() { echo; echo "== $*"; }

step "1/7 predict: the bundled base model reads a printed formula"
"$latexocr" predict data/sample/images/000000.png

step "2/7 data2csv: pencil on grey paper -> images and data.csv"
"$latexocr" data2csv --source data/pencil --output-dir "$out/data"

step "3/7 csv2json: data.csv -> train.json and val.json, no formula on both sides; doctor: what could harm a training"
"$latexocr" csv2json --csv "$out/data/data.csv" --train-json "$out/data/train.json" \
    --val-json "$out/data/val.json" --val-size 80
"$latexocr" doctor --data "$out/data/train.json" --val-data "$out/data/val.json" --model data/base \
    --html "$out/doctor.html"

step "4/7 evaluate: the base model on pencil"
if [ ! -f "$out/before/metrics.json" ]; then
    "$latexocr" evaluate --model data/base --data "$out/data/val.json" --output-dir "$out/before" --max-new-tokens 64
fi

step "5/7 train: LoRA, settings in scripts/quickstart.yaml"
if [ ! -f "$out/run/adapter/latexocr.json" ]; then
    resume=()
    compgen -G "$out/run/checkpoint-*" >/dev/null && resume=(--resume_from_checkpoint true)
    "$latexocr" train --config scripts/quickstart.yaml --train_json "$out/data/train.json" \
        --val_json "$out/data/val.json" --output_dir "$out/run" "${resume[@]}"
fi

step "6/7 evaluate: base and adapter on pencil; score: row by row against the base alone"
if [ ! -f "$out/after/metrics.json" ]; then
    "$latexocr" evaluate --model "$out/run/adapter" --data "$out/data/val.json" --output-dir "$out/after" \
        --max-new-tokens 64 --no-pictures >/dev/null
fi
"$latexocr" score --predictions "$out/after/predictions.jsonl" --baseline "$out/before/predictions.jsonl" \
    --output-dir "$out/after" >/dev/null

step "7/7 merge: adapter -> stand-alone checkpoint; predict: one picture with it"
if [ ! -f "$out/merged/config.json" ]; then
    "$latexocr" merge --adapter "$out/run/adapter" --output "$out/merged"
fi
"$VENV/bin/python" - "$out" <<'PYTHON' >"$out/shown.txt"
import csv, sys
from pathlib import Path

# the picture whose answer gained most
rows = csv.DictReader((Path(sys.argv[1]) / "after" / "rows.csv").open(encoding="utf-8", newline=""))
shown = max(rows, key=lambda row: float(row["gain"]))
print(shown["image_path"], shown["reference"], shown["baseline_prediction"], sep="\n")
PYTHON
{ read -r image; read -r reference; read -r before; } <"$out/shown.txt"
echo "picture    $image"
echo "reference  $reference"
echo "before     $before"
echo "after      $("$latexocr" predict --model "$out/merged" "$image" --max-new-tokens 64)"

"$VENV/bin/python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
before, after = (json.loads((out / when / "metrics.json").read_text(encoding="utf-8")) for when in ("before", "after"))
print(f"\n{int(after['num_rows'])} validation pictures in pencil{'before':>13}{'after':>10}")
for name in before:
    counts_and_variants = ("num_", "un", "missing_", "bleu_", "edit_distance_", "exact_match_", "picture_match_", "wrong_")
    if name in after and not name.startswith(counts_and_variants) and not name.endswith(("_low", "_high")):
        print(f"{name:<33}{before[name]:>10.3f}{after[name]:>10.3f}")
PYTHON
echo
echo "Everything is in $out. A large model learns your own pictures in the same way: see the recipe in README.md."
echo "report:     $out/after/report.html#show=won&sort=gain   (the pictures that got better)"
echo "dashboard:  source .venv/bin/activate && swanlab watch $out/run/swanlog --host 127.0.0.1 --port 5092"
