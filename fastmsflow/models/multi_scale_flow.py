"""The multi-scale flow between pooled features and latents."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..backend import Backend
from ..errors import InputError
from ..nn.activation_checkpointing import ActivationCheckpointing
from ..nn.fusion_flow import FusionFlow
from ..nn.parallel_flow import ParallelFlow
from ..nn.positional_encoding import PositionalEncoding2d
from ..nn.streams import run_on_streams
from ..number_range import CLAMP, COUNT
from ..reference.clamp_forms import ClampForm
from ..reference.coupling import add_log_dets
from ..reference.coupling_spec import CouplingResult
from ..reference.likelihood import negative_log_likelihood
from ..scoring import TOP_K, Scores, score_log_likelihoods
from .checkpoint import OfficialLayout

PARALLEL_CLAMP_FORMS: tuple[ClampForm, ...] = ("tanh", "scaled_tanh")


class MultiScaleFlow(nn.Module):
    """Transforms pooled features to latents and back: parallel flows, then the fusion flow (arXiv 2308.15300).

    ``channels``: C_l of each level, even. ``condition_channels``: D_l of the positional encodings, multiples of 4.
    ``blocks``: coupling blocks of each level. ``clamp``: bound alpha of the log-scales. ``clamp_form``: ``"tanh"``
    (FrEIA 0.2) or ``"scaled_tanh"`` (FrEIA's git master). ``backend``: see fastmsflow.backend.

    Raises: InputError if the levels do not agree, channels are odd, or a name is not known.
    """

    clamp_form: ClampForm
    backend: Backend
    activation_checkpointing: ActivationCheckpointing | None = None
    """The way to save memory if gradients are taken; a training sets it while it runs."""
    official_layout: OfficialLayout | None = None
    """The layout of the official file that the flow was read from; None for any other flow."""

    def __init__(
        self,
        channels: Sequence[int],
        condition_channels: Sequence[int] = (64, 64, 64),
        blocks: Sequence[int] = (2, 5, 8),
        clamp: float = 1.9,
        backend: Backend = "auto",
        clamp_form: ClampForm = "tanh",
    ) -> None:
        super().__init__()
        if not len(channels) == len(condition_channels) == len(blocks):
            raise InputError(
                f"channels {tuple(channels)}, condition_channels {tuple(condition_channels)} and blocks {tuple(blocks)}"
                " must name the same number of levels"
            )
        for name, counts in (("channels", channels), ("condition_channels", condition_channels), ("blocks", blocks)):
            for count in counts:
                COUNT.check(name, count)
        CLAMP.check("clamp", clamp)
        if clamp_form not in PARALLEL_CLAMP_FORMS:
            raise InputError(f"clamp_form {clamp_form!r} is not known; choose one of {', '.join(PARALLEL_CLAMP_FORMS)}")
        self.channels = tuple(channels)
        self.condition_channels = tuple(condition_channels)
        self.blocks = tuple(blocks)
        self.clamp = clamp
        self.clamp_form = clamp_form
        self.backend = backends.check(backend)
        self.position_codes = nn.ModuleList(PositionalEncoding2d(d) for d in self.condition_channels)
        self.parallel_flows = nn.ModuleList(
            ParallelFlow(c, d, n, clamp=clamp, clamp_form=clamp_form)
            for c, d, n in zip(self.channels, self.condition_channels, self.blocks, strict=True)
        )
        self.fusion_flow = FusionFlow(self.channels, clamp)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], backend: Backend = "auto") -> "MultiScaleFlow":
        """Makes a new flow of the shape that a model's ``config`` describes, see ``fastmsflow.MSFlow.config``.

        Raises: InputError if the levels do not agree or channels are odd; KeyError or TypeError if ``config`` is
        damaged.
        """
        of_flow = config["flow"]
        arguments = {key: of_flow[key] for key in ("channels", "condition_channels", "blocks", "clamp", "clamp_form")}
        flow = cls(**arguments, backend=backend)
        flow.official_layout = OfficialLayout.from_config(config)
        return flow

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, fit for JSON, with which the constructor builds this flow again."""
        return {
            "channels": list(self.channels),
            "condition_channels": list(self.condition_channels),
            "blocks": list(self.blocks),
            "clamp": self.clamp,
            "clamp_form": self.clamp_form,
        }

    @property
    def memory(self) -> ActivationCheckpointing | None:
        """The former name of ``activation_checkpointing``."""
        return self.activation_checkpointing

    @memory.setter
    def memory(self, mode: ActivationCheckpointing | None) -> None:
        self.activation_checkpointing = mode

    def forward(self, features: Sequence[Tensor], offsets: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Computes z, of the features' shapes, and log_det (B,) in float32 or better.

        ``features``: pooled features (B, C_l, H_l, W_l) per level. ``offsets``: (B, 2), where features are those of
        tiles, the place of each tile in its image, from which the positional encoding counts: (y, x) in heights and
        widths of a tile; None: each tile's own corner.
        Raises: InputError if shapes or dtypes do not fit.
        """
        z, log_det = self._flow(features, "concat", offsets)
        return z, cast(Tensor, log_det)

    def log_likelihood_maps(
        self, features: Sequence[Tensor], offsets: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Computes -0.5 mean over channels of z^2, (B, H_l, W_l) per level, and log_det (B,), in float32 or better.

        The kernels never write z itself. The arguments are those of ``forward``.
        Raises: InputError if shapes or dtypes do not fit.
        """
        maps, log_det = self._flow(features, "likelihood", offsets)
        return maps, cast(Tensor, log_det)

    def log_likelihoods(self, features: Sequence[Tensor], offsets: Tensor | None = None) -> list[Tensor]:
        """Computes the maps of ``log_likelihood_maps`` without the log_det, which scores do not need.

        Raises: InputError if shapes or dtypes do not fit.
        """
        return self._flow(features, "likelihood", offsets, with_log_det=False)[0]

    def scores(self, features: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K) -> Scores:
        """Computes scores and maps at ``image_size`` (H, W) from pooled features (B, C_l, H_l, W_l) per level.

        ``top_k``: share of the pixels that an image's scores average.
        Raises: InputError if shapes or dtypes do not fit, or ``top_k`` is not in [0, 1].
        """
        return score_log_likelihoods(self.log_likelihoods(features), image_size, top_k, self.backend)

    def scores_and_nll(
        self, features: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K
    ) -> tuple[Scores, Tensor]:
        """Computes what ``scores`` and ``nll`` return in one pass; the arguments and errors are those of ``scores``."""
        maps, nll = self.log_likelihoods_and_nll(features)
        return score_log_likelihoods(maps, image_size, top_k, self.backend), nll

    def log_likelihoods_and_nll(
        self, features: Sequence[Tensor], offsets: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Computes what ``log_likelihoods`` and ``nll`` return in one pass; the arguments and errors are theirs."""
        maps, log_det = self.log_likelihood_maps(features, offsets)
        return maps, negative_log_likelihood(maps, self.channels, log_det)

    def inverse(self, z: Sequence[Tensor], offsets: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Computes features from z per level, and log_det (B,) of this direction: minus forward's at the same point.

        ``offsets``: those that ``forward`` had.
        Raises: InputError if shapes or dtypes do not fit.
        """
        self._check(z, offsets)
        levels, log_det = self.fusion_flow.inverse(z, self.backend)
        tasks = [
            partial(flow.inverse, level, code(level, offsets), self.backend, perm)
            for flow, code, level, perm in self._by_level(levels)
        ]
        features, log_dets = zip(*run_on_streams(tasks, levels[0].device), strict=True)
        return list(features), log_det + reduce(torch.add, log_dets)

    def nll(self, features: Sequence[Tensor], offsets: Tensor | None = None) -> Tensor:
        """0.5 sum z^2 - log_det per image, (B,) in float32 or better, in nats up to a constant (arXiv 2308.15300).

        Training minimizes the mean. The arguments are those of ``forward``.
        Raises: InputError if shapes or dtypes do not fit.
        """
        return self.log_likelihoods_and_nll(features, offsets)[1]

    def _flow(
        self,
        features: Sequence[Tensor],
        result: CouplingResult,
        offsets: Tensor | None = None,
        *,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns what ``result`` says of z per level, and log_det, or None if it is not wanted."""
        self._check(features, offsets)
        options: dict[str, Any] = {
            "activation_checkpointing": self.activation_checkpointing,
            "with_log_det": with_log_det,
        }
        tasks = [
            partial(flow.couple, level, code(level, offsets), self.backend, perm, **options)
            for flow, code, level, perm in self._by_level(features)
        ]
        levels, log_dets = zip(*run_on_streams(tasks, features[0].device), strict=True)
        results, log_det = self.fusion_flow.couple(levels, self.backend, result=result, **options)
        return results, add_log_dets([log_det, add_log_dets(log_dets)])

    def _by_level(
        self, levels: Sequence[Tensor]
    ) -> Iterator[tuple[ParallelFlow, PositionalEncoding2d, Tensor, Tensor]]:
        """Yields flow, positional encoding, features and the fusion flow's permutation of each level."""
        flows = cast("Sequence[ParallelFlow]", self.parallel_flows)
        codes = cast("Sequence[PositionalEncoding2d]", self.position_codes)
        return zip(flows, codes, levels, self.fusion_flow.input_perms, strict=True)

    def _check(self, levels: Sequence[Tensor], offsets: Tensor | None) -> None:
        if len(levels) != len(self.channels):
            raise InputError(f"{len(levels)} levels given; this flow has {len(self.channels)}")
        for i, (level, c) in enumerate(zip(levels, self.channels, strict=True)):
            if level.ndim != 4 or level.shape[1] != c or level.shape[0] != levels[0].shape[0]:
                raise InputError(
                    f"level {i} is {tuple(level.shape)}; this flow needs ({levels[0].shape[0]}, {c}, height, width)"
                )
            if not level.is_floating_point():
                raise InputError(f"level {i} is {level.dtype}; features are floating point")
        if offsets is None:
            return
        batch, device = levels[0].shape[0], levels[0].device
        if offsets.ndim != 2 or offsets.shape[0] != batch or offsets.shape[1] != 2 or offsets.device != device:
            raise InputError(
                f"offsets are {tuple(offsets.shape)} on {offsets.device}; give ({batch}, 2) on {device}, y and x of an"
                " image"
            )
