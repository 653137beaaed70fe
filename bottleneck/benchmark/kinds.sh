#!/usr/bin/env bash
# Is it the rank? Low-rank curves with three seeds, then every kind of head at three parameter budgets, on two real backbones.
#
#     bottleneck/benchmark/kinds.sh 'TEXTS/*.jsonl.zst'                  all of it, on one GPU; a run that is finished is not repeated
#     TOKENS=16384 EXTRA="batch_size=4 trainer=cpu …" BACKBONES=smollm2 bottleneck/benchmark/kinds.sh 'TEXTS/*'        a trial
#
# From the environment: VALIDATION (validation text; default: documents held out, and then ORDERS must be one), ORDERS (data.seed of the
# runs of refined, such as "0 1 2"; default 0), BACKBONES (of smollm2, gemma3; default both), PARTS (of curve, kinds, cost; default all), TOKENS (default those
# of the experiments, 100M), EXTRA (more overrides of train.py), OUT (default outputs/kinds), PYTHON (default .venv/bin/python).
# What fails does not stop the rest; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
texts=${1:?give the text: a file, a folder or a glob}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/kinds}
failed=0
[ -n "${VALIDATION:-}" ] || [ "$(wc -w <<<"${ORDERS:-0}")" -eq 1 ] || { echo "ORDERS=$ORDERS: data.seed also chooses held-out documents; give VALIDATION" >&2; exit 2; }

train() { # train NAME OVERRIDES…
    local name=$1
    shift
    echo "== $name" >&2
    # shellcheck disable=SC2086
    "$python" train.py "$@" data=local "data.files=$texts" ${VALIDATION:+"data.validation_files=$VALIDATION"} ${TOKENS:+tokens=$TOKENS} ${EXTRA:-} ckpt_path=last "hydra.run.dir=$out/$name" || failed=1
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
                train "$name-scaled" experiment=rank_curve "backbone=$backbone" head=scaled
                # nothing in refined is random, so its repeats differ in the order of the text
                runs=()
                for order in ${ORDERS:-0}; do
                    train "$name-refined-$order" experiment=rank_curve "backbone=$backbone" head=refined seed=0 "data.seed=$order"
                    runs+=("$out/$name-refined-$order")
                done
                draw "$name-curve" rank "$out/$name-scaled" "${runs[@]}"
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
