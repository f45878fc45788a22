"""Models on chosen layers: checkpoints, equal grids through the flow, tiles of other sizes, fused extractors."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastmsflow import InputError, MSFlow, UnavailableError
from fastmsflow.inference import openvino_graph
from fastmsflow.inference.tiled_models import tiled_model
from fastmsflow.integrations.export import export_program
from fastmsflow.models.checkpoint import read_checkpoint, write_checkpoint
from fastmsflow.nn.supported_sizes import describe_split_patches
from fastmsflow.tiling import Tiling
from tests.helpers.error_log import assert_within
from tests.helpers.ops_parity import DEVICE, error_in_the_norm
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import EXPORTED, OPERATION

SIZE = (48, 80)
PATCH_14 = "eva02_tiny_patch14_224"


def vit_model(name: str = "test_vit", size: tuple[int, int] = SIZE, **options) -> MSFlow:
    torch.manual_seed(0)
    options = {"layers": (1, 3, 5), "pool": "none", "blocks": (1, 1, 2), **options}
    model = MSFlow(name, pretrained=False, image_size=size, **options).eval()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pictures(batch: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_a_configuration_has_layers_and_strides_only_if_they_were_given() -> None:
    assert not {"layers", "level_strides"} & tiny_model().config.keys()
    assert tiny_model(layers=(1, 2, 3)).config["layers"] == [1, 2, 3]
    assert "level_strides" not in tiny_model(layers=(1, 2, 3)).config
    assert tiny_model(level_strides=(1, 1, 2)).config["level_strides"] == [1, 1, 2]


def test_a_saved_model_scores_as_before(tmp_path) -> None:
    model = vit_model(layers=(-5, -3, -1), level_strides=(1, 1, 2))
    model.save(tmp_path / "model.safetensors")
    again = MSFlow.load(tmp_path / "model.safetensors")
    assert again.config == model.config and again.extractor.outputs == (1, 3, 5)
    assert torch.equal(again.predict(pictures()).score, model.predict(pictures()).score)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": [1, 2]}, "layers"),
        ({"layers": [1, 2, 2000]}, r"layers\[2\]"),
        ({"level_strides": [0, 1, 1]}, "level"),
    ],
)
def test_a_damaged_choice_of_layers_in_a_file_is_one_line(change: dict, says: str, tmp_path) -> None:
    model = vit_model()
    model.save(tmp_path / "model.safetensors")
    tensors, config = read_checkpoint(tmp_path / "model.safetensors")
    write_checkpoint(tmp_path / "damaged.safetensors", tensors, {**config, **change})
    with pytest.raises(InputError, match=says) as raised:
        MSFlow.load(tmp_path / "damaged.safetensors")
    assert "damaged.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_of_an_earlier_version_whose_patches_do_not_divide_its_size_is_read(tmp_path) -> None:
    with pytest.raises(InputError, match="60 is no multiple: give 56 or 70"):
        vit_model(PATCH_14, (56, 60))
    model = vit_model(PATCH_14, (56, 56))
    model.save(tmp_path / "model.safetensors")
    tensors, config = read_checkpoint(tmp_path / "model.safetensors")
    write_checkpoint(tmp_path / "earlier.safetensors", tensors, {**config, "image_size": [56, 60]})
    earlier = MSFlow.load(tmp_path / "earlier.safetensors")
    assert describe_split_patches(earlier.extractor.net, (56, 60)) is not None
    images = pictures(1, (56, 60))
    # The border was left out of the features, and the maps were those of the whole image.
    assert torch.equal(earlier.features(images)[0], model.features(images[..., :56])[0])
    assert earlier.predict(images).score_map_add.shape == (1, 56, 60)


def test_equal_grids_go_through_the_flow_and_back() -> None:
    model = vit_model()
    features = [level.double() for level in model.features(pictures())]
    assert {level.shape[2:] for level in features} == {(3, 5)}
    flow = copy.deepcopy(model.flow).double()
    z, log_det = flow(features)
    back, log_det_back = flow.inverse(z)
    for level, given in zip(back, features, strict=True):
        torch.testing.assert_close(level, given, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)


def test_kernels_score_and_differentiate_equal_grids_as_pytorch_does() -> None:
    model = vit_model(blocks=(1, 1, 1))
    features = [level.to(DEVICE) for level in model.features(pictures())]
    results = {}
    for backend in ("torch", "triton"):
        flow = copy.deepcopy(model.flow).to(DEVICE)
        flow.backend = backend
        scores, nll = flow.scores_and_nll(features, SIZE)
        nll.sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])
        results[backend] = (scores.log_score, scores.score_map_add, nll, gradients)
    errors = [error_in_the_norm(ours, twin) for ours, twin in zip(results["triton"], results["torch"], strict=True)]
    names = ("score", "map", "nll", "gradient")
    assert_within((name, error, OPERATION["float32"]) for name, error in zip(names, errors, strict=True))


def test_a_fused_copy_scores_as_its_model() -> None:
    model = vit_model(level_strides=(1, 1, 2))
    torch.testing.assert_close(model.for_inference().predict(pictures()).score, model.predict(pictures()).score)
    assert model.for_inference().extractor.description == model.extractor.description


@pytest.mark.slow
def test_an_exported_transformer_scores_as_its_model(tmp_path) -> None:
    model = vit_model("test_vit2", (48, 48), layers=(0, 1, 2), level_strides=(1, 1, 2), blocks=(1, 1, 1))
    exported = export_program(model, tmp_path / "model.pt2")
    with torch.no_grad():
        scores = torch.export.load(exported.path).module()(pictures(3, (48, 48)))[0]
    torch.testing.assert_close(scores, model.predict(pictures(3, (48, 48))).score, **EXPORTED)


def test_an_operation_that_openvino_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failure(Exception):
        pass

    def refuse(_: object) -> None:
        raise Failure("Check 'false' failed\n-- No conversion rule found for operations: aten._upsample_bicubic2d_aa.x")

    lacking = SimpleNamespace(convert_model=refuse, frontend=SimpleNamespace(OpConversionFailure=Failure))
    monkeypatch.setattr(openvino_graph, "import_openvino", lambda: lacking)
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    with pytest.raises(UnavailableError) as raised:
        openvino_graph._converted_program(program, "test_vit, layers 1, 3, 5 (strides 16, 16, 16)")
    assert str(raised.value) == (
        "OpenVINO cannot convert aten._upsample_bicubic2d_aa of test_vit, layers 1, 3, 5 (strides 16, 16, 16): export"
        " the model to .onnx, or take --engine torch"
    )


def test_tiles_of_another_size_have_resampled_position_embeddings() -> None:
    model = vit_model()
    tiled = tiled_model(model, Tiling(96))
    grid = timm_resampled(model.extractor.net.model.pos_embed, (3, 5), (6, 6))
    assert torch.equal(tiled.extractor.net.model.pos_embed, grid)
    assert tiled.predict(pictures(1, (96, 96))).score.isfinite().all()
    with pytest.raises(InputError, match="100 is no multiple: give 96 or 112"):
        tiled_model(model, Tiling(100))


def timm_resampled(embedding: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings with a class token, interpolated as images."""
    token, cells = embedding[:, :1], embedding[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    cells = torch.nn.functional.interpolate(cells, new, mode="bicubic", antialias=True)
    return torch.cat([token, cells.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def test_a_model_of_odd_channels_trains_and_its_file_warns_of_nothing(tmp_path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="61 channels"):
        model = MSFlow("rexnet_100", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1))
    model.nll(pictures(2, (64, 64))).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.flow.parameters())
    model.save(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = MSFlow.load(tmp_path / "model.safetensors")
    assert again.config["flow"]["channels"] == [38, 62, 128]
