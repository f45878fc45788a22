"""Backbones that do not take every image size, and weights that were saved in another shape or under other names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Attention, resample_abs_pos_embed
from torch import Tensor

from fastmsflow import InputError
from fastmsflow.errors import in_one_line, is_meant_for_a_person
from fastmsflow.nn import extractor_weights
from fastmsflow.nn.feature_extractor import FeatureExtractor

VIT = "test_vit.r160_in1k"


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "levit_128s", "coatnet_nano_rw_224"])
def test_a_size_that_a_backbone_does_not_take_is_refused_with_sizes_that_work(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name} takes no images of 100x100 .*; sizes that work: \d") as raised:
        FeatureExtractor(name, pretrained=False, image_size=(100, 100))
    size = int(str(raised.value).rpartition(" ")[2])
    extractor = FeatureExtractor(name, pretrained=False, image_size=(size, size))
    assert len(extractor(torch.rand(1, 3, size, size))) == 3


def test_a_size_that_leads_out_of_a_backbones_table_is_refused() -> None:
    remedy = r"^mvitv2_tiny takes no images of 33x33 \(index .*\); give sides that are multiples of 32$"
    with pytest.raises(InputError, match=remedy):
        FeatureExtractor("mvitv2_tiny", pretrained=False, image_size=(33, 33))
    assert len(FeatureExtractor("mvitv2_tiny", pretrained=False, image_size=(64, 64))(torch.rand(1, 3, 64, 64))) == 3


def test_a_size_at_which_a_backbone_cannot_be_built_does_not_tell_to_choose_another() -> None:
    refused = r"^twins_svt_small takes no images of 33x33 \(img_size [^;]*\); sizes that work: 32, 64, 224$"
    with pytest.raises(InputError, match=refused):
        FeatureExtractor("twins_svt_small", pretrained=False, image_size=(33, 33))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", VIT])
def test_looking_whether_a_size_works_draws_no_random_numbers(name: str) -> None:
    drawn = []
    for size in (None, (160, 160)):
        torch.manual_seed(0)
        FeatureExtractor(name, pretrained=False, image_size=size)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def saved(path: Path, change: Callable[[dict[str, Tensor]], object], name: str = "test_resnet.r160_in1k") -> Path:
    torch.manual_seed(1)
    torch.save(change(timm.create_model(name).state_dict()), path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {f"module.model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(1)},
    ],
    ids=["DataParallel", "Lightning", "part of another"],
)
def test_weights_of_a_wrapped_model_are_read(change: Callable, tmp_path: Path) -> None:
    plain, wrapped = saved(tmp_path / "plain.pth", dict), saved(tmp_path / "wrapped.pth", change)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = [FeatureExtractor("test_resnet", weights=path)(images) for path in (plain, wrapped)]
    assert all(torch.equal(a, b) for a, b in zip(*levels, strict=True))


def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    path = saved(tmp_path / "vit.pth", dict, VIT)
    extractor = FeatureExtractor(VIT, weights=path, image_size=(96, 96))
    (embedding,) = [value for key, value in extractor.state_dict().items() if key.endswith("pos_embed")]
    assert embedding.shape[1] < torch.load(path)["pos_embed"].shape[1]
    assert len(extractor(torch.rand(1, 3, 96, 96))) == 3


def test_position_embeddings_of_another_grid_of_as_many_patches_are_resampled(tmp_path: Path) -> None:
    path = saved(tmp_path / "vit.pth", dict, "test_vit3")
    embedding = torch.load(path)["pos_embed"]
    extractor = FeatureExtractor("test_vit3", weights=path, image_size=(80, 320))
    expected = resample_abs_pos_embed(embedding, (5, 20), (10, 10))
    assert expected.shape == embedding.shape
    assert torch.equal(extractor.net.state_dict()["model.pos_embed"], expected)


@pytest.mark.parametrize("side", [96, 160], ids=["another size", "the file's own size"])
def test_a_file_under_the_names_of_dinov2s_authors_is_read(side: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "dino.pth", lambda state: {"mask_token": torch.zeros(1, 64), **state}, VIT)
    assert FeatureExtractor(VIT, weights=path, image_size=(side, side)).fixed_size == (side, side)


def test_weights_are_read_without_the_memory_of_a_second_model(tmp_path: Path, monkeypatch) -> None:
    path = saved(tmp_path / "vit.pth", dict, VIT)
    fitted, models = extractor_weights._fitted, []
    monkeypatch.setattr(extractor_weights, "_fitted", lambda given, model: models.append(model) or fitted(given, model))
    FeatureExtractor(VIT, weights=path, image_size=(96, 96))
    (model,) = models
    assert all(weight.is_meta for weight in model.parameters())


def test_a_transformer_of_one_grid_is_built_without_computing_an_image(monkeypatch) -> None:
    attend, computed = Attention.forward, []

    def noted(self: Attention, tokens: Tensor, *rest, **options) -> Tensor:
        computed.append(not tokens.is_meta)
        return attend(self, tokens, *rest, **options)

    monkeypatch.setattr(Attention, "forward", noted)
    FeatureExtractor("test_vit3", pretrained=False, image_size=(48, 80))
    # Its size was looked at without values.
    assert computed and not any(computed)


def test_a_transformers_safetensors_serve_chosen_blocks_on_a_rectangle(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(VIT).eval()
    path = tmp_path / "vit.safetensors"
    save_file(whole.state_dict(), path)
    extractor = FeatureExtractor(VIT, weights=path, image_size=(64, 96), layers=(0, 2, 4))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        # This model interpolates its position embeddings itself, as timm does those of a file.
        blocks = whole.forward_intermediates((images - extractor.mean) / extractor.std, intermediates_only=True)
    for level, block in zip(extractor(images), (0, 2, 4), strict=True):
        torch.testing.assert_close(level, blocks[block], rtol=1e-4, atol=1e-5)


def test_weights_of_a_transformer_without_registers_are_refused_by_one_with_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "dino.pth", dict, "test_vit")
    with pytest.raises(InputError, match=r"dino\.pth: does not fit test_vit2: missing reg_token; .*and \d+ more$"):
        FeatureExtractor("test_vit2", weights=path, image_size=(64, 64))


def test_weights_of_another_architecture_are_refused_by_their_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "resnet.pth", lambda state: {f"module.{key}": value for key, value in state.items()})
    with pytest.raises(InputError, match=r"does not fit .*missing") as raised:
        FeatureExtractor(VIT, weights=path, image_size=(160, 160))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["no_such_net", "test_byobnet2", ""])
def test_a_name_that_timm_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a timm model"):
        FeatureExtractor(name, pretrained=False)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**58), lambda: bytearray(2**62)])
def test_memory_that_runs_out_is_one_line_with_the_remedy(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert is_meant_for_a_person(raised.value)
    assert in_one_line(raised.value).startswith("memory ran out; give a smaller batch or image size")
