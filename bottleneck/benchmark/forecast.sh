#!/usr/bin/env bash
# The stored curves of study=forecast: every rank of some backbones on some texts, on one GPU.
#
#     TEXTS="DIR:TOKENS …" OUT=DIR bottleneck/benchmark/forecast.sh
#
# TEXTS: folders of .jsonl or .jsonl.zst, such as `python -m data.recipes.debian` builds, each with its largest budget; a
# text needs a few more tokens than that. Budgets of 4.2M, 8.4M, 16.8M and 33.6M tokens up to there are trained.
# From the environment: BACKBONES (of smollm2, tiny, narrow, wide; default all; the last two are pretrained on the texts
# first), MOST (largest budget of smollm2; default 16.8M), LIMIT (default 300 seconds) ends what is not finished, and
# every budget that was finished counts. All runs share the GPU. They are left in OUT, one folder each, and their curves
# in OUT/curves.csv.
set -u
cd "$(dirname "$0")/../.."
: "${TEXTS:?give the texts: TEXTS=\"DIR:TOKENS …\"}" "${OUT:?give a folder for the runs}"
names=${BACKBONES:-smollm2 tiny narrow wide}
for name in $names; do # all settings are checked before anything runs
    [[ $name =~ ^(smollm2|tiny|narrow|wide)$ ]] || { echo "BACKBONES=$name: allowed are smollm2, tiny, narrow, wide" >&2; exit 2; }
done
for text in $TEXTS; do
    { [[ $text =~ :[0-9]+$ ]] && [ "${text##*:}" -ge 4194304 ] && [ -d "${text%:*}" ]; } ||
        { echo "TEXTS=$text: must be a folder and its largest budget, at least 4194304, as DIR:TOKENS" >&2; exit 2; }
done
python=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT/all"
export OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
end=$(($(date +%s) + ${LIMIT:-300}))
for text in $TEXTS; do
    for f in "${text%:*}"/*; do ln -sf "$(realpath "$f")" "$OUT/all/$(basename "${text%:*}")-$(basename "$f")"; done
done

studies() { # studies NAME MOST OVERRIDES…: one run for each text
    local name=$1 most=$2 text folder budgets tokens
    shift 2
    for text in $TEXTS; do
        folder=${text%:*} budgets=
        for tokens in 4194304 8388608 16777216 33554432; do
            [ "$tokens" -gt "${text##*:}" ] || [ "$tokens" -gt "$most" ] || budgets=$budgets,$tokens
        done
        timeout $((end - $(date +%s))) "$python" -m bottleneck.study study=forecast data=local "data.files=$folder/*" \
            "data.name=$(basename "$folder")" data.max_tokens=$((${budgets##*,} + 500000)) "data.cache_dir=$OUT/cache-$name" \
            trainer.accelerator=gpu trainer.micro_batch_size=16 "study.check=[${budgets#,}]" \
            "hydra.run.dir=$OUT/run-$name-$(basename "$folder")" "$@" > "$OUT/$name-$(basename "$folder").log" 2>&1 &
    done
    wait
}

made() { # made NAME VOCAB WIDTH RATE
    timeout 200 "$python" -m data.recipes.pretrain --corpus "$OUT/all/*" --out "$OUT/$1" --vocab "$2" --width "$3" --lr "$4" --minutes .5 \
        --batch 128 > "$OUT/$1.log" 2>&1
    studies "$1" 33554432 backbone=local "backbone.path=$OUT/$1/model" "backbone.name=$1"
}

for name in $names; do
    case $name in
        smollm2) studies smollm2 "${MOST:-16777216}" backbone=smollm2_135m_gguf & ;;
        tiny) studies tiny 33554432 & ;;
        narrow) made neox-128-v4k 4096 128 4e-3 & ;;
        wide) made neox-384-v32k 32768 384 2e-3 & ;;
    esac
done
wait
runs=("$OUT"/run-*/forecast.parts) # of which some budget was finished
"$python" -m bottleneck.benchmark forecast "${runs[@]%/forecast.parts}" --to "$OUT/curves.csv"
