#!/usr/bin/env bash
# From printed formulas to handwriting: the base as it is, and after LoRA, full training and training from nothing;
# and LoRA with a smaller rank, on the decoder alone, and with a ninth of the pictures.
#
#   bash scripts/base/adapt.sh BASE TRAIN VAL OUTPUT [OPTION ...]
#
# BASE    the base model (data/base)
# TRAIN   a folder from `latexocr data2csv`: handwritten formulas
# VAL     the same, to validate on
# OUTPUT  a new folder: OUTPUT/{before,lora,lora-r16,lora-language,lora-ninth,full,nothing}
# OPTION  of `latexocr train`, for all runs; GPUs are used one a run, as far as there are any
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
base=$1 train=$2 val=$3 out=$4
shift 4
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
latexocr() { "${PYTHON:-python}" -m latexocr "$@"; }
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)  # 0 without the program

for side in train val; do
    latexocr csv2json --csv "${!side}/data.csv" --normalize 1 --train-json "$out/$side.json"
done
"${PYTHON:-python}" - "$out" <<'END'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
(folder / "ninth.json").write_text(json.dumps(json.loads((folder / "train.json").read_text())[::9]))
END
number=0
run() {  # NAME OPTION ...
    local name=$1 gpu=$((gpus ? number++ % gpus : 0))  # not in the line below: that is another process
    shift
    CUDA_VISIBLE_DEVICES=$gpu latexocr train --config "$here/adapt.yaml" \
        --model_name_or_path "$base" --train_json "$out/train.json" --val_json "$out/val.json" \
        --output_dir "$out/$name" "$@" >"$out/$name.log" 2>&1 &
}
everywhere=(--lora_components language merger vision --learning_rate 1e-3)
run lora --lora_r 64 --lora_alpha 64 "${everywhere[@]}" "$@"
run full --finetuning full --learning_rate 5e-4 "$@"
run nothing --finetuning full --init_from_config true --learning_rate 1e-3 "$@"
run lora-r16 --lora_r 16 --lora_alpha 16 "${everywhere[@]}" "$@"
run lora-language --lora_r 64 --lora_alpha 64 --lora_components language --learning_rate 1e-3 "$@"
run lora-ninth --lora_r 64 --lora_alpha 64 --train_json "$out/ninth.json" --num_train_epochs 90 "${everywhere[@]}" "$@"
latexocr evaluate --model "$base" --data "$out/val.json" --output-dir "$out/before" --no-pictures >"$out/before.log" 2>&1
wait
