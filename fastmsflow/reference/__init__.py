"""Every operation of the flow in plain PyTorch: the oracle that the kernels are checked against, and the CPU path.

Maps are logically (B, C, H, W) in any memory format. Sums run in float32 or better whatever the maps' dtype. A file has
the name of its operation in fastmsflow.ops and fastmsflow.kernels; clamp_forms, coupling_spec and dtypes are shared.
"""
