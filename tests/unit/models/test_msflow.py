"""MSFlow as a whole, and its own checkpoints."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmsflow import InputError, MSFlow
from fastmsflow.compat import load_official, save_official
from fastmsflow.compat.convert import OfficialSettings, official_to_own, own_to_official
from fastmsflow.models.checkpoint import OfficialLayout, read_checkpoint, write_checkpoint
from tests.helpers.official_files import as_bytes
from tests.helpers.paths import GOLDEN

SMALL = {"extractor": "resnet18.tv_in1k", "pretrained": False, "image_size": (64, 96), "blocks": (1, 1, 1)}


@pytest.fixture(scope="module")
def model() -> MSFlow:
    torch.manual_seed(0)
    return MSFlow(**SMALL, standardise=True).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_grids_are_those_of_the_strides_after_the_pool(model: MSFlow, images: torch.Tensor) -> None:
    shapes = [tuple(level.shape) for level in model.features(images)]
    assert shapes == [(2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]


@pytest.mark.parametrize("pool", ["max", "none"])
def test_other_pools_serve(pool: str, images: torch.Tensor) -> None:
    scale = 2 if pool == "none" else 1
    features = MSFlow(**SMALL, pool=pool).features(images)
    assert [tuple(level.shape[2:]) for level in features] == [
        (8 * scale, 12 * scale),
        (4 * scale, 6 * scale),
        (2 * scale, 3 * scale),
    ]


def test_average_pool_counts_its_padding(images: torch.Tensor) -> None:
    from fastmsflow.nn.feature_pooling import pool_features

    pooled = pool_features([torch.ones(1, 1, 4, 4)], "avg")[0]
    assert pooled[0, 0, 0, 0] == pytest.approx(4 / 9)


def test_predict_gives_scores_and_maps_of_the_image_size(model: MSFlow, images: torch.Tensor) -> None:
    prediction = model.predict(images)
    assert prediction.score.shape == prediction.log_score.shape == (2,)
    assert prediction.score_map_add.shape == prediction.score_map_mul.shape == (2, 64, 96)
    assert all(part.isfinite().all() and not part.requires_grad for part in prediction)


def test_only_the_flow_gets_gradients(images: torch.Tensor) -> None:
    model = MSFlow(**SMALL).train()
    model.nll(images).mean().backward()
    assert all(p.grad is not None for p in model.flow.parameters())
    assert all(p.grad is None for p in model.extractor.parameters())
    assert not any(module.training for module in model.extractor.modules())


def test_standardised_features_have_mean_0_and_deviation_1(images: torch.Tensor) -> None:
    model = MSFlow(**SMALL, standardise=True)
    model.standardiser.fit(model.pooled(images))
    for level in model.features(images):
        torch.testing.assert_close(level.mean(dim=(0, 2, 3)), torch.zeros(level.shape[1]), atol=1e-4, rtol=0)
        deviation = level.std(dim=(0, 2, 3), correction=0)
        assert ((deviation - 1).abs() < 1e-3).logical_or(deviation < 1e-3).all()


def test_a_saved_model_predicts_the_same_to_the_bit(model: MSFlow, images: torch.Tensor, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors", epoch=4)
    again = MSFlow.load(tmp_path / "model.safetensors")
    assert not again.training
    assert read_checkpoint(tmp_path / "model.safetensors")[1]["notes"] == {"epoch": 4}
    for ours, theirs in zip(again.predict(images), model.predict(images), strict=True):
        assert torch.equal(ours, theirs)


def test_images_of_another_size_are_refused(model: MSFlow) -> None:
    with pytest.raises(InputError, match=r"\(64, 64\); this model takes \(64, 96\)"):
        model.features(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("options", "message"), [({"pool": "sum"}, "pool 'sum'"), ({"image_size": (16, 64)}, "32 to 65536")]
)
def test_a_model_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MSFlow(**{**SMALL, **options})


def changed(path: Path, target: Path, tensors: dict | None = None, config: dict | None = None, drop: str = "") -> Path:
    with safe_open(path, "pt") as file:
        metadata, content = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content |= tensors or {}
    content.pop(drop, None)
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **(config or {})})
    save_file(content, target, metadata)
    return target


def test_a_checkpoint_that_does_not_fit_its_configuration_names_the_keys(model: MSFlow, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    scale = "flow.parallel_flows.0.blocks.0.global_scale"
    for options, message in (
        ({"drop": scale}, f"missing {scale}"),
        ({"tensors": {"flow.extra": torch.zeros(1)}}, "unexpected flow.extra"),
        ({"tensors": {scale: torch.zeros(3)}}, rf"{scale} is \(3,\), not \(64,\)"),
        ({"config": {"extractor": "resnet50.tv_in1k"}}, "does not fit"),
        ({"config": {"flow": {}}}, "configuration is damaged"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            MSFlow.load(changed(path, tmp_path / "other.safetensors", **options))
        assert "\n" not in str(caught.value)


def test_a_damaged_or_foreign_file_is_one_clear_line(model: MSFlow, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for name, message in (
        ("cut", "not a whole safetensors"),
        ("foreign", "not a fastmsflow"),
        ("none", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            MSFlow.load(tmp_path / f"{name}.safetensors")


def test_official_to_own_and_back_is_the_same_to_the_bit(model: MSFlow, tmp_path: Path) -> None:
    save_official(model.flow, tmp_path / "official.pt", epoch=9)
    settings = OfficialSettings(extractor="resnet18.tv_in1k", image_size=(64, 96))
    official_to_own(tmp_path / "official.pt", tmp_path / "own.safetensors", settings)
    own_to_official(tmp_path / "own.safetensors", tmp_path / "again.pt")
    expected, again = model.flow.state_dict(), load_official(tmp_path / "again.pt").state_dict()
    assert all(torch.equal(expected[key], again[key]) for key in expected)
    files = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("again", "official"))
    assert as_bytes(next(files)) == as_bytes(next(files))


def test_a_converted_file_keeps_the_layout_and_the_order_of_its_permutations(model: MSFlow, tmp_path: Path) -> None:
    layout = OfficialLayout((2, 0, 1), dense=False)
    flow = copy.deepcopy(model.flow)
    flow.official_layout = layout
    save_official(flow, tmp_path / "official.pt", epoch=9)
    official = (tmp_path / "official.pt", tmp_path / "own.safetensors")
    settings = OfficialSettings(extractor="resnet18.tv_in1k", image_size=(64, 96), variant="0.2")
    official_to_own(*official, settings)
    own_to_official(tmp_path / "own.safetensors", tmp_path / "again.pt")
    files = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("again", "official"))
    assert as_bytes(next(files)) == as_bytes(next(files))
    whole = copy.deepcopy(model)
    whole.flow.official_layout = layout
    whole.save(tmp_path / "whole.safetensors")
    again = MSFlow.load(tmp_path / "whole.safetensors")
    assert again.flow.official_layout == layout and again.config == whole.config
    model.save(tmp_path / "never_official.safetensors")
    assert MSFlow.load(tmp_path / "never_official.safetensors").flow.official_layout is None


@pytest.mark.parametrize("extractor", ["test_resnet.r160_in1k", "test_vit", "test_convnext", "test_efficientnet"])
def test_every_tensor_is_read_though_none_is_initialized(extractor: str, poisoned: None, tmp_path) -> None:
    saved = MSFlow(extractor, pretrained=False, image_size=(160, 160), blocks=(1, 1, 1))
    saved.save(tmp_path / "model.safetensors")
    loaded = MSFlow.load(tmp_path / "model.safetensors")
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    expected = dict(saved.named_parameters()) | dict(saved.named_buffers())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_before_layouts_were_kept_still_loads(model: MSFlow, images: torch.Tensor, tmp_path) -> None:
    model.save(tmp_path / "model.safetensors")
    tensors, config = read_checkpoint(tmp_path / "model.safetensors")
    del config["official_layout"]
    write_checkpoint(tmp_path / "older.safetensors", tensors, config)
    older = MSFlow.load(tmp_path / "older.safetensors")
    assert older.flow.official_layout is None
    assert torch.equal(older.nll(images), model.nll(images))


def test_conversion_refuses_what_cannot_be_said(model: MSFlow, tmp_path: Path) -> None:
    model.save(tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="standardised"):
        own_to_official(tmp_path / "own.safetensors", tmp_path / "official.pt")
    settings = OfficialSettings(extractor="resnet18.tv_in1k")
    with pytest.raises(InputError, match="name the extractor"):
        official_to_own(GOLDEN / "tiny.pt", tmp_path / "other.safetensors", settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.safetensors"]
