"""A script of the published kind on FrEIA 0.2's modules, and the same script with one import changed."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fastmsflow.compat import build_msflow_model, load_official
from fastmsflow.metrics import aupro_published, auroc
from fastmsflow.scoring import anomaly_scores
from fastmsflow.training import Recipe
from fastmsflow.training.lr_schedule import lr_factor
from tests.helpers.few_tiles import few_tiles
from tests.helpers.live_freia import CHANNELS, CONDITIONS, CONFIG, GRIDS, live_flows
from tests.helpers.published_script import Script, Settings
from tests.helpers.tolerances import FREIA_FLOAT32, SCRIPT_METRICS

pytestmark = pytest.mark.slow

SIZE = (8 * GRIDS[0][0], 8 * GRIDS[0][1])
SETTINGS = Settings(SIZE, CONDITIONS, lr=2e-3, meta_epochs=4, warm_up=6, milestones=(11, 14))


class Extractor(nn.Module):
    """Feature maps at strides 4, 8 and 16, frozen."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *CHANNELS[:2])
        strides = (4, 2, 2)
        generator = torch.Generator().manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 2 * s - 1, s, s - 1) for i, o, s in zip(inputs, CHANNELS, strides, strict=True)
        )
        for stage in self.stages:
            nn.init.kaiming_normal_(stage.weight, generator=generator)
            nn.init.zeros_(stage.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            images = stage(images).relu()
            levels.append(images)
        return levels


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Script, Script]:
    """On FrEIA's modules and with the swap, from one start, both run to their end."""
    data = few_tiles(tmp_path_factory.mktemp("textures")) / "brick"
    torch.manual_seed(0)
    theirs = Script(live_flows(), Extractor(), data, SETTINGS)
    ours = Script(build_msflow_model(CONFIG, CHANNELS), Extractor(), data, SETTINGS)
    folder = tmp_path_factory.mktemp("start")
    ours.load(theirs.save(folder / "start.pt"))
    (folder / "ours").mkdir()
    ours.save(folder / "ours" / "start.pt")
    ours.start = theirs.start = folder
    theirs.run()
    ours.run()
    return theirs, ours


def without_versions(file: Path) -> bytes:
    """The file saved again without the version numbers of modules, which PyTorch carries beside a state."""
    content = torch.load(file, weights_only=True)
    content["fusion_flow"] = dict(content["fusion_flow"])
    content["parallel_flows"] = [dict(state) for state in content["parallel_flows"]]
    again = io.BytesIO()
    torch.save(content, again)
    return again.getvalue()


def test_the_start_that_is_loaded_and_saved_is_the_same_to_the_byte(scripts: tuple[Script, Script]) -> None:
    theirs, ours = scripts[0].start / "start.pt", scripts[0].start / "ours" / "start.pt"
    assert without_versions(ours) == without_versions(theirs)


def test_losses_are_the_same(scripts: tuple[Script, Script]) -> None:
    theirs, ours = (script.record for script in scripts)
    assert theirs.nll[-1] < theirs.nll[0] - 100
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=0, atol=FREIA_FLOAT32 * max(map(abs, theirs.nll)))
    # The script does not print the mean nll, but that divided by the batch size, or nearly.
    np.testing.assert_allclose(theirs.printed, np.array(theirs.nll) / SETTINGS.batch_size, rtol=1e-5)


def test_det_loc_and_pro_of_every_meta_epoch_are_the_same(scripts: tuple[Script, Script]) -> None:
    theirs, ours = (script.record for script in scripts)
    assert len(theirs.metrics) == SETTINGS.meta_epochs
    assert min(theirs.metrics[-1]) > 0.3, "nothing was learnt"
    for expected, found in zip(theirs.metrics, ours.metrics, strict=True):
        assert found == pytest.approx(expected, abs=SCRIPT_METRICS)


def test_our_metrics_of_the_scripts_maps_are_the_scripts(scripts: tuple[Script, Script]) -> None:
    for script in scripts:
        additive, multiplicative = script.record.maps
        found = (
            auroc(script.masks.any(axis=(1, 2)), script.record.score),
            auroc(script.masks, additive),
            aupro_published(script.masks, multiplicative),
        )
        assert found == pytest.approx(script.record.metrics[-1], abs=1e-9)


def test_a_model_of_the_scripts_checkpoint_has_its_scores_maps_and_metrics(
    scripts: tuple[Script, Script], tmp_path: Path
) -> None:
    theirs = scripts[0]
    flow = load_official(theirs.save(tmp_path / "last.pt"), clamp=CONFIG.clamp_alpha)
    with torch.no_grad():
        z, _ = flow(theirs.test)
    score, additive, multiplicative = anomaly_scores(z, SIZE, SETTINGS.top_k)
    np.testing.assert_allclose(score, theirs.record.score, atol=1e-5)
    np.testing.assert_allclose(additive, theirs.record.maps[0], atol=1e-5)
    np.testing.assert_allclose(multiplicative, theirs.record.maps[1], atol=1e-5)
    labels = theirs.masks.any(axis=(1, 2))
    assert roc_auc_score(labels, score) == pytest.approx(theirs.record.metrics[-1][0], abs=SCRIPT_METRICS)


def test_checkpoints_after_training_hold_the_same(scripts: tuple[Script, Script], tmp_path: Path) -> None:
    names = ("theirs.pt", "ours.pt")
    files = [script.save(tmp_path / name) for script, name in zip(scripts, names, strict=True)]
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert one["epoch"] == other["epoch"] == SETTINGS.meta_epochs
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    states = [(a, b) for a, b in zip(one["parallel_flows"], other["parallel_flows"], strict=True)]
    states += [(one["fusion_flow"], other["fusion_flow"])]
    states += [(one["optimizer"]["state"][i], other["optimizer"]["state"][i]) for i in one["optimizer"]["state"]]
    for expected, found in states:
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert (found[key].shape, found[key].dtype, found[key].stride()) == (
                value.shape,
                value.dtype,
                value.stride(),
            )
            torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-4, msg=key)


def test_the_recipe_has_the_scripts_learning_rates_whatever_its_length(scripts: tuple[Script, Script]) -> None:
    for meta_epochs in (2, 3, 25):
        c = Settings(SIZE, CONDITIONS, meta_epochs=meta_epochs)
        script = Script.__new__(Script)
        script.c = c
        recipe = Recipe(meta_epochs=meta_epochs, milestones=() if meta_epochs < 25 else (0.7, 0.9))
        for sub_epoch in range(4 * meta_epochs):
            assert recipe.lr * lr_factor(recipe, sub_epoch) == pytest.approx(script._rate(sub_epoch))
