#!/usr/bin/env bash
# The oldest versions that pyproject.toml allows, in a fresh virtual environment of their own, and a part of the tests
# on them; prints what was installed. Needs 8 GB of disk while it runs, and no GPU.
#     bash tests/lower_bounds.sh [PYTEST'S ARGUMENTS, in place of the part of the tests]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
. "$venv/bin/activate"
pip install --quiet uv
uv pip install --quiet --no-cache --resolution lowest-direct -e '.[demo,shards,ray,spark,onnx,jpeg,bench]' \
    'pytest>=8.0' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
python --version
uv pip freeze
if [ $# = 0 ]; then
    set -- tests/test_{backend,batch_columns,batch_scorer,claims,cli,data_images,detector,export,extractor,files}.py \
        tests/test_{hub,import,jpegs,metrics_aupro,metrics_auroc,model,plots,predict,predict_parquet}.py \
        tests/test_{predict_parquet_again,ray,remote,report_file,runs,score_maps,shards,spark,training}.py
fi
# How long an import takes is promised for the newest versions: of these it is 1.21 times torch's.
pytest -n auto --dist loadfile --deselect tests/test_import.py::test_import_takes_at_most_1_2_times_import_torch "$@"
