"""Blends the log-likelihoods of an image's tiles into one map, and scores the image by it.

With w_t the window of tile t, whose sum over tiles is 1 at every pixel, and up() the bilinear map to the tile's size:
T = sum_t w_t sum_l up(logp_lt), L = T minus its maximum, peak; A = sum_t w_t sum_l up(exp(logp_lt - its maximum over
all tiles of the image)). These are the formulas of fastmsflow.scoring, with maxima of the whole image.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend
from ..ops.image_score import image_scores
from ..reference.score_map import upsample
from ..scoring import Scores, score_log_likelihoods
from ..tiling import Size, Tiling


class BlendedMaps:
    """Collects the log-likelihoods of the tiles of one image, a few KiB each, and blends them.

    ``size``: (H, W) of the image, before it is scaled; the maps have this size. Raises: InputError if ``tiling`` cannot
    cut such an image.
    """

    def __init__(self, tiling: Tiling, size: Size, name: str = "the image") -> None:
        self.tiling = tiling
        self.size = size
        self.places = tiling.places(size, name)
        self._scaled = tiling.scaled_size(size, name)
        self._levels: list[list[Tensor]] = []

    @property
    def is_complete(self) -> bool:
        """True if all tiles have been added."""
        return len(self._levels) == len(self.places)

    def add(self, levels: Sequence[Tensor]) -> None:
        """Adds the log-likelihoods of the next tile, in the order of ``places``: (H_l, W_l) per level."""
        # A view would hold the whole batch.
        self._levels.append([level.clone() for level in levels])

    def scores(self, top_k: float | None = None, backend: Backend = "auto") -> Scores:
        """Returns scores and maps of the image, a batch of one, when all tiles have been added.

        ``top_k``: share of the pixels that the scores average; None: the tiling's. Raises: InputError if ``top_k`` is
        not in [0, 1].
        """
        top_k = self.tiling.top_share if top_k is None else top_k
        logp = [torch.stack(level) for level in zip(*self._levels, strict=True)]
        side = self.tiling.tile
        if self.size == self._scaled == (side, side):
            # The only tile is the image, whose maps are those of a batch, bit by bit.
            return score_log_likelihoods(logp, self.size, top_k, backend)
        total = self._blended(logp)
        likelihood = self._blended([level - level.amax() for level in logp], exponential=True)
        peak = total.amax()
        log_likelihood = total.sub_(peak)[None]
        score, log_score = image_scores(log_likelihood, top_k, backend)
        return Scores(score, log_score, likelihood[None], log_likelihood, peak[None])

    def _blended(self, logp: Sequence[Tensor], exponential: bool = False) -> Tensor:
        """Returns the blended sum (H, W) of the levels' maps (tiles, h, w), or of their exponentials."""
        side, device = self.tiling.tile, logp[0].device
        height, width = self._scaled
        # Tiles of a smaller image end in its reflection.
        canvas = torch.zeros(max(height, side), max(width, side), device=device, dtype=logp[0].dtype)
        tiles = iter(zip(*logp, strict=True))
        rows, columns = (self.tiling.weights(length, device) for length in self._scaled)
        for top, down in rows:
            for left, across in columns:
                maps = [level[None].exp() if exponential else level[None] for level in next(tiles)]
                tile = reduce(torch.add, (upsample(level, (side, side)) for level in maps))[0]
                canvas[top : top + side, left : left + side].addcmul_(tile, down[:, None] * across)
        blended = canvas[:height, :width]
        if self._scaled == self.size:
            return blended
        return F.interpolate(blended[None, None], size=self.size, mode="bilinear", align_corners=False)[0, 0]
