"""The multi-scale flow: pooled features <-> latents."""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..backend import Backend
from ..errors import InputError
from ..nn.activation_checkpointing import ActivationCheckpointing
from ..nn.fusion_flow import FusionFlow
from ..nn.module_lists import all_of
from ..nn.parallel_flow import ParallelFlow
from ..nn.positional_encoding import PositionalEncoding2d
from ..nn.streams import run_on_streams
from ..reference.clamp_forms import ClampForm
from ..reference.coupling import add_log_dets
from ..reference.likelihood import negative_log_likelihood
from .checkpoint import OfficialLayout


class MultiScaleFlow(nn.Module):
    """Parallel flows of the levels, then the fusion flow: pooled features <-> latents (arXiv 2308.15300).

    ``channels``: C_l of each level, even. ``condition_channels``: D_l of the position codes, multiples of 4.
    ``blocks``: coupling blocks of each level. ``clamp``: bound alpha of the log-scales. ``clamp_form``: ``"tanh"``
    (FrEIA 0.2) or ``"scaled_tanh"`` (FrEIA's git master). ``backend``: see fastmsflow.backend.
    Errors: InputError where the levels do not agree, channels are odd, or a name is not known.
    """

    channels: tuple[int, ...]
    condition_channels: tuple[int, ...]
    blocks: tuple[int, ...]
    clamp: float
    clamp_form: ClampForm
    backend: Backend
    position_codes: nn.ModuleList
    parallel_flows: nn.ModuleList
    fusion_flow: FusionFlow
    activation_checkpointing: ActivationCheckpointing | None = None
    """How memory is saved if gradients are taken; a training sets it for as long as it lasts."""
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
        if min(blocks) < 1:
            raise InputError(f"blocks {tuple(blocks)}: every level needs a coupling block")
        if clamp_form not in ("tanh", "scaled_tanh"):
            raise InputError(f"clamp_form {clamp_form!r} is not known; choose 'tanh' or 'scaled_tanh'")
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def config(self) -> dict[str, Any]:
        """The arguments with which the constructor builds this flow again, JSON-able."""
        return {
            "channels": list(self.channels),
            "condition_channels": list(self.condition_channels),
            "blocks": list(self.blocks),
            "clamp": self.clamp,
            "clamp_form": self.clamp_form,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Pooled features (B, C_l, H_l, W_l) per level -> z of the same shapes, log_det (B,) in float32 or better.

        Errors: InputError where shapes or dtypes do not fit.
        """
        levels, parallel_log_det = self._parallel(features)
        z, log_det = self.fusion_flow.latents(levels, self.backend, self.activation_checkpointing)
        return z, log_det + cast(Tensor, parallel_log_det)

    def log_likelihood_maps(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Pooled features per level -> -0.5 mean over channels of z^2, (B, H_l, W_l) per level, log_det (B,).

        In float32 or better. What nll needs; by the kernels, z itself is never written.
        Errors: as ``forward``'s.
        """
        maps, log_det = self._log_likelihood_maps(features, with_log_det=True)
        return maps, cast(Tensor, log_det)

    def log_likelihoods(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Computes the maps of ``log_likelihood_maps`` without the log_det, which scores do not need.

        Errors: as ``forward``'s.
        """
        return self._log_likelihood_maps(features, with_log_det=False)[0]

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """z per level -> features, log_det (B,) of this direction: minus forward's at the same point.

        Errors: as ``forward``'s.
        """
        self._check(z)
        levels, log_det = self.fusion_flow.inverse(z, self.backend)
        tasks = [
            partial(flow.inverse, level, code(level), self.backend, perm)
            for flow, code, level, perm in self._by_level(levels)
        ]
        features, log_dets = zip(*run_on_streams(tasks, levels[0].device), strict=True)
        return list(features), log_det + reduce(torch.add, log_dets)

    def nll(self, features: Sequence[Tensor]) -> Tensor:
        """0.5 sum z^2 - log_det per image, (B,) in float32 or better, in nats up to a constant (arXiv 2308.15300).

        Training minimises its mean. Errors: as ``forward``'s.
        """
        maps, log_det = self.log_likelihood_maps(features)
        return negative_log_likelihood(maps, self.channels, log_det)

    def _log_likelihood_maps(
        self, features: Sequence[Tensor], with_log_det: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        levels, parallel_log_det = self._parallel(features, with_log_det)
        maps, log_det = self.fusion_flow.log_likelihood_maps(
            levels, self.backend, self.activation_checkpointing, with_log_det
        )
        return maps, add_log_dets([log_det, parallel_log_det])

    def _parallel(
        self, features: Sequence[Tensor], with_log_det: bool = True
    ) -> tuple[list[list[Tensor]], Tensor | None]:
        """-> halves of each level, log_det."""
        self._check(features)
        tasks = [
            partial(
                flow.halves,
                level,
                code(level),
                self.backend,
                perm,
                activation_checkpointing=self.activation_checkpointing,
                with_log_det=with_log_det,
            )
            for flow, code, level, perm in self._by_level(features)
        ]
        levels, log_dets = zip(*run_on_streams(tasks, features[0].device), strict=True)
        return list(levels), add_log_dets(log_dets)

    def _by_level(
        self, levels: Sequence[Tensor]
    ) -> Iterator[tuple[ParallelFlow, PositionalEncoding2d, Tensor, Tensor]]:
        flows, codes = all_of(ParallelFlow, self.parallel_flows), all_of(PositionalEncoding2d, self.position_codes)
        return zip(flows, codes, levels, self.fusion_flow.input_perms, strict=True)

    def _check(self, levels: Sequence[Tensor]) -> None:
        if len(levels) != len(self.channels):
            raise InputError(f"{len(levels)} levels given; this flow has {len(self.channels)}")
        for i, (level, c) in enumerate(zip(levels, self.channels, strict=True)):
            if level.ndim != 4 or level.shape[1] != c or level.shape[0] != levels[0].shape[0]:
                raise InputError(
                    f"level {i} is {tuple(level.shape)}; this flow needs ({levels[0].shape[0]}, {c}, height, width)"
                )
            if not level.is_floating_point():
                raise InputError(f"level {i} is {level.dtype}; features are floating point")
