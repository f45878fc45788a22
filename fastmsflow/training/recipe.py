"""How a flow is trained. The defaults are the published recipe (arXiv 2308.15300)."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..calibration import FALSE_ALARMS, check_rate
from ..errors import InputError

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Recipe:
    """How a flow is trained by Adam; the defaults are the published recipe (arXiv 2308.15300).

    A run of another length keeps the published schedule's shape. Errors: InputError where a number that must be above 0
    is not, a share is none, or the precision is not known.
    """

    lr: float = 1e-4
    """Adam's learning rate after the warm-up."""
    batch_size: int = 8
    """Images a step."""
    meta_epochs: int = 25
    """Rounds of training, an evaluation after each."""
    sub_epochs: int = 4
    """Passes over the training images in a round."""
    warm_up: float = 0.12
    """Share of the sub-epochs in which the rate rises linearly from a tenth of ``lr``: 12 of the published 100."""
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

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        for name in ("lr", "batch_size", "meta_epochs", "sub_epochs", "decay", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, share in (("warm_up", self.warm_up), *(("milestones", share) for share in self.milestones)):
            if not 0 <= share <= 1:
                raise InputError(f"{name}: {share} is no share of the sub-epochs; it must be within 0 and 1")
        if not 0 <= self.hold_out <= 0.5:
            raise InputError(f"hold_out is {self.hold_out}; it is a share of the training images, at most 0.5")
        if self.patience is not None and (self.patience < 1 or not self.hold_out):
            raise InputError(
                "patience counts rounds, at least 1, by images that were held out: give hold_out, e.g. 0.1"
            )
        check_rate(self.false_alarms)

    @property
    def epochs(self) -> int:
        """All passes over the training images."""
        return self.meta_epochs * self.sub_epochs

    def lr_factor(self, sub_epoch: int) -> float:
        """What ``lr`` is multiplied by in ``sub_epoch``, counted from 0."""
        rising = round(self.warm_up * self.epochs)
        if sub_epoch < rising:
            return 0.1 + 0.9 * sub_epoch / rising
        return self.decay ** sum(sub_epoch >= round(share * self.epochs) for share in self.milestones)
