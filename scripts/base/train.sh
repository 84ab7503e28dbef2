#!/usr/bin/env bash
# The bundled base model, from nothing: pictures of formulas, short ones first, then all.
#
#   bash scripts/base/train.sh SHAPE TEXTS REAL VAL OUTPUT [GPUS]
#
# SHAPE   a folder from `latexocr build --size base --corpus FILE` (its weights are not used)
# TEXTS   a folder with physics.txt, maths.txt and school.txt: formulas, one a line
# REAL    a folder from `latexocr data2csv`: printed formulas that somebody else rendered
# VAL     the same, to validate on
# OUTPUT  a new folder; OUTPUT/all/model is the base
#
# TeX is needed, and PYTHON may name the interpreter (default: python).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
shape=$1 texts=$2 real=$3 val=$4 out=$5 gpus=${6:-1}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
latexocr() { "$python" -m latexocr "$@"; }
train() { "$python" -m torch.distributed.run --nproc_per_node "$gpus" "$root/scripts/train.py" "$@"; }
scale=${SCALE:-1}  # of the number of pictures: 0.001 tries the script

# pictures NAME STYLE NUMBER [OPTION ...]: the folder OUTPUT/pictures/NAME; damage is done in training, anew each time
pictures() {
    local name=$1 style=$2 number=$3
    shift 3
    number=$("$python" -c "print(max(8, round($number * $scale)))")
    latexocr synthesize --output-dir "$out/pictures/$name" --style "$style" --num-images "$number" --no-augment "$@"
}

pictures short im2latex 60000 --formulas "$texts/school.txt" --vary 0.3 --max-tokens 30
pictures short-grammar im2latex 30000 --max-tokens 30 --seed 1
latexocr csv2json --csv "$out"/pictures/short{,-grammar}/data.csv --train-json "$out/short.json"
latexocr csv2json --csv "$val/data.csv" --normalize 1 --train-json "$out/val.json"

train --config "$here/short.yaml" --model_name_or_path "$shape" --train_json "$out/short.json" \
    --output_dir "$out/short" "${@:7}" >"$out/short.log" 2>&1 &
training=$!
pictures physics im2latex 200000 --formulas "$texts/physics.txt" --vary 0.3
pictures physics-real im2latex 60000 --formulas "$texts/physics.txt" --vary 0.05 --seed 1
pictures maths im2latex 100000 --formulas "$texts/maths.txt" --vary 0.2
pictures school im2latex 30000 --formulas "$texts/school.txt" --vary 0.3 --seed 1
pictures grammar im2latex 40000 --seed 2
pictures physics-print print 50000 --formulas "$texts/physics.txt" --vary 0.3 --seed 2
pictures maths-print print 30000 --formulas "$texts/maths.txt" --vary 0.3 --seed 2
pictures grammar-print print 20000 --seed 3
latexocr csv2json --normalize 1 --train-json "$out/all.json" \
    --csv "$real/data.csv" "$out"/pictures/{physics,physics-real,maths,school,grammar,physics-print,maths-print,grammar-print}/data.csv
wait $training

train --config "$here/all.yaml" --model_name_or_path "$out/short/model" --train_json "$out/all.json" \
    --val_json "$out/val.json" --output_dir "$out/all" "${@:7}" >"$out/all.log" 2>&1
