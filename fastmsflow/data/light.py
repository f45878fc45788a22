"""Changes of light: brightness, contrast, gamma, white balance, a directional gradient, blur and sensor noise.

``draw_light`` draws those that training shows a model; LIGHT_CORRUPTIONS are those that a test applies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, cut
from ..number_range import SEED, NumberRange, above, between
from ..tiling import Place, Size

AUGMENTATIONS = ("light",)
"""The names that ``train --augment`` takes."""
CORRUPTIONS = ("light",)
"""The names that ``evaluate --corrupt`` takes."""

_FACTOR = above(0, 10)
_FIELDS: dict[str, NumberRange] = {
    "brightness": _FACTOR,
    "contrast": between(0, 10),
    "gamma": _FACTOR,
    "red": _FACTOR,
    "blue": _FACTOR,
    "gradient": between(0, 1),
    "gradient_angle": between(0, 360),
    # The kernel is 3 sigma wide on each side, and must be less so than the smallest image.
    "blur": between(0, 10),
    "noise": between(0, 1),
    "noise_seed": SEED,
}
# Blur and noise are computed for so many rows and pixels at once, so that their memory is small beside the image's.
_BLURRED_ROWS, _NOISY_PIXELS = 256, 2**20


@dataclass(frozen=True, kw_only=True)
class LightChange:
    """Changes the light of an image as lamp, lens, sensor and camera do, in this order; the defaults change nothing.

    Lamp: ``red``, ``blue``, ``gradient`` and ``brightness``; lens: ``blur``; sensor: ``noise``; camera: ``contrast``
    and ``gamma``. The same change of the same pixels gives the same pixels in every process.

    Raises: InputError if a number is out of its range.
    """

    brightness: float = 1.0
    """The factor of all pixels."""
    contrast: float = 1.0
    """The factor of the differences from the mean gray value of the pixels."""
    gamma: float = 1.0
    """The exponent of the pixels: above 1 is darker."""
    red: float = 1.0
    """The white balance: the factor of red."""
    blue: float = 1.0
    """The white balance: the factor of blue."""
    gradient: float = 0.0
    """The light falls off from a factor of 1 + gradient to 1 - gradient across the image."""
    gradient_angle: float = 0.0
    """The direction in which the light is brightest, in degrees: 0 right, 90 down, 180 left, 270 up."""
    blur: float = 0.0
    """The standard deviation of a Gaussian blur, in pixels."""
    noise: float = 0.0
    """The standard deviation of the sensor's Gaussian noise, where white is 1."""
    noise_seed: int = 0
    """The seed of the noise."""

    def __post_init__(self) -> None:
        for name, numbers in _FIELDS.items():
            numbers.check(name, getattr(self, name))

    def __call__(self, pixels: Tensor, *, corner: Place = (0, 0), size: Size | None = None) -> Tensor:
        """Returns pixels (3, h, w) float32 in [0, 1] under this light; ``pixels`` themselves stay as they are.

        ``corner``: the place (top, left) of these pixels in an image of ``size`` (H, W), in which the gradient runs;
        None: they are all. Each place has noise of its own. Contrast is about the mean of these pixels.
        """
        from torchvision.transforms.v2 import functional  # slow to import

        is_lit = self.red != 1 or self.blue != 1 or self.gradient > 0
        if is_lit:
            # May exceed white until the brightness is known, as light does before it meets the sensor.
            pixels = pixels * torch.tensor([self.red, 1, self.blue])[:, None, None]
            pixels *= self._gradient(corner, (pixels.shape[1], pixels.shape[2]), size)
        if is_lit or self.brightness != 1:
            pixels = functional.adjust_brightness(pixels, self.brightness)
        if self.blur:
            pixels = _blurred(pixels, self.blur)
        if self.noise:
            pixels = self._noisy(pixels, corner)
        if self.contrast != 1:
            pixels = functional.adjust_contrast(pixels, self.contrast)
        if self.gamma != 1:
            pixels = functional.adjust_gamma(pixels, self.gamma)
        return pixels

    def for_image(self, number: int) -> "LightChange":
        """Returns this change with the noise of the image ``number`` of a set."""
        return replace(self, noise_seed=number)

    def _gradient(self, corner: Place, shape: Size, size: Size | None) -> Tensor:
        """Returns the factors (h, w) of the gradient, which is linear and 1 in the middle of the whole image."""
        height, width = size or shape
        angle = math.radians(self.gradient_angle)
        down, right = math.sin(angle), math.cos(angle)
        # The corners of the image reach 1 and -1; an image of one pixel has no direction.
        reach = max(abs(down) * (height - 1) / 2 + abs(right) * (width - 1) / 2, 1e-6)
        rows = (torch.arange(shape[0], dtype=torch.float64) + (corner[0] - (height - 1) / 2)) * (down / reach)
        columns = (torch.arange(shape[1], dtype=torch.float64) + (corner[1] - (width - 1) / 2)) * (right / reach)
        return 1 + self.gradient * (rows[:, None].float() + columns.float())

    def _noisy(self, pixels: Tensor, corner: Place) -> Tensor:
        # torchvision's noise comes from the global random state.
        random = np.random.default_rng([self.noise_seed, *corner])
        noisy = pixels.contiguous().clone()
        for part in noisy.view(-1).split(_NOISY_PIXELS):
            part += self.noise * torch.from_numpy(random.standard_normal(len(part), dtype=np.float32))
        return noisy.clamp_(0, 1)


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    radius = math.ceil(3 * sigma)
    blurred = torch.empty_like(pixels)
    for top in range(0, pixels.shape[1], _BLURRED_ROWS):
        first = max(0, top - radius)
        rows = pixels[:, first : top + _BLURRED_ROWS + radius]
        strip = functional.gaussian_blur(rows, [2 * radius + 1] * 2, [sigma] * 2)
        blurred[:, top : top + _BLURRED_ROWS] = strip[:, top - first : top - first + _BLURRED_ROWS]
    return blurred


