#!/usr/bin/env bash
# Is it the rank? Low-rank curves with three seeds, then every kind of head at three parameter budgets, on two real backbones.
#
#     bottleneck/benchmark/kinds.sh 'TEXTS/*.jsonl.zst'                  all of it, on one GPU; a run that is finished is not repeated
#     GPUS="0 1 2 3" bottleneck/benchmark/kinds.sh 'TEXTS/*.jsonl.zst'   the same runs, spread over four GPUs
#     TOKENS=16384 EXTRA="batch_size=4 trainer=cpu …" BACKBONES=smollm2 bottleneck/benchmark/kinds.sh 'TEXTS/*'        a trial
#
# The curves: seed 0 tries a grid of rates at every rank; seeds 1 and 2 take the best of them. Nothing in the start `refined`
# is random, so its repeats differ in the order of the text, which needs VALIDATION, since data.seed also chooses held-out documents.
# bottleneck.curve draws each order as a line of its own; `python -m bottleneck.benchmark.repeats` prints their mean and interval.
# The kinds: one run for each parameter budget, with a grid of rates for every head. With TUNE_TOKENS the grid is tried on
# that many tokens first, and the run takes each head's best rate times FACTORS.
# Heads whose best rate is the highest or lowest tried are trained again at two rates beyond it, at most EDGES times.
#
# From the environment: VALIDATION (validation text; default: documents held out), BACKBONES (of smollm2, gemma3; default
# both), PARTS (of curve, kinds, cost; default all), STARTS (of scaled, refined; those of the curves; default both),
# BUDGETS (of 0, 1, 2; default all), TOKENS (default those of the experiments, 100M), KINDS_TOKENS (default TOKENS),
# TUNE_TOKENS (default none), FACTORS (default 1), EDGES (default 2), EXTRA (more overrides of train.py), OUT (default
# outputs/kinds), GPUS (default: as they are visible, one run at a time), PYTHON (default .venv/bin/python).
# Relative names are seen from the repository. What fails does not stop the rest; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
texts=${1:?give the text: a file, a folder or a glob}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/kinds}
mkdir -p "$out"
rm -f "$out/failed"
orders=(0)
[ -n "${VALIDATION:-}" ] && orders=(0 1 2)

train() { # train NAME OVERRIDES…
    local name=$1
    shift
    echo "== $name" >&2
    # shellcheck disable=SC2086
    "$python" train.py "$@" data=local "data.files=$texts" ${VALIDATION:+"data.validation_files=$VALIDATION"} ${EXTRA:-} \
        ckpt_path=last "hydra.run.dir=$out/$name" || { echo "$name" >> "$out/failed"; return 1; }
}

