"""Settings of a training run: how a flow is trained (Recipe) and how its images are read (DataConfig).

The command line builds the options of ``train`` from the fields of both classes, so this module imports neither torch
nor Lightning. The defaults are the published recipe (arXiv 2308.15300).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .calibration import FALSE_ALARMS
from .errors import InputError
from .number_range import COUNT, FALSE_PIXEL_RATES, RATE, SEED, SHARE, WORKERS, NumberRange, above, between, whole
from .pixel_calibration import FALSE_PIXELS

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LEVELS = ("level0", "level1", "level2")
# The published warm-up, 12 of 100 sub-epochs, as a share of them: for runs of a few sub-epochs.
WARM_UP_SHARE = 0.12
# Parts of a flow that can be frozen or given a learning rate: one parallel flow, all of them, the fusion flow.
PARTS = (*LEVELS, "parallel", "fusion")

VARIANTS = 4
"""Views of each training image or tile that are kept where nobody asks for another number."""
JITTER, COUNTED_VARIANTS = whole(0, 65536), whole(2, 64)

FALSE_PIXELS_HELP = (
    "Mean share of a good image's pixels that may be called defective; sets the threshold of pixels. Rates between"
    " 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten take the next lower one."
)

DATA, OPTIMIZATION, MEMORY_AND_SPEED = "Data", "Optimization", "Memory and speed"
VALIDATION, ADVANCED = "Validation", "Advanced"


def option(default: Any, panel: str, help: str, *, range: NumberRange | None = None, **more: Any) -> Any:
    """Returns a dataclass field that the command line offers as an option.

    ``panel``: the group of options in ``--help``; ``help``: one short sentence; ``range``: the numbers that are taken;
    ``more``: ``name`` where the option is not called like the field, ``metavar``, and ``type`` where the command line
    takes another type.
    """
    metadata = {"panel": panel, "help": help, "range": range, **more}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(settings: Any) -> None:
    """Checks the numbers of a dataclass whose fields ``option`` has made.

    Raises: InputError, which names the field, if one is not in its range.
    """
    for field_ in fields(settings):
        numbers: NumberRange | None = field_.metadata["range"]
        value = getattr(settings, field_.name)
        if numbers is None or (value is None and field_.default is None):
            continue
        if isinstance(value, Mapping):
            named = [(f"{field_.name} {key}", item) for key, item in value.items()]
        else:
            named = [(field_.name, item) for item in (value if isinstance(value, (tuple, list)) else [value])]
        for name, item in named:
            numbers.check(name, item)


@dataclass(frozen=True)
class Recipe:
    """Settings of the training of a flow by Adam; the defaults are the published recipe (arXiv 2308.15300).

    In a run of another length the milestones keep their shares of it, and the warm-up its number of sub-epochs, unless
    ``warm_up_share`` is given.

    Raises: InputError if a number is not positive that must be, a share is not within its bounds, a name is not known,
    the warm-up has two lengths, or nothing is left to train.
    """

    lr: float = option(1e-4, OPTIMIZATION, "Adam's learning rate.", range=above(0))
    """Adam's learning rate after the warm-up."""
    batch_size: int = option(8, OPTIMIZATION, "Images, or tiles, in a batch.", range=COUNT)
    """Images, or tiles, in a batch."""
    meta_epochs: int = option(25, OPTIMIZATION, "Rounds of training, each followed by an evaluation.", range=COUNT)
    """Rounds of training, each followed by an evaluation."""
    sub_epochs: int = option(4, OPTIMIZATION, "Passes over the training images in a round.", range=COUNT)
    """Passes over the training images in a round."""
    warm_up: int = option(
        12, OPTIMIZATION, "Passes in which the learning rate rises from a tenth to --lr.",
        name="warmup", type=float, metavar="N", range=whole(0),
    )  # fmt: skip
    """Sub-epochs in which the rate rises linearly from a tenth of ``lr``, whatever the length of the run."""
    milestones: tuple[float, ...] = option(
        (0.7, 0.9), OPTIMIZATION, "Share of the passes after which the learning rate falls; repeatable.", range=SHARE
    )
    """Shares of the sub-epochs after which the rate is multiplied by ``decay``: 70 and 90 of the published 100."""
    decay: float = option(0.33, OPTIMIZATION, "Factor of the learning rate at each milestone.", range=above(0))
    """Factor of the learning rate at each milestone."""
    clip_norm: float = option(
        2.0, OPTIMIZATION, "Bound on the norm of the gradient of all flow weights.", range=above(0)
    )
    """Bound on the gradient norm of all flow parameters."""
    precision: str = option("32-true", MEMORY_AND_SPEED, "32-true, bf16-mixed, or 16-mixed with a gradient scaler.")
    """One of PRECISIONS, in Lightning's names: ``16-mixed`` is float16 autocast with a scaler. On a CPU ``bf16-mixed``
    is for chips with AMX-BF16 or AVX512-BF16; an InputWarning tells if this one has neither."""
    seed: int = option(
        9826,
        ADVANCED,
        "Seed of the initial weights, the order of images and the held-out images.",
        range=SEED,
    )
    """Seed of the order of images and of the choice of held-out images."""
    hold_out: float = option(
        0.0, VALIDATION,
        "Share of the training images held out to choose the best round and to set the threshold, without a defective"
        " image. 0: the published recipe, and no threshold. A set with validation images of its own has these do both:"
        " none of its training images is held out.", range=between(0, 0.5),
    )  # fmt: skip
    """Share of the training images that are kept out of training: they choose the best round without a defective image,
    and thresholds are calibrated on them. 0 in the published recipe, and for a set with validation images of its own,
    which do both in their place."""
    patience: int | None = option(
        None,
        VALIDATION,
        "Rounds without a lower held-out nll after which training stops. Default: no early stop.",
        range=COUNT,
    )
    """Rounds without a lower nll of the held-out images after which training stops; None: no early stop."""
    false_alarms: float = option(
        FALSE_ALARMS, VALIDATION, "Share of good images that may be called defective; sets the threshold.", range=RATE
    )
    """Share of good images that may be called defective, for which the threshold is calibrated."""
    false_pixels: float = option(FALSE_PIXELS, VALIDATION, FALSE_PIXELS_HELP, metavar="RATE", range=FALSE_PIXEL_RATES)
    """Mean share of a good image's pixels that may be called defective, for which the threshold of pixels is
    calibrated."""
    freeze: tuple[str, ...] = option(
        (), ADVANCED,
        "Part that is not trained: level0, level1, level2, parallel (all three) or fusion; repeatable.", metavar="PART",
    )  # fmt: skip
    """Those of PARTS that are not trained: ``level0``, ``level1``, ``level2`` (a parallel flow), ``parallel`` (all of
    them), ``fusion``."""
    lr_of: Mapping[str, float] = option(
        {}, ADVANCED, "Learning rate of one part, e.g. fusion=1e-5; repeatable.",
        name="part_lr", metavar="PART=RATE", range=above(0),
    )  # fmt: skip
    """Those of PARTS that learn at another rate than ``lr``; a level's own rate counts more than ``parallel``'s."""
    accumulate: int = option(
        1, MEMORY_AND_SPEED, "Batches per step; a step equals that of one batch as large as all of them.",
        name="accumulate_grad_batches", range=COUNT,
    )  # fmt: skip
    """Batches per step; a step equals that of one batch as large as all of them."""
    memory: str | None = option(
        None, MEMORY_AND_SPEED,
        "recompute or invertible: compute activations again in the backward pass instead of storing them; invertible"
        " stores least. Default: store all.",
        name="activation_checkpointing",
    )  # fmt: skip
    """Method of storing activations: ``recompute`` stores the couplings' inputs, ``invertible`` less (see
    fastmsflow.nn.invertible), both for one more forward pass; None: all are stored."""
    ema: float | None = option(
        None, OPTIMIZATION,
        "Decay of a moving average of the weights, e.g. 0.999, which is evaluated and saved in their place."
        " Default: no average.", range=above(0, 1),
    )  # fmt: skip
    """Decay per step of the moving average of the weights that is evaluated and saved in their place; None: no
    average."""
    warm_up_share: float | None = option(
        None, OPTIMIZATION, "Warm-up as a share of the passes, in place of --warmup, e.g. 0.12 for a short run.",
        name="warmup_share", range=SHARE,
    )  # fmt: skip
    """Takes the place of ``warm_up`` as a share of the sub-epochs: 0.12 is 12 of the published 100 and 5 of 40."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        self._check_warm_up()
        check_ranges(self)
        self._check_parts()
        if self.memory is not None:
            from .nn.activation_checkpointing import ACTIVATION_CHECKPOINTING  # imports torch

            if self.memory not in ACTIVATION_CHECKPOINTING:
                raise InputError(
                    f"memory {self.memory!r} is not known; choose one of {', '.join(ACTIVATION_CHECKPOINTING)}"
                )

    def _check_warm_up(self) -> None:
        # A float was a share once, and 1.0 would pass for one sub-epoch.
        if isinstance(self.warm_up, float):
            raise InputError(
                f"warm_up is {self.warm_up}; it is a whole number of sub-epochs: give warm_up_share for a share of them"
            )
        if self.warm_up_share is not None and self.warm_up != Recipe.warm_up:
            raise InputError(f"warm_up is {self.warm_up} and warm_up_share {self.warm_up_share}; give one of the two")

    def _check_parts(self) -> None:
        for name, parts in (("freeze", self.freeze), ("lr_of", self.lr_of)):
            for part in parts:
                if part not in PARTS:
                    raise InputError(f"{name}: the flow has no part {part!r}; choose of {', '.join(PARTS)}")
        if not self.rates:
            raise InputError(f"freeze {', '.join(self.freeze)}: nothing is left to train; leave a part out")
        for part in self.lr_of:
            if part not in self.rates and not (part == "parallel" and any(level in self.rates for level in LEVELS)):
                raise InputError(f"lr_of {part}: it is frozen and does not learn; leave one of the two out")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each level's parallel flow and of the fusion flow, of those that are not frozen."""
        of_levels = self.lr_of.get("parallel", self.lr)
        rates = {level: self.lr_of.get(level, of_levels) for level in LEVELS if "parallel" not in self.freeze}
        rates["fusion"] = self.lr_of.get("fusion", self.lr)
        return {part: rate for part, rate in rates.items() if part not in self.freeze}

    def share(self, batch: int, images: int) -> float:
        """Returns the weight of the mean loss of batch number ``batch``, from 0, in its step.

        ``images``: number of images of the epoch. The weight is 1 except in an incomplete step, since Lightning divides
        by ``accumulate`` whatever the number of images.
        """
        if self.accumulate == 1:
            return 1.0
        step = batch - batch % self.accumulate
        of_step = min(images - step * self.batch_size, self.accumulate * self.batch_size)
        of_batch = min(images - batch * self.batch_size, self.batch_size)
        return self.accumulate * of_batch / of_step

    @property
    def epochs(self) -> int:
        """All passes over the training images."""
        return self.meta_epochs * self.sub_epochs

    @property
    def warm_up_epochs(self) -> int:
        """Sub-epochs of the warm-up, which may be more than there are in all."""
        return self.warm_up if self.warm_up_share is None else round(self.warm_up_share * self.epochs)

    @property
    def ends_in_warm_up(self) -> bool:
        """True where the last sub-epoch is one of the warm-up, so that the rate never reaches ``lr``."""
        return self.epochs <= self.warm_up_epochs

    def lr_factor(self, sub_epoch: int) -> float:
        """Returns the factor of ``lr`` in ``sub_epoch``, counted from 0."""
        if sub_epoch < self.warm_up_epochs:
            return 0.1 + 0.9 * sub_epoch / self.warm_up_epochs
        return self.decay ** sum(sub_epoch >= round(share * self.epochs) for share in self.milestones)


