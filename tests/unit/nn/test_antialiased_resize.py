"""Resizing of exported graphs, beside torchvision's own with antialiasing, and an exported Msflow beside the Engine."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.helpers.tolerances import EXPORTED, RESIZED

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'fastmsflow[anomalib]'")

from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from fastmsflow import MSFlow
from fastmsflow.errors import InputWarning
from fastmsflow.integrations.anomalib import VERSION, Msflow
from fastmsflow.nn.antialiased_resize import AntialiasedResize, antialiased
from tests.helpers.small_anomalib import QUIET, UNTRAINED, noise_data

MODES = ("bilinear", InterpolationMode.BILINEAR, 2, InterpolationMode.BICUBIC, 3)


@pytest.mark.parametrize("interpolation", MODES, ids=str)
@pytest.mark.parametrize("size", [(64, 48), (37, 37), 40], ids=str)
@pytest.mark.parametrize("given", [(160, 130), (33, 512), (64, 48), (20, 31), (33, 1)], ids=str)
def test_images_are_resized_as_by_torchvision(
    interpolation: InterpolationMode | str | int, size: int | Sequence[int], given: tuple[int, int]
) -> None:
    resize = Resize(size, interpolation=interpolation, antialias=True)
    images = torch.rand(2, 3, *given, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(AntialiasedResize(resize)(images), resize(images), **RESIZED)


def test_images_of_the_size_itself_stay_as_they_are_in_any_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        images = torch.rand(1, 3, 64, 48).to(dtype)
        assert torch.equal(AntialiasedResize(Resize((64, 48), interpolation=InterpolationMode.BICUBIC))(images), images)


@pytest.mark.parametrize(
    "resize",
    [
        Resize(40, antialias=False),
        Resize(40, interpolation=InterpolationMode.NEAREST),
        Resize(40, max_size=50),
        CenterCrop(30),
    ],
    ids=["without antialiasing", "nearest", "max_size", "crop"],
)
def test_other_transforms_take_the_form_that_is_given_for_them(resize: torch.nn.Module) -> None:
    given = Compose([resize, Compose([resize, Resize((30, 30))])])
    made = antialiased(given, lambda transform: torch.nn.Identity())
    assert isinstance(made.transforms[0], torch.nn.Identity)
    assert [type(part) for part in made.transforms[1].transforms] == [torch.nn.Identity, AntialiasedResize]


@pytest.mark.slow
def test_a_graph_resizes_images_of_any_size(tmp_path: Path) -> None:
    import onnxruntime

    resize = Resize((64, 48), interpolation=InterpolationMode.BICUBIC)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    file = tmp_path / "resize.onnx"
    torch.onnx.export(
        AntialiasedResize(resize).eval(),
        (torch.rand(2, 3, 160, 130),),
        file,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=(sizes,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file)
    for given in ((160, 130), (41, 300), (64, 48), (20, 30)):
        images = torch.rand(3, 3, *given)
        (made,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), resize(images), **RESIZED)


@pytest.mark.slow
@pytest.mark.parametrize("cropped", [False, True], ids=["the default pre-processor", "resized and cropped"])
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_exported_file_scores_images_of_another_size_as_the_engine(cropped: bool, kind: str, tmp_path: Path) -> None:
    if kind == "onnx" and VERSION < (2, 7):
        pytest.skip("anomalib's post-processor has an ONNX form from 2.7 on")
    torch.manual_seed(0)
    # Images of noise, 40x40, lose most of their contrast where they are made smaller with antialiasing.
    options = {**UNTRAINED, "image_size": (32, 32)}
    crop = Compose([Resize(36, interpolation=InterpolationMode.BILINEAR), CenterCrop((32, 32))])
    model = Msflow(**options, pre_processor=PreProcessor(transform=crop) if cropped else True)
    model.model.msflow = MSFlow(**options, blocks=(1, 1, 1))
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.validate(model=model, datamodule=noise_data(tmp_path / "noise"), verbose=False)
    batches = engine.predict(model, data_path=tmp_path / "noise/test/bad")
    expected = torch.cat([batch.pred_score.flatten() for batch in batches])
    dataset = PredictDataset(tmp_path / "noise/test/bad")
    images = torch.stack([dataset[i].image for i in range(len(expected))])
    with pytest.warns(InputWarning, match="for square images only") if cropped and kind == "onnx" else nullcontext():
        file = engine.export(model.cpu(), kind, export_root=tmp_path)
    if kind == "torch":
        with torch.no_grad():
            scores = torch.load(file, weights_only=False)["model"].eval()(images).pred_score
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        scores = torch.from_numpy(session.run(["pred_score"], {"input": images.numpy()})[0])
    torch.testing.assert_close(scores.flatten(), expected.as_subclass(torch.Tensor), **EXPORTED)
