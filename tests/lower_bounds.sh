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
uv pip install --quiet --no-cache --resolution lowest-direct -e '.[demo,shards,ray,spark,onnx,openvino,jpeg,bench]' \
    'pytest>=8.0' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
python --version
uv pip freeze
if [ $# = 0 ]; then
    set -- tests/unit/test_{backend,files,folder_locks,import,number_range}.py tests/unit/cli/test_cli.py \
        tests/unit/data/test_{image_io,jpeg_decoder,url_images}.py tests/unit/data/shards/test_shards.py \
        tests/unit/inference/test_{batch_columns,batch_scorer,batch_scorer_models,openvino_engine,openvino_int8}.py \
        tests/unit/inference/test_{regions,score_maps}.py \
        tests/unit/integrations/test_{export,scikit_learn}.py tests/unit/metrics/test_{aupro,auroc}.py \
        tests/unit/models/test_{hub,msflow}.py tests/unit/nn/test_feature_extractor.py tests/unit/training/test_train.py \
        tests/unit/visualization/test_{html_report,image_visualizer,plots}.py \
        tests/integration/test_{evaluate_runs,predict,predict_faults,predict_parquet,predict_parquet_again}.py \
        tests/integration/test_{ray,run_directory,runs,spark}.py
fi
# How long an import takes is promised for the newest versions: of these it is 1.21 times torch's.
pytest -n auto --dist loadfile --deselect tests/unit/test_import.py::test_import_takes_at_most_1_2_times_import_torch "$@"