LIGHT_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "brightness": (0.7, 1.3),
        "contrast": (0.8, 1.2),
        "gamma": (0.8, 1.25),
        "red": (0.9, 1.1),
        "blue": (0.9, 1.1),
        "gradient": (0.0, 0.25),
        "gradient_angle": (0.0, 360.0),
        "blur": (0.0, 1.0),
        "noise": (0.0, 0.02),
    }
)
"""The ranges from which ``draw_light`` draws each parameter of a LightChange, all of them equally likely."""

LIGHT_CORRUPTIONS: Mapping[str, LightChange] = MappingProxyType(
    {
        "darker": LightChange(brightness=0.6),
        "brighter": LightChange(brightness=1.4),
        "low contrast": LightChange(contrast=0.6),
        "low gamma": LightChange(gamma=0.7),
        "high gamma": LightChange(gamma=1.5),
        "warm": LightChange(red=1.15, blue=0.85),
        "cold": LightChange(red=0.85, blue=1.15),
        "gradient": LightChange(gradient=0.35, gradient_angle=35),
        "blurred": LightChange(blur=1.5),
        "noisy": LightChange(noise=0.03),
    }
)
"""The changes of a test, by their names: one property each, beyond the range of training."""


def draw_light(*key: int) -> LightChange:
    """Draws a change of light from LIGHT_RANGES.

    ``key``: whole numbers of 0 or more, such as a seed, an epoch and an image's number: the same key gives the same
    change on every machine, and another key another one.
    """
    random = np.random.default_rng([len(key), *key])
    drawn = {name: low + (high - low) * random.random() for name, (low, high) in LIGHT_RANGES.items()}
    return LightChange(**drawn, noise_seed=int(random.integers(2**32)))


def check_augment(name: str | None) -> str | None:
    """Returns ``name``. Raises: InputError if it is neither None nor one of AUGMENTATIONS."""
    return _checked("augment", name, AUGMENTATIONS)


def check_corrupt(name: str | None) -> str | None:
    """Returns ``name``. Raises: InputError if it is neither None nor one of CORRUPTIONS."""
    return _checked("corrupt", name, CORRUPTIONS)


def _checked(option: str, name: str | None, known: tuple[str, ...]) -> str | None:
    if name is not None and name not in known:
        raise InputError(f"{option} {cut(name)!r} is not known; give {' or '.join(known)}, or leave it out")
    return name
