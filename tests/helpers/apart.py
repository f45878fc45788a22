"""Names of the test files that xdist's workers leave to processes of their own."""

FILES = {
    "test_deployment.py",
    "test_export_openvino.py",
    "test_openvino_engine.py",
    "test_openvino_files.py",
    "test_openvino_int8.py",
    "test_predict_openvino.py",
}
