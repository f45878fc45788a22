#!/usr/bin/env bash
# A record of one GPU in under nine minutes: parity, then the suite, then the tables, all into $OUT (one file a step).
# Runs in place, with torch, triton, timm, einops, scikit-learn and pytest-benchmark. What else is there is used: FrEIA 0.2
# (anywhere on PYTHONPATH) for the reference algorithm, hypothesis for more parity tests, pytest-xdist to run them faster,
# matplotlib for the plot. A step that meets its time limit is interrupted: what it had measured is kept, the rest is
# missing from the tables, and steps.txt says so.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
python=$(command -v python || command -v python3)
pytest=("$python" -m pytest -q -p no:cacheprovider)
speed=("${pytest[@]}" benchmarks --benchmark-only --benchmark-disable-gc)
has() { "$python" -c "import $1" 2>/dev/null; }
parity=(tests/test_gpu.py)
has hypothesis && parity+=(tests/test_ops_*.py)
has FrEIA && parity+=(tests/test_backend.py)
has xdist && parity+=(-n 6)
nvidia-smi >"$out/nvidia-smi.txt"
: >"$out/steps.txt"

step() { # name, limit in seconds, command
    local name=$1 limit=$2 before=$SECONDS status
    shift 2
    # As Ctrl-C: pytest then writes what it has.
    timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - before)) s (limit $limit s)" | tee -a "$out/steps.txt"
    return $status
}

measured() { # name, limit, pytest's choice
    step "$1" "$2" "${speed[@]}" -k "$3" --benchmark-json "$out/$1.json"
}

step parity 140 "${pytest[@]}" "${parity[@]}" --durations=15
status=$?
if grep -Eq "[0-9]+ (failed|error)" "$out/parity.log" || [[ $status != 0 && $status != 124 ]]; then
    tail -n 40 "$out/parity.log"
    echo "Parity is not green: nothing is timed." | tee -a "$out/steps.txt"
    exit 1
fi
if [[ $status != 0 ]]; then
    echo "Parity was cut off; what ran of it is green." | tee -a "$out/steps.txt"
fi
measured inference 45 "inference and not compiled"
measured kernels 60 "kernel or convolution or matrix or copy"
measured training 45 "training_step and not compiled"
measured compiled-flow 70 "flow_inference and compiled"
measured compiled-end-to-end 60 "end_to_end_inference and compiled"
measured compiled-training 60 "training_step and compiled"
measured scoring 15 "test_scoring"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 25 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" tests/test_ops_coupling.py \
        -k "test_block_equals_float64 and 24"
fi
results=()
for name in inference kernels training compiled-flow compiled-end-to-end compiled-training scoring; do
    [[ -s $out/$name.json ]] && results+=("$out/$name.json")
done
step report 10 "$python" benchmarks/report.py "${results[@]}"
