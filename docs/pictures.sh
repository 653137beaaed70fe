#!/usr/bin/env bash
# Makes the documentation's pictures anew, each by the command behind it:  docs/pictures.sh [NAME…]   (default: curve)
#
#   CORPUS=DIR   a folder of text (JSON lines), such as `python -m data.recipes.debian --out DIR` builds: for ngrams
#   EVALS=DIR    results of lm-evaluation-harness of Pythia's checkpoints, from EleutherAI's repository: for downstream
#   SERIES=DIR   checkpoints of `python -m data.recipes.pretrain --do train --width W --save-at pythia` (W = 32 … 256, on a GPU): for series_*
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

study() { # study NAME-OF-PICTURE OVERRIDES…: runs one study and keeps its picture
    local name=$1 kind
    shift
    kind=$(sed -n 's/^study=//p' <<< "$1")
    "$python" -m bottleneck.study "$@" "hydra.run.dir=$out/$name"
    cp "$out/$name/$kind.png" "docs/images/gallery/$name.png"
}

small=(backbone=smollm2_135m_gguf data=sample trainer=cpu)
for picture in "${@:-curve}" ; do
    case $picture in
        curve) # curve.png and details.png of the README
            "$python" train.py "hydra.run.dir=$out/curve"
            cp "$out/curve/curve.png" "$out/curve/details.png" docs/images/ ;;
        estimate) study estimate study=estimate "${small[@]}" data.block_size=512 tokens=20_000 ;;
        anisotropy) study anisotropy study=anisotropy "${small[@]}" data.block_size=512 tokens=4_096 ;;
        spectrum) study spectrum study=spectrum "${small[@]}" data.block_size=512 tokens=20_000 ;;
        gradient) study gradient study=gradient "${small[@]}" data.block_size=256 tokens=4_096 ;;
        ngrams) study ngrams study=ngrams data=local "data.files=$CORPUS" study.max_tokens=150_000_000 study.precision=float32 ;;
        downstream) study downstream study=downstream "study.results=$EVALS" 'study.tasks=[lambada_openai,sciq]' ;;
        series_saturation | series_spectrum | series_anisotropy)
            study "$picture" "study=${picture#series_}" data=sample backbone=local "backbone.path=$SERIES" ;;
        *) echo "docs/pictures.sh: $picture: no such picture" >&2; exit 2 ;;
    esac
done
