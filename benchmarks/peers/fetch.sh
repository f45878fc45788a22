#!/usr/bin/env bash
# Puts FrEIA 0.2, which is pure Python, into benchmarks/peers/site (ignored by git), to be carried to a host without
# network: benchmarks/gpu.sh finds it there.
set -euo pipefail
cd "$(dirname "$0")"
python=$(command -v python || command -v python3)
"$python" -m pip install --quiet --no-deps --no-compile --upgrade --target site FrEIA==0.2
du -sh site
