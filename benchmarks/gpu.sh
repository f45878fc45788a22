#!/usr/bin/env bash
# A complete record of one GPU in under nine minutes: parity, then the suite, then the tables, all into $OUT.
# Runs in place. Needs torch, triton, timm, einops, scikit-learn, pytest, pytest-benchmark, hypothesis and FrEIA 0.2,
# which may lie anywhere on PYTHONPATH. What a time limit cuts off is missing from the tables, and the log says so.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
python=$(command -v python || command -v python3)
pytest=("$python" -m pytest -q -p no:cacheprovider)
speed=("${pytest[@]}" benchmarks --benchmark-only --benchmark-disable-gc)
nvidia-smi >"$out/nvidia-smi.txt"

step() { # name, limit in seconds, command
    local name=$1 limit=$2 before=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - before)) s (limit $limit s)" | tee -a "$out/steps.txt"
    return $status
}

: >"$out/steps.txt"
step parity 170 "${pytest[@]}" tests/test_gpu.py tests/test_ops_*.py tests/test_backend.py --maxfail=20 --durations=15 || {
    tail -n 40 "$out/parity.log"
    echo "Parity is not green: nothing is timed." | tee -a "$out/steps.txt"
    exit 1
}
step kernels 100 "${speed[@]}" -k "kernel or convolution or matrix or copy" --benchmark-json "$out/kernels.json"
step speed 100 "${speed[@]}" -k "(flow or end_to_end or training or scoring) and not compiled" --benchmark-json "$out/speed.json"
step compiled 130 "${speed[@]}" -k "(flow or end_to_end or training) and compiled" --benchmark-json "$out/compiled.json"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 30 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" tests/test_ops_coupling.py \
        -k "test_block_equals_float64 and 24"
fi
results=()
for name in speed compiled kernels; do
    [[ -s $out/$name.json ]] && results+=("$out/$name.json")
done
step report 30 "$python" benchmarks/report.py "${results[@]}"
