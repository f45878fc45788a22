#!/usr/bin/env bash
# A record of one GPU in one visit of at most nine minutes: bash benchmarks/gpu.sh, and with more time a second one,
# bash benchmarks/gpu.sh --more. What a step measured is kept, however the visit ends: two files in $OUT, a record and
# a summary, are written anew, by renaming, every few seconds. benchmarks/gpu_visit.py has the steps.
#
# Runs in place, with torch, triton, timm, einops, scikit-learn, pytest and pytest-benchmark. What else is there is used:
# FrEIA 0.2 (installed, or put into benchmarks/peers/site by benchmarks/peers/fetch.sh) for the reference algorithm,
# hypothesis for more parity tests, pytest-xdist to run them faster, matplotlib for the plot.
#
# OUT      where the two files go; default: benchmarks/results/gpu
# COMMIT   names the commit, where there is no .git
# PARITY   the parity tests of --more, in place of all that the packages there allow
set -euo pipefail
cd "$(dirname "$0")/.."
site=$PWD/benchmarks/peers/site
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}:$site
export OUT=${OUT:-benchmarks/results/gpu}
exec "$(command -v python || command -v python3)" benchmarks/gpu_visit.py "$@"
