"""Msflow's statistics of the training images in anomalib: of all images, whoever reads them, and of nothing else."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.processes import run_processes

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'fastmsflow[anomalib]'")

from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything

from fastmsflow.integrations.anomalib import Msflow
from tests.helpers.small_anomalib import QUIET, UNTRAINED, noise_data
from tests.helpers.small_runs import small_flows

pytestmark = pytest.mark.slow

WORLD = 2
# One image is repeated, so that two processes have as many.
IMAGES = 5


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.losses.append(float(outputs["loss"]))


def small(standardise: bool) -> Msflow:
    with small_flows():
        return Msflow(**UNTRAINED, standardise=standardise)


def fit(root: Path, out: str = "out", **options) -> tuple[Msflow, list[float]]:
    """Two epochs on five images, from one seed."""
    seed_everything(3, verbose=False)
    model, losses = small(options.pop("standardise", True)), Losses()
    trainer = options.pop("trainer", {})
    engine = Engine(max_epochs=2, default_root_dir=root / out, callbacks=[losses], **QUIET, **trainer)
    seed_everything(3, verbose=False)
    data = noise_data(root / "noise", IMAGES, **options)
    engine.fit(model, datamodule=data)
    return model, losses.losses


def one_process(rank: int, root: Path, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    # With it Lightning takes the processes that are there.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    # Processes that start at once may ask for the same folder of a version, which anomalib then refuses one of them.
    model, _ = fit(root, f"rank{rank}", trainer={"strategy": "ddp", "devices": WORLD})
    torch.save(dict(model.msflow.standardiser.named_buffers()), root / f"rank{rank}.pt")


def test_processes_measure_the_statistics_of_all_images_together(tmp_path: Path) -> None:
    alone = dict(fit(tmp_path)[0].msflow.standardiser.named_buffers())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(one_process, (tmp_path, port), WORLD)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD))
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("standardise", [True, False])
def test_one_seed_gives_the_same_losses_with_and_without_workers(standardise: bool, tmp_path: Path) -> None:
    without, with_one = (fit(tmp_path, standardise=standardise, num_workers=count)[1] for count in (0, 1))
    assert without == with_one
    assert len(without) == 6


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_pass_leaves_order_and_workers_of_the_training_alone(own_generator: bool, tmp_path: Path) -> None:
    """A loader of the caller's own, whose workers persist: it would lose its iterator."""
    seen = []

    class Paths(Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            seen.append(tuple(batch.image_path))

    data = noise_data(tmp_path / "noise", IMAGES)
    data.setup()
    orders = []
    for standardise in (False, True):
        seed_everything(3, verbose=False)
        model = small(standardise)
        seed_everything(3, verbose=False)
        loader = DataLoader(
            data.train_data,
            batch_size=2,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            collate_fn=data.train_data.collate_fn,
            generator=torch.Generator().manual_seed(7) if own_generator else None,
        )
        engine = Engine(max_epochs=2, default_root_dir=tmp_path, callbacks=[Paths()], **QUIET)
        engine.fit(model, train_dataloaders=loader)
        orders.append(seen.copy())
        seen.clear()
    assert orders[0] == orders[1]
    assert len(orders[1]) == 6