@dataclass(frozen=True)
class DataConfig:
    """Settings of reading images and of storing their features.

    Raises: InputError if a number is out of its range, or options contradict each other.
    """

    workers: int = option(0, DATA, "Processes that read images; 0: this process reads them.", range=WORKERS)
    """Processes that read images."""
    feature_cache: Path | None = option(  # noqa: RUF009
        None, DATA, "Folder that stores features for this run and later ones. Default: in memory, for this run.",
        metavar="DIR",
    )  # fmt: skip
    """A folder that stores features for this run and later ones; None: they are stored in memory, in float32."""
    cache_dtype: str = option("bf16", DATA, "dtype of the features in --feature-cache: bf16 or float32.")
    """dtype of the features in ``feature_cache``: bf16 or float32."""
    stream: bool = option(
        False, DATA, "Store no features: read images and run the extractor in every pass, as for shards always."
    )
    """No features are stored: images go through the extractor in every pass. Those of shards always do."""
    skip_faults: Path | None = option(  # noqa: RUF009
        None, DATA, "File that names shards and images that cannot be read; they are skipped.", name="error_log"
    )
    """File that names shards, and images in them, that cannot be read and are skipped; None: they are errors."""
    decode_on_gpu: bool = option(
        False, DATA, "Decode streamed JPEG files on the GPU, and resize them by a bicubic filter instead of Lanczos."
    )
    """JPEG files that are streamed are decoded by the model's GPU, see fastmsflow.data.jpeg_decoder."""
    augment: str | None = option(
        None, DATA,
        "light: show training images under varied brightness, contrast, gamma, white balance, gradient, blur, noise.",
        metavar="light",
    )  # fmt: skip
    """``light``: training images, or tiles of them, are shown in changed light, see fastmsflow.data.light."""
    tile_jitter: int = option(
        0, DATA, "Pixels by which each tile of a training image is moved at most.", metavar="PIXELS", range=JITTER
    )
    """Pixels by which each tile of a training image is moved at most in each direction, inside the image."""
    augment_variants: int | None = option(
        None, DATA,
        "Views of each training image or tile whose features are kept, the first one unchanged; a pass takes one of"
        f" each. Default: {VARIANTS} with --augment or --tile-jitter.", range=COUNTED_VARIANTS,
    )  # fmt: skip
    """Views of each training image or tile whose features are kept, the first one unchanged; None: 4 if they differ.
    Streamed images are drawn anew in each pass."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.augment_variants is not None and not self.varies:
            raise InputError("augment_variants counts views that differ; give augment or tile_jitter, or leave it out")
        if self.augment_variants is not None and self.stream:
            raise InputError("augment_variants: views are drawn anew when images are streamed; leave it out")

    @property
    def varies(self) -> bool:
        """True if an image, or tile, has views that differ."""
        return self.augment is not None or self.tile_jitter > 0

    @property
    def variants(self) -> int:
        """The number of views of each training image, or tile, whose features are kept."""
        return self.augment_variants or (VARIANTS if self.varies and not self.stream else 1)