draw() { # draw FOLDER AXIS RUN…, of which some may not be finished
    local to=$1 x=$2 run runs=()
    shift 2
    for run in "$@"; do
        [ ! -f "$run/curve.json" ] || runs+=("$run")
    done
    [ ${#runs[@]} -gt 0 ] || return
    "$python" -m bottleneck.curve "${runs[@]}" --out "$out/$to" --x "$x" || echo "$to" >> "$out/failed"
}

tuned() { # tuned COMMAND…: heads for the next run, as an override
    "$python" -m bottleneck.benchmark.tuning "$@"
}

grid() { # grid NAME OVERRIDES…: a run, then its heads again whose best rate is an edge, as NAME-edge1, NAME-edge2
    local name=$1 runs=("$out/$1") heads i
    shift
    train "$name" "$@" || return
    for ((i = 1; i <= ${EDGES:-2}; i++)); do
        heads=$(tuned beyond "${runs[@]}") || { echo "$name: rates beyond the edge" >> "$out/failed"; return 1; }
        [ -n "$heads" ] || return 0
        train "$name-edge$i" "$@" "heads=$heads" || return
        runs+=("$out/$name-edge$i")
    done
}

curve_of() { # curve_of BACKBONE START: the grid, then the repeats at its best rates
    local name=$1 start=$2 common=("experiment=rank_curve" "backbone=${backbones[$1]}" "head=$2" ${TOKENS:+"tokens=$TOKENS"}) heads
    grid "$name-$start-0" "${common[@]}" seed=0 optim.lr_rule=grid || return
    heads=$(tuned best "$out/$name-$start-0"*) || { echo "$name-$start: no best rates" >> "$out/failed"; return; }
    if [ "$start" = scaled ]; then
        train "$name-$start-1" "${common[@]}" 'seed=[1,2]' "heads=$heads"
    else
        for order in "${orders[@]:1}"; do
            train "$name-$start-$order" "${common[@]}" seed=0 "data.seed=$order" "heads=$heads"
        done
    fi
}

kinds_of() { # kinds_of BACKBONE BUDGET
    local tokens=${KINDS_TOKENS:-${TOKENS:-}} common=("experiment=kinds_$1" "backbone=${backbones[$1]}") heads
    heads=$(tuned entries "conf/experiment/kinds_$1.yaml" "$2") || { echo "$1-kinds-$2" >> "$out/failed"; return; }
    if [ -n "${TUNE_TOKENS:-}" ]; then
        grid "$1-tune-$2" "${common[@]}" "heads=$heads" "tokens=$TUNE_TOKENS" || return
        # shellcheck disable=SC2086
        heads=$(tuned best "$out/$1-tune-$2"* --factors ${FACTORS:-1}) || { echo "$1-tune-$2: no best rates" >> "$out/failed"; return; }
    fi
    grid "$1-kinds-$2" "${common[@]}" "heads=$heads" ${tokens:+"tokens=$tokens"}
}

cost_of() { # cost_of BACKBONE BUDGET
    "$python" -m bottleneck.benchmark cost "$out/$1-kinds-$2"* --csv "$out/$1-cost-$2.csv" || echo "$1-cost-$2" >> "$out/failed"
}

declare -A busy=()
run() { # run COMMAND…: on the first GPU that is free
    if [ -z "${GPUS:-}" ]; then
        "$@"
        return
    fi
    while :; do
        for gpu in $GPUS; do
            if ! kill -0 "${busy[$gpu]:-}" 2> /dev/null; then
                CUDA_VISIBLE_DEVICES=$gpu "$@" &
                busy[$gpu]=$!
                return
            fi
        done
        wait -n
    done
}

declare -A backbones=([smollm2]=smollm2_135m_gguf [gemma3]=gemma3_270m_gguf)
names=${BACKBONES:-smollm2 gemma3}
parts=${PARTS:-curve kinds cost}
budgets=${BUDGETS:-0 1 2}
for name in $names; do
    [ -n "${backbones[$name]:-}" ] || { echo "BACKBONES=$name: allowed are smollm2, gemma3" >&2; exit 2; }
done
for part in $parts; do
    [[ $part =~ ^(curve|kinds|cost)$ ]] || { echo "PARTS=$part: allowed are curve, kinds, cost" >&2; exit 2; }
done
for budget in $budgets; do
    [[ $budget =~ ^[012]$ ]] || { echo "BUDGETS=$budget: allowed are 0, 1, 2" >&2; exit 2; }
done
for start in ${STARTS:-}; do
    [[ $start =~ ^(scaled|refined)$ ]] || { echo "STARTS=$start: allowed are scaled, refined" >&2; exit 2; }
done
[[ ${EDGES:-2} =~ ^[0-9]+$ ]] || { echo "EDGES=$EDGES: must be a whole number" >&2; exit 2; }
for part in $parts; do
    case $part in
        curve) for name in $names; do for start in ${STARTS:-scaled refined}; do run curve_of "$name" "$start"; done; done ;;
        kinds) for name in $names; do for budget in $budgets; do run kinds_of "$name" "$budget"; done; done ;;
        cost) wait; for name in $names; do for budget in $budgets; do run cost_of "$name" "$budget"; done; done ;;
    esac
done
wait
for name in $names; do
    for part in $parts; do
        case $part in
            curve) draw "$name-curve" rank "$out/$name"-scaled-* "$out/$name"-refined-* ;;
            kinds) for x in parameters flops; do draw "$name-$x" "$x" "$out/$name"-kinds-*; done ;;
            cost) for x in step_ms decode_ms; do draw "$name-${x%_ms}" "$x" "$out/$name"-kinds-*; done ;;
        esac
    done
done
if [ -s "$out/failed" ]; then
    echo "failed: $(tr '\n' ' ' < "$out/failed")" >&2
    exit 1
fi
