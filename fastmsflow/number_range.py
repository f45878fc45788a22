"""The numbers that an option takes, in the command line's help, in a file and in Python alike."""

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import InputError, cut, printable

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class NumberRange:
    """The finite numbers between two bounds; see ``whole``, ``between`` and ``above``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    """The lower bound itself is not taken."""
    open_high: bool = False
    is_whole: bool = False

    def __str__(self) -> str:
        low, high = (f"{bound:.10f}".rstrip("0").rstrip(".") for bound in (self.low, self.high))
        if self.high in (math.inf, LARGEST):
            if self.low == -math.inf:
                return "finite"
            return f"above {low}" if self.open_low else f"{low} or more"
        if not self.open_low and not self.open_high:
            return f"{low} to {high}"
        lower = f"above {low}" if self.open_low else f"{low} or more"
        return f"{lower}, {'below' if self.open_high else 'at most'} {high}"

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.is_whole else Real):
            return False
        number: Any = value
        try:
            is_finite = self.is_whole or math.isfinite(number)
        except OverflowError:
            # A whole number that no float holds.
            is_finite = False
        return bool(
            is_finite
            and (self.low < number if self.open_low else self.low <= number)
            and (number < self.high if self.open_high else number <= self.high)
        )

    def check(self, name: str, value: object) -> None:
        """Raises: InputError, which calls the number ``name``, if ``value`` is not one of these numbers."""
        if value not in self:
            shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
            kind = "a whole number, " if self.is_whole else "from " if " to " in str(self) else ""
            bounds = str(self)
            if self.is_whole and isinstance(value, Integral) and value > self.high == LARGEST:  # type: ignore[operator]
                # The help leaves this bound out.
                bounds = f"at most {LARGEST}"
            elif not self.is_whole and value == self.high == math.inf and bounds != "finite":
                bounds = f"{bounds}, and finite"
            raise InputError(f"{name} is {shown}; it must be {kind}{bounds}")


def whole(low: int, high: int = LARGEST) -> NumberRange:
    """Returns the whole numbers from ``low`` to ``high``."""
    return NumberRange(low, high, is_whole=True)


def between(low: float, high: float) -> NumberRange:
    """Returns the numbers from ``low`` to ``high``, both included."""
    return NumberRange(low, high)


def above(low: float, below: float = math.inf) -> NumberRange:
    """Returns the numbers above ``low`` and below ``below``."""
    return NumberRange(low, below, open_low=True, open_high=True)


FINITE = NumberRange()
# Numbers that options of several parts of the library take.
WORKERS = whole(0, 1024)
PROCESSES = whole(1, 65536)
COUNT = whole(1)
SEED = whole(0, 2**32 - 1)
SIDE = whole(32, 65536)
"""A side of an image in pixels; the coarsest grid of features has a pixel for every 32."""
OVERLAP = NumberRange(0, 1, open_high=True)
"""The share of a tile's side that neighbors have in common."""
SCALE = NumberRange(0, 16, open_low=True)
"""The factor of an image's sides before it is cut into tiles."""
TOP_SHARES = NumberRange(0, 1, open_low=True)
"""The share of an image's pixels that its scores average."""
RATE = above(0, 1)
"""A share of good images that may be called defective: none and all need no threshold."""
FALSE_PIXEL_RATES = between(1e-5, 0.1)
"""A mean share of good images' pixels that may be called defective."""
SHARE = between(0, 1)
CLAMP = between(1e-6, 1e6)
"""The strength of a soft clamp."""


def check_image_size(size: object, name: str = "image_size") -> tuple[int, int]:
    """Returns ``size`` as (H, W). Raises: InputError if it is not two sides."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InputError(f"{name} is {size!r}; it must be (height, width)")
    for side in size:
        SIDE.check(name, side)
    return int(size[0]), int(size[1])


def parse_image_size(text: str, name: str = "image_size") -> tuple[int, int]:
    """Returns the (H, W) of ``text``, N or HxW. Raises: InputError, which calls the text ``name``, if it is neither."""
    if not re.fullmatch(r"-?\d{1,20}([xX]-?\d{1,20})?", text.strip(), re.ASCII):
        raise InputError(f"{name} {printable(cut(text))}: give N or HxW, height x width, e.g. 512 or 512x768")
    sides = [int(side) for side in text.lower().split("x")]
    return check_image_size((sides[0], sides[-1]), name)


def image_size_option(size: tuple[int, int]) -> int | str:
    """Returns (H, W) as options and configuration files have it: N for a square, or else ``"HxW"``."""
    height, width = size
    return height if height == width else f"{height}x{width}"


def parse_whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """Returns the numbers of ``text``, e.g. ``"2,5,8"``.

    Raises: InputError, which calls the text ``name``, if it is not three whole numbers.
    """
    numbers = text.split(",")
    if len(numbers) != 3 or not all(re.fullmatch(r"\s*-?\d{1,9}\s*", number, re.ASCII) for number in numbers):
        raise InputError(f"{name} {printable(cut(text))}: give three whole numbers with commas, e.g. 2,5,8")
    return tuple(map(int, numbers))
