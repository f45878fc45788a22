"""FrEIA's live modules as an MSFlow user has them, and the user's own lines around them."""

from types import SimpleNamespace

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from benchmarks.peers.freia import CrossCoupling, freia_flow
from fastmsflow.nn.positional_encoding import positional_encoding_2d

CHANNELS, CONDITIONS, BLOCKS, GRIDS = (16, 24, 40), (8, 16, 8), (1, 2, 2), ((8, 12), (4, 6), (2, 3))
CONFIG = SimpleNamespace(c_conds=CONDITIONS, parallel_blocks=BLOCKS, clamp_alpha=1.9)


class LiveCoupling(Fm.InvertibleModule):
    """The fusion's coupling as a node of FrEIA's graph."""

    def __init__(self, dims_in, clamp: float) -> None:
        super().__init__(dims_in)
        inner = CrossCoupling([dims[0] for dims in dims_in], clamp)
        self.subnet_1, self.subnet_2 = inner.subnet_1, inner.subnet_2
        self.inner = [inner]

    def forward(self, x, rev=False, jac=True):
        return self.inner[0](x)

    def output_dims(self, dims_in):
        return dims_in


def live_flows(seed: int = 0) -> tuple[list[nn.Module], nn.Module]:
    """The fusion flow a graph."""
    torch.manual_seed(seed)
    levels = zip(CHANNELS, CONDITIONS, BLOCKS, GRIDS, strict=True)
    parallel = [freia_flow(c, d, n, grid) for c, d, n, grid in levels]
    inputs = [Ff.InputNode(c, *grid) for c, grid in zip(CHANNELS, GRIDS, strict=True)]
    permuted = [Ff.Node(node, Fm.PermuteRandom, {"seed": seed}) for node in inputs]
    coupled = Ff.Node([node.out0 for node in permuted], LiveCoupling, {"clamp": 1.9})
    outputs = [Ff.OutputNode(getattr(coupled, f"out{i}")) for i in range(3)]
    return parallel, Ff.GraphINN([*inputs, *permuted, coupled, *outputs])


def conditions(batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    """Returns the conditions as MSFlow's loop makes them: repeated for every image."""
    codes = (
        positional_encoding_2d(d, *grid, dtype=dtype, device=device) for d, grid in zip(CONDITIONS, GRIDS, strict=True)
    )
    return [code.repeat(batch, 1, 1, 1) for code in codes]


def features(batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *g, generator=generator).to(dtype) for c, g in zip(CHANNELS, GRIDS, strict=True)]


def run(parallel, fusion, x: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The forward pass of an MSFlow user's script."""
    levels = zip(parallel, x, conditions(len(x[0]), x[0].dtype, x[0].device), strict=True)
    z, log_dets = zip(*(flow(level, [condition]) for flow, level, condition in levels), strict=True)
    z, log_det = fusion(list(z))
    return list(z), log_det + sum(log_dets)


def loss_of(parallel, fusion, x: list[Tensor]) -> Tensor:
    z, log_det = run(parallel, fusion, x)
    return (0.5 * sum(level.square().sum(dim=(1, 2, 3)) for level in z) - log_det).mean()


def parameters(parallel, fusion) -> list[nn.Parameter]:
    return [p for flow in (*parallel, fusion) for p in flow.parameters()]


def in_order_of(fusion: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The permutations in the order of ``fusion``'s graph, as MSFlow's loader puts them."""
    saved = {len(state[f"module_list.{i}.perm"]): i for i in range(3)}
    places = {f"module_list.{i}": f"module_list.{saved[len(fusion.module_list[i].perm)]}" for i in range(3)}
    moved = {f"{to}.{key}": state[f"{place}.{key}"] for to, place in places.items() for key in ("perm", "perm_inv")}
    return {**state, **moved}


class MasterBlock(Fm.AllInOneBlock):
    """The block that FrEIA's git master has had since 2023-08-18.

    It stores permutations as indices, has its own formula of the soft clamp, and takes no grid but the one that it was
    built for.
    """

    def soft_clamp(self, raw: Tensor) -> Tensor:
        return self.clamp * torch.tanh(raw / self.clamp)

    def forward(self, x, c=(), rev=False, jac=True):
        (x,) = x
        if tuple(x.shape[1:]) != self.dims_in[0]:
            raise RuntimeError(f"built for {self.dims_in[0]}")
        gain, sign = self.global_scale_activation(self.global_scale), -1 if rev else 1
        if rev:
            x = (x[:, self.w_perm_inv] - self.global_offset) / gain
        x1, x2 = torch.split(x, self.splits, dim=1)
        raw = 0.1 * self.subnet(torch.cat((x1, *c), dim=1))
        s, t = self.soft_clamp(raw[:, : self.splits[1]]), raw[:, self.splits[1] :]
        y = torch.cat((x1, (x2 - t) * (-s).exp() if rev else x2 * s.exp() + t), dim=1)
        if not rev:
            y = (y * gain + self.global_offset)[:, self.w_perm]
        return (y,), sign * (s.sum(dim=(1, 2, 3)) + x[0, :1].numel() * gain.log().sum())


class BetweenBlock(MasterBlock):
    """The block that git master had from 2023-06-20 to 08-17: it has indices, and 0.2's formula."""

    def soft_clamp(self, raw: Tensor) -> Tensor:
        return self.clamp * torch.tanh(raw)


def as_master(parallel: list[nn.Module]) -> list[nn.Module]:
    """The same weights in git master's blocks; they are that where master itself is installed."""
    for block in (block for flow in parallel for block in flow.module_list):
        if block.w_perm.ndim == 1:
            continue
        block.__class__ = MasterBlock
        for name in ("w_perm", "w_perm_inv"):
            index = getattr(block, name)[:, :, 0, 0].argmax(dim=1)
            setattr(block, name, nn.Parameter(index, requires_grad=False))
    return parallel


def as_between(parallel: list[nn.Module]) -> list[nn.Module]:
    for block in (block for flow in as_master(parallel) for block in flow.module_list):
        block.__class__ = BetweenBlock
    return parallel
