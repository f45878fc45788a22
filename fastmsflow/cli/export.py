"""fastmsflow export: a model as a graph that runs without this library."""

import warnings
from pathlib import Path
from typing import Annotated

from ..errors import InputError
from .imports import import_packages
from .options import MODEL, OUTPUT, ModelPath, argument, option
from .output import console, print_json, print_line

DTYPES = ("float32", "float16", "bfloat16")


def export(
    *,
    model: ModelPath,
    to: Annotated[Path, argument("TO", "model.onnx, or model.pt2 for a torch.export program or --compiled.")],
    compiled: Annotated[
        bool, option(OUTPUT, "Write an AOTInductor package of machine code for this machine's device.", "--compiled")
    ] = False,
    dtype: Annotated[
        str, option(MODEL, "dtype of a compiled package: float32, or float16 and bfloat16 as for `predict`.")
    ] = "float32",
) -> None:
    """Writes MODEL as a graph that runs without this library, checked against it: ONNX, torch.export, AOTInductor."""
    if to.suffix not in (".onnx", ".pt2") or (compiled and to.suffix != ".pt2"):
        raise InputError(f"{to}: give a name that ends in .onnx or .pt2; a compiled package is a .pt2")
    if dtype not in DTYPES or (dtype != "float32" and not compiled):
        raise InputError(f"dtype {dtype}: float32, or with --compiled one of {', '.join(DTYPES)}")
    import_packages("torch", "timm")
    from ..inference import resolve_dtype
    from ..inference.loading import load_model
    from ..integrations.export import export_onnx, export_package, export_program

    network = load_model(model)
    chosen = resolve_dtype(dtype, next(network.parameters()).device)
    with console.status("exporting and comparing ..."), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            exported = export_package(network, to, chosen)
        elif to.suffix == ".onnx":
            exported = export_onnx(network, to)
        else:
            exported = export_program(network, to)
    size, difference = exported.path.stat().st_size, exported.difference
    print_line(f"{model} -> {to} ({size / 2**20:.0f} MiB); scores differ by at most {difference:.0e}")
    print_json({"from": str(model), "to": str(to), "bytes": size, "difference": difference})
