"""The kernels under DistributedDataParallel: two processes compute what one does."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastmsflow import MultiScaleFlow
from fastmsflow.ops.likelihood import log_likelihood_maps
from fastmsflow.reference.likelihood import negative_log_likelihood
from tests.helpers.interpreter import hasten_interpreter
from tests.helpers.ops_parity import DEVICE
from tests.helpers.processes import run_processes
from tests.helpers.tolerances import FLOW_CLOSE

pytestmark = pytest.mark.slow

WORLD = 2


def flow_and_batch() -> tuple[MultiScaleFlow, list[Tensor]]:
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 12), (8, 8), (1, 1), backend="triton").to(DEVICE)
    return flow, [torch.randn(4, 8, 3, 5).to(DEVICE), torch.randn(4, 12, 2, 3).to(DEVICE)]


def one_process(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    hasten_interpreter()
    torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    flow, batch = flow_and_batch()
    shared = DistributedDataParallel(flow)
    z, log_det = shared([level[rank::WORLD] for level in batch])
    negative_log_likelihood(log_likelihood_maps(z, "triton"), flow.channels, log_det).mean().backward()
    if rank == 0:
        torch.save([p.grad for p in flow.parameters()], out)
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_gradients_of_one(tmp_path: Path) -> None:
    out = tmp_path / "gradients.pt"
    run_processes(one_process, (str(tmp_path / "rendezvous"), str(out)), WORLD)
    flow, batch = flow_and_batch()
    flow.nll(batch).mean().backward()
    torch.testing.assert_close(torch.load(out), [p.grad for p in flow.parameters()], **FLOW_CLOSE)
