"""How a flow is trained. The defaults are the published recipe (arXiv 2308.15300)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..calibration import FALSE_ALARMS, check_rate
from ..errors import InputError
from ..nn.activation_checkpointing import ACTIVATION_CHECKPOINTING

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LEVELS = ("level0", "level1", "level2")
# The published warm-up, 12 of 100 sub-epochs, as a share of them: for runs of a few.
WARM_UP_SHARE = 0.12
# Of a flow, by the names that they are frozen and given rates by: one parallel flow, all of them, the fusion flow.
PARTS = (*LEVELS, "parallel", "fusion")


@dataclass(frozen=True)
class Recipe:
    """How a flow is trained by Adam; the defaults are the published recipe (arXiv 2308.15300).

    In a run of another length the milestones keep their shares of it, and the warm-up its number of sub-epochs, unless
    ``warm_up_share`` is given. Errors: InputError where a number that must be above 0 is not, a share is none, a name
    is not known, the warm-up has two lengths, or nothing is left to train.
    """

    lr: float = 1e-4
    """Adam's learning rate after the warm-up."""
    batch_size: int = 8
    """Images a step."""
    meta_epochs: int = 25
    """Rounds of training, an evaluation after each."""
    sub_epochs: int = 4
    """Passes over the training images in a round."""
    warm_up: int = 12
    """Sub-epochs in which the rate rises linearly from a tenth of ``lr``, however many there are in all."""
    milestones: tuple[float, ...] = (0.7, 0.9)
    """Shares of the sub-epochs after which the rate is multiplied by ``decay``: 70 and 90 of the published 100."""
    decay: float = 0.33
    """See ``milestones``."""
    clip_norm: float = 2.0
    """Bound on the gradient norm of all flow parameters."""
    precision: str = "32-true"
    """One of PRECISIONS, in Lightning's names: ``16-mixed`` is float16 autocast with a scaler."""
    seed: int = 9826
    """Of the order of images and of which are held out."""
    hold_out: float = 0.0
    """Share of the training images that are kept out of training: they choose the best round without a defective image,
    and thresholds are calibrated on them. 0 in the published recipe."""
    patience: int | None = None
    """Rounds without a lower nll of the held-out images after which training stops; None: it does not."""
    false_alarms: float = FALSE_ALARMS
    """Share of good images that may be called defective: what the threshold is calibrated for."""
    freeze: tuple[str, ...] = ()
    """Of PARTS, what is not trained: ``level0``, ``level1``, ``level2`` (a parallel flow), ``parallel`` (all of them),
    ``fusion``."""
    lr_of: Mapping[str, float] = field(default_factory=dict)
    """Of PARTS, what learns at another rate than ``lr``; a level's own counts more than ``parallel``'s."""
    accumulate: int = 1
    """Batches to a step, which equals the step of one batch as large as all of them."""
    memory: str | None = None
    """How activations are saved: ``recompute`` keeps the couplings' inputs, ``invertible`` less (see
    fastmsflow.nn.invertible), both for one more forward pass; None: they are not."""
    ema: float | None = None
    """Decay, each step, of the moving average of the weights that is evaluated and saved in their place; None: none."""
    warm_up_share: float | None = None
    """Takes the place of ``warm_up`` as a share of the sub-epochs: 0.12 is 12 of the published 100 and 5 of 40."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        for name in ("lr", "batch_size", "meta_epochs", "sub_epochs", "decay", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        self._check_warm_up()
        for name, share in (("warm_up_share", self.warm_up_share), *(("milestones", m) for m in self.milestones)):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{name}: {share} is no share of the sub-epochs; it must be within 0 and 1")
        if not 0 <= self.hold_out <= 0.5:
            raise InputError(f"hold_out is {self.hold_out}; it is a share of the training images, at most 0.5")
        if self.patience is not None and (self.patience < 1 or not self.hold_out):
            raise InputError(
                "patience counts rounds, at least 1, by images that were held out: give hold_out, e.g. 0.1"
            )
        check_rate(self.false_alarms)
        self._check_parts()
        if self.accumulate < 1:
            raise InputError(f"accumulate is {self.accumulate}; a step needs at least 1 batch")
        if self.memory is not None and self.memory not in ACTIVATION_CHECKPOINTING:
            raise InputError(
                f"memory {self.memory!r} is not known; choose one of {', '.join(ACTIVATION_CHECKPOINTING)}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is {self.ema}; a decay lies between 0 and 1, e.g. 0.999")

    def _check_warm_up(self) -> None:
        # A float was a share once, and 1.0 would pass for one sub-epoch.
        if not isinstance(self.warm_up, int) or self.warm_up < 0:
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
        for part, rate in self.lr_of.items():
            if not rate > 0:
                raise InputError(f"lr_of {part} is {rate}; it must be above 0")
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
        """By what the mean loss of an epoch's batch number ``batch``, from 0, counts in its step; ``images``: of the
        epoch. 1 but in an incomplete step: Lightning divides by ``accumulate``, however many images there are."""
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
        """What ``lr`` is multiplied by in ``sub_epoch``, counted from 0."""
        if sub_epoch < self.warm_up_epochs:
            return 0.1 + 0.9 * sub_epoch / self.warm_up_epochs
        return self.decay ** sum(sub_epoch >= round(share * self.epochs) for share in self.milestones)
