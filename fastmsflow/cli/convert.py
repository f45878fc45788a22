"""fastmsflow convert: official checkpoints to ours and back."""

from pathlib import Path
from typing import Annotated

from ..errors import InputError
from ..number_range import parse_image_size
from .imports import import_packages
from .options import MODEL, Extractor, OfficialClamp, OfficialPool, OfficialVariant, argument, option
from .options import image_size as image_size_of
from .output import print_json, print_line

NO_OPTIMIZER_STATE = (
    "without an optimizer's state: the published script can load it to test or to start from, but not resume from it;"
    " an interrupted run's state.ckpt has one"
)
OPTIMIZER_STATE = "with the optimizer's state: the published script can resume from it"


def convert(
    *,
    source: Annotated[
        Path,
        argument("FROM", "An official checkpoint, one of ours (.safetensors), or an interrupted run's state.ckpt."),
    ],
    target: Annotated[Path, argument("TO", "File for the other format.")],
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: Annotated[
        str | None,
        option(MODEL, "Local weights as for `train`, stored in TO. Default: TO uses timm's, downloaded on use."),
    ] = None,
    image_size: Annotated[
        str, image_size_of("Image size that the official model was trained at: N, or HxW, height times width.")
    ] = "512",
    pool: OfficialPool = "avg",
    clamp: OfficialClamp = 1.9,
    variant: OfficialVariant = "auto",
    fusion_first: Annotated[
        bool, option(MODEL, "For a state.ckpt: the script's Adam lists the fusion flow first.", "--fusion-first")
    ] = False,
) -> None:
    """Converts between the official checkpoint format and ours, whichever FROM is not.

    --extractor to --variant describe an official FROM, which does not hold them. An interrupted run's state.ckpt
    becomes an official checkpoint with the optimizer's state, which the published script can resume from.
    """
    import_packages("torch", "timm")
    from ..compat.convert import OfficialSettings, official_to_own, own_to_official
    from ..compat.state_dict_keys import check_variant

    note = None
    if fusion_first and source.suffix != ".ckpt":
        raise InputError("--fusion-first is of a run's state.ckpt, which has an optimizer; leave it out")
    if (target.suffix == ".safetensors") == (source.suffix in (".safetensors", ".ckpt")):
        ending = ".pt" if target.suffix == ".safetensors" else ".safetensors"
        raise InputError(f"{target}: what {source.name} is converted to ends in {ending}; give such a name")
    if source.suffix == ".safetensors":
        own_to_official(source, target)
        note = NO_OPTIMIZER_STATE
    elif source.suffix == ".ckpt":
        from ..training.read_run_state import state_to_official

        state_to_official(source, target, fusion_first)
        note = OPTIMIZER_STATE
    else:
        settings = OfficialSettings(
            extractor=extractor, extractor_weights=extractor_weights, 
            image_size=parse_image_size(str(image_size)), pool=pool, clamp=clamp, variant=check_variant(variant),
        )  # fmt: skip
        official_to_own(source, target, settings)
    print_line(f"{source} -> {target}")
    if note is not None:
        print_line(note)
    print_json({"from": str(source), "to": str(target)})
