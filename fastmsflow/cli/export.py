"""fastmsflow export: a model as a graph that runs without this library."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import InputError
from .imports import import_packages
from .options import MODEL, OUTPUT, ModelPath, argument, option
from .output import console, print_json, print_line

if TYPE_CHECKING:
    from ..tiling import Tiling

DTYPES = ("float32", "float16", "bfloat16")


def export(
    *,
    model: ModelPath,
    to: Annotated[
        Path, argument("TO", "model.onnx; model.xml for OpenVINO; model.pt2 for a torch.export program or --compiled.")
    ],
    compiled: Annotated[
        bool, option(OUTPUT, "Write an AOTInductor package of machine code for this machine's device.", "--compiled")
    ] = False,
    dtype: Annotated[
        str, option(MODEL, "dtype of a compiled package: float32, or float16 and bfloat16 as for `predict`.")
    ] = "float32",
    int8: Annotated[
        list[str] | None,
        option(
            MODEL,
            "OpenVINO: compute convolutions in INT8, as far as half of these good images, 20 at least, score as before;"
            " value ranges come from the other half. Give images, folders or patterns as to `predict`.",
            metavar="GOOD_IMAGES",
        ),
    ] = None,
) -> None:
    """Writes MODEL as a graph that runs without this library, checked against it.

    It is for ONNX Runtime, OpenVINO, torch.export or AOTInductor. An OpenVINO model is two files, .xml and .bin.
    """
    if to.suffix not in (".onnx", ".xml", ".pt2") or (compiled and to.suffix != ".pt2"):
        raise InputError(f"{to}: give a name that ends in .onnx, .xml or .pt2; a compiled package is a .pt2")
    if int8 is not None and to.suffix != ".xml":
        raise InputError(f"{to}: --int8 is for OpenVINO; give a name that ends in .xml, or leave it out")
    if dtype not in DTYPES or (dtype != "float32" and not compiled):
        raise InputError(f"dtype {dtype}: float32, or with --compiled one of {', '.join(DTYPES)}")
    import_packages("torch", "timm")
    from ..inference import resolve_dtype
    from ..inference.loading import load_model
    from ..integrations.export import export_onnx, export_openvino, export_package, export_program

    good = None if int8 is None else _good_images(int8)
    network = load_model(model)
    chosen = resolve_dtype(dtype, next(network.parameters()).device)
    with console.status("exporting and comparing ..."), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            exported = export_package(network, to, chosen)
        elif to.suffix == ".onnx":
            exported = export_onnx(network, to)
        elif to.suffix == ".xml":
            exported = export_openvino(network, to, good)
        else:
            exported = export_program(network, to)
    size, difference = sum(file.stat().st_size for file in exported.files), exported.difference
    print_line(f"{model} -> {to} ({size / 2**20:.0f} MiB); scores differ by at most {difference:.0e}")
    if network.tiling is not None:
        print_line(_of_tiles(network.tiling))
    if exported.int8 is not None:
        print_line(str(exported.int8))
    print_json(
        {
            "from": str(model),
            "to": str(to),
            "bytes": size,
            "difference": difference,
            "tiling": network.tiling and network.tiling.config,
            "int8": exported.int8 and exported.int8.as_dict(),
        }
    )


def _of_tiles(tiling: "Tiling") -> str:
    """Returns what the user of a graph of tiles has to know."""
    encodings = "its own corner"
    if tiling.position == "image":
        encodings = "its place in the image, the input offsets"
    return (
        f"it takes one tile of {tiling.tile}x{tiling.tile}, whose positional encoding begins at {encodings}; {tiling}:"
        " cut them and blend the output absolute_map, see docs/deployment.md"
    )


def _good_images(sources: list[str]) -> list[Path]:
    from ..data.file_search import find_images

    found = find_images(sources, sys.stdin.buffer)
    if found.faults:
        raise InputError(found.faults[0])
    return found.files
