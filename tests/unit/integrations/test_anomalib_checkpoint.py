"""Checkpoints of Msflow in anomalib decide what is read, whatever model they are read into."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'fastmsflow[anomalib]'")

from anomalib.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from fastmsflow import InputError
from fastmsflow.integrations.anomalib import Msflow
from tests.helpers.small_anomalib import PARTS, QUIET, SIDE, UNTRAINED, noise_data

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_block_flows")]

ANOTHER_SIZE = {**UNTRAINED, "image_size": (96, 64)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def fitted(model: Msflow, root: Path, **options: Any) -> tuple[Path, dict[str, float]]:
    """The checkpoint of ``model`` after one epoch, and what it tests to."""
    engine = Engine(max_epochs=1, default_root_dir=root, **QUIET, **options)
    engine.fit(model, datamodule=noise_data(root / "noise"))
    return Path(engine.best_model_path), results_of(model, root)


def results_of(model: Msflow, root: Path, **options: Any) -> dict[str, float]:
    engine = Engine(default_root_dir=root, **QUIET)
    return engine.test(model, datamodule=noise_data(root / "noise"), verbose=False, **options)[0]


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> tuple[Path, dict[str, float]]:
    torch.manual_seed(0)
    return fitted(Msflow(**UNTRAINED, standardise=True, pool="max"), root)


@pytest.mark.parametrize(
    "options",
    [
        {**UNTRAINED, "standardise": True, "pool": "max"},
        # 512x512, which the data module resizes to before the checkpoint is read.
        {"extractor": "test_resnet.r160_in1k", "pretrained": False},
        {**ANOTHER_SIZE, "standardise": True},
        {**UNTRAINED, "extractor": "resnet18"},
    ],
    ids=["the same model", "the default size", "another size", "another extractor"],
)
def test_a_checkpoint_tests_as_it_was_trained_in_any_model(options: dict, checkpoint: Any, root: Path) -> None:
    file, expected = checkpoint
    model = Msflow(**options)
    assert results_of(model, root, ckpt_path=file) == expected
    assert model.msflow.image_size == (SIDE, SIDE)
    assert model.msflow.pool == "max"


def test_the_options_of_the_checkpoint_are_saved_again(checkpoint: Any, root: Path) -> None:
    model = Msflow(**ANOTHER_SIZE)
    engine = Engine(default_root_dir=root, **QUIET)
    engine.validate(model, ckpt_path=checkpoint[0], datamodule=noise_data(root / "noise"), verbose=False)
    engine.trainer.save_checkpoint(root / "again.ckpt")
    back = Msflow.load_from_checkpoint(root / "again.ckpt")
    assert back.msflow.config == model.msflow.config
    assert back.pre_processor.transform.size == [SIDE, SIDE]


def test_a_training_resumes_at_the_size_of_the_checkpoint(checkpoint: Any, root: Path) -> None:
    model = Msflow(**ANOTHER_SIZE)
    trained = torch.load(checkpoint[0], weights_only=False)
    engine = Engine(max_epochs=2, default_root_dir=root, **QUIET)
    engine.fit(model, datamodule=noise_data(root / "noise"), ckpt_path=checkpoint[0])
    assert engine.trainer.global_step == 2 * trained["global_step"] > 0
    # The optimizer got the parameters of the model that was made for the checkpoint.
    before = trained["state_dict"]
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("model.msflow.flow.") for key in changed)
    assert torch.equal(model.msflow.standardiser.mean0, before["model.msflow.standardiser.mean0"])


def test_a_checkpoint_decides_on_layers_too(root: Path) -> None:
    vit = {"extractor": "test_vit", "pretrained": False, "layers": (1, 3, 5), "level_strides": (1, 1, 2)}
    trained = Msflow(**vit, image_size=(SIDE, SIDE))
    file, expected = fitted(trained, root)
    model = Msflow(**UNTRAINED)
    assert results_of(model, root, ckpt_path=file) == expected
    assert model.msflow.config == trained.msflow.config
    assert model.msflow.config["level_strides"] == [1, 1, 2]


def test_the_command_line_tests_a_checkpoint_without_its_options(checkpoint: Any, root: Path, capsys) -> None:
    data = [f"--data.{name}={value}" for name, value in PARTS.items()]
    arguments = [
        *("test", "--model", "fastmsflow.integrations.anomalib.Msflow", "--ckpt_path", str(checkpoint[0])),
        *("--model.extractor", UNTRAINED["extractor"], "--model.pretrained", "false"),
        *("--data", "Folder", "--data.name", "noise", f"--data.root={root / 'noise'}", *data),
        *("--data.num_workers", "0", "--data.val_split_mode", "same_as_test", "--data.eval_batch_size", "3"),
        *("--trainer.accelerator", "cpu", "--default_root_dir", str(root)),
    ]
    cli = AnomalibCLI(args=arguments, run=False)
    kwargs = cli._prepare_subcommand_kwargs("test")
    assert cli.engine.test(**kwargs)[0] == checkpoint[1]


def test_the_pre_processor_of_the_checkpoint_is_taken(root: Path) -> None:
    crop = Compose([Resize((80, 80), antialias=True), CenterCrop((SIDE, SIDE))])
    model = Msflow(**UNTRAINED, pre_processor=PreProcessor(transform=crop))
    file, expected = fitted(model, root)
    other = Msflow(**ANOTHER_SIZE)
    assert results_of(other, root, ckpt_path=file) == expected
    images = torch.rand(2, 3, 90, 110)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images).anomaly_map, model.eval()(images).anomaly_map)


def test_images_come_as_they_are_if_the_checkpoint_has_no_pre_processor(root: Path) -> None:
    file, expected = fitted(Msflow(**{**UNTRAINED, "image_size": (40, 40)}, pre_processor=False), root)
    assert results_of(Msflow(**UNTRAINED), root, ckpt_path=file) == expected


def test_a_checkpoint_of_another_model_is_refused_in_one_line(root: Path) -> None:
    engine = Engine(max_epochs=1, default_root_dir=root, **QUIET)
    engine.fit(Padim(backbone="resnet18", pre_trained=False), datamodule=noise_data(root / "noise"))
    with pytest.raises(InputError, match=r"^the checkpoint is not one of Msflow, it has no extractor: "):
        results_of(Msflow(**UNTRAINED), root, ckpt_path=engine.best_model_path)
