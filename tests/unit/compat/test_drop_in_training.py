"""A training loop as an MSFlow user writes it, on FrEIA's modules and on the swap, from the same weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmsflow.compat import build_msflow_model
from tests.helpers.live_freia import CHANNELS, CONFIG, as_master, features, in_order_of, live_flows, loss_of, parameters
from tests.helpers.processes import run_processes
from tests.helpers.tolerances import AUTOCAST_LOSS, FLOW_CLOSE, FREIA_FLOAT32

pytestmark = pytest.mark.slow

STEPS, WORLD = 20, 2


@dataclass
class Script:
    """Adam, clipping at 2, autocast, a scaler."""

    parallel: list[nn.Module]
    fusion: nn.Module
    dtype: torch.dtype = torch.float32
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(parameters(self.parallel, self.fusion), lr=1e-3)
        # float16's gradients overflow by far at the first scale, and by far not at the second.
        scaled = self.dtype != torch.float32
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, backoff_factor=2.0**-8, enabled=scaled)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = loss_of(self.parallel, self.fusion, features(seed=len(self.losses)))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters(self.parallel, self.fusion), 2)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss.item())

    def save(self, path: Path) -> Path:
        content = {
            "epoch": len(self.losses),
            "fusion_flow": self.fusion.state_dict(),
            "parallel_flows": [flow.state_dict() for flow in self.parallel],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        torch.save(content, path)
        return path

    def resume(self, path: Path) -> None:
        content = torch.load(path, weights_only=True)
        for flow, state in zip(self.parallel, content["parallel_flows"], strict=True):
            flow.load_state_dict(state, strict=False)
        self.fusion.load_state_dict(in_order_of(self.fusion, content["fusion_flow"]), strict=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])


def pair(dtype: torch.dtype, as_variant: Callable[[list[nn.Module]], list[nn.Module]]) -> tuple[Script, Script]:
    """On FrEIA's modules and on the swap."""
    parallel, fusion = live_flows()
    live = Script(as_variant(parallel), fusion, dtype)
    variant = "0.2" if live.parallel[0].module_list[0].w_perm.ndim == 4 else "master"
    fast = Script(*build_msflow_model(CONFIG, CHANNELS, variant), dtype)
    for ours, theirs in zip((*fast.parallel, fast.fusion), (*live.parallel, live.fusion), strict=True):
        ours.load_state_dict(theirs.state_dict())
    return live, fast


def furthest(script: Script, other: Script) -> float:
    """The largest difference of their losses, relative to the first."""
    return max(abs(a - b) for a, b in zip(script.losses, other.losses, strict=True)) / abs(other.losses[0])


def train_and_exchange(scripts: tuple[Script, Script], folder: Path) -> None:
    """Half way each goes on from what the other saved."""
    for step in range(STEPS):
        if step == STEPS // 2:
            files = [script.save(folder / f"{i}.pt") for i, script in enumerate(scripts)]
            for script, file in zip(scripts, reversed(files), strict=True):
                script.resume(file)
        for script in scripts:
            script.step()


# Of whatever FrEIA is installed, master included.
VARIANTS = pytest.mark.parametrize("as_variant", [lambda flows: flows, as_master], ids=["installed", "master"])


@VARIANTS
def test_losses_are_those_of_freias_modules(as_variant, tmp_path: Path) -> None:
    live, fast = pair(torch.float32, as_variant)
    train_and_exchange((live, fast), tmp_path)
    assert live.losses[-1] < live.losses[0]
    assert furthest(fast, live) < FREIA_FLOAT32


@VARIANTS
def test_losses_under_bfloat16_autocast_are_those_of_freias_modules_and_of_float32(as_variant, tmp_path: Path) -> None:
    live, fast = pair(torch.bfloat16, as_variant)
    exact = Script(copy.deepcopy(live.parallel), copy.deepcopy(live.fusion))
    for _ in range(STEPS):
        exact.step()
    train_and_exchange((live, fast), tmp_path)
    assert furthest(fast, live) < AUTOCAST_LOSS["bfloat16"]
    assert furthest(fast, exact) < AUTOCAST_LOSS["bfloat16 against float32"]
    assert fast.scaler.get_scale() == 2.0**13


@VARIANTS
def test_losses_under_float16_autocast_with_steps_skipped_are_those_of_freias_modules(as_variant, tmp_path) -> None:
    live, fast = pair(torch.float16, as_variant)
    train_and_exchange((live, fast), tmp_path)
    assert [script.scaler.get_scale() for script in (live, fast)] == [2.0**5] * 2
    assert live.losses[-1] < live.losses[0]
    assert furthest(fast, live) < AUTOCAST_LOSS["float16"]


def gradients_after_a_step(parallel, fusion, x: list[Tensor]) -> list[Tensor]:
    """Two steps: DistributedDataParallel refuses the second where the first left a parameter without a gradient."""
    optimizer = torch.optim.SGD(parameters(parallel, fusion), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(parallel, fusion, x).backward()
        optimizer.step()
    return [p.grad for p in parameters(parallel, fusion) if p.requires_grad]


def seeded(seed: int) -> tuple[list[nn.Module], nn.Module]:
    torch.manual_seed(seed)
    return build_msflow_model(CONFIG, CHANNELS)


def one_process(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    parallel, fusion = seeded(rank)  # each takes up the first one's weights and permutations
    shared = [DistributedDataParallel(flow) for flow in parallel], DistributedDataParallel(fusion)
    gradients = gradients_after_a_step(*shared, [level[rank::WORLD] for level in features(4)])
    if rank == 0:
        torch.save(gradients, out)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    out = tmp_path / "gradients.pt"
    run_processes(one_process, (str(tmp_path / "rendezvous"), str(out)), WORLD)
    torch.testing.assert_close(torch.load(out), gradients_after_a_step(*seeded(0), features(4)), **FLOW_CLOSE)
