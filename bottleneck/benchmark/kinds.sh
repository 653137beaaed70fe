#!/usr/bin/env bash
# Is it the rank? Low-rank curves with three seeds, then every kind of head at three parameter budgets, on two real backbones.
#
#     bottleneck/benchmark/kinds.sh 'TEXTS/*.jsonl.zst'                  all of it, on one GPU; a run that is finished is not repeated
#     TOKENS=16384 EXTRA="batch_size=4 trainer=cpu …" BACKBONES=smollm2 bottleneck/benchmark/kinds.sh 'TEXTS/*'        a trial
#
# From the environment: BACKBONES (of smollm2, gemma3; default both), PARTS (of curve, kinds, cost; default all), TOKENS (default those
# of the experiments, 100M), EXTRA (more overrides of train.py), OUT (default outputs/kinds), PYTHON (default .venv/bin/python).
# What fails does not stop the rest; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
texts=${1:?give the text: a file, a folder or a glob}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/kinds}
failed=0

train() { # train NAME OVERRIDES…
    local name=$1
    shift
    echo "== $name" >&2
    # shellcheck disable=SC2086
    "$python" train.py "$@" data=local "data.files=$texts" ${TOKENS:+tokens=$TOKENS} ${EXTRA:-} ckpt_path=last "hydra.run.dir=$out/$name" || failed=1
}

draw() { # draw FOLDER AXIS RUN…
    local to=$1 x=$2
    shift 2
    "$python" -m bottleneck.curve "$@" --out "$out/$to" --x "$x" || failed=1
}

for name in ${BACKBONES:-smollm2 gemma3}; do
    case $name in
        smollm2) backbone=smollm2_135m_gguf ;;
        gemma3) backbone=gemma3_270m_gguf ;;
        *) echo "BACKBONES=$name: allowed are smollm2, gemma3" >&2; exit 2 ;;
    esac
    for part in ${PARTS:-curve kinds cost}; do
        case $part in
            curve)
                for start in scaled refined; do
                    train "$name-$start" experiment=rank_curve "backbone=$backbone" "head=$start"
                done
                draw "$name-curve" rank "$out/$name-scaled" "$out/$name-refined"
                ;;
            kinds)
                train "$name-kinds" "experiment=kinds_$name" "backbone=$backbone"
                draw "$name-parameters" parameters "$out/$name-kinds"
                draw "$name-flops" flops "$out/$name-kinds"
                ;;
            cost)
                "$python" -m bottleneck.benchmark cost "$out/$name-kinds" --csv "$out/$name-cost.csv" || failed=1
                draw "$name-step" step_ms "$out/$name-kinds"
                draw "$name-decode" decode_ms "$out/$name-kinds"
                ;;
            *) echo "PARTS=$part: allowed are curve, kinds, cost" >&2; exit 2 ;;
        esac
    done
done
exit $failed
