"""Changes of light: brightness, contrast, gamma, white balance, a directional gradient, blur and sensor noise."""

from dataclasses import dataclass

from torch import Tensor

from ..tiling import Place, Size


@dataclass(frozen=True)
class LightChange:
    """Changes the light of an image."""

    brightness: float = 1.0
    """The factor of all pixels."""

    def __call__(self, pixels: Tensor, *, corner: Place = (0, 0), size: Size | None = None) -> Tensor:
        """Returns pixels (3, h, w) float32 in [0, 1] under this light.

        ``corner``: the place of these pixels in an image of ``size``, in which the gradient runs; None: they are all.
        """
        return (pixels * self.brightness).clamp(0, 1)
