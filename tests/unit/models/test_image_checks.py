"""Images that a model cannot take are one line; a GPU is not waited for but once."""

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.errors import InputWarning
from fastmsflow.metrics import aupro, auroc
from fastmsflow.models import msflow
from fastmsflow.scoring import anomaly_scores
from tests.helpers.tiny_model import tiny_model

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[object, str]] = {
    "0 to 255": (IMAGES * 255, r"from 0\.\d+ to 25\d(\.\d)?; give \[0, 1\]: images / 255"),
    "normalized": ((IMAGES - 0.45) / 0.22, r"from -2\.\d+ to 2\.\d+; give \[0, 1\]: they are not to be normalized"),
    "of -1 to 1": (IMAGES * 2 - 1, r"give \[0, 1\]"),
    "0 to 255 beside NaN": (torch.cat([IMAGES[:1] * torch.nan, IMAGES * 255]), "images / 255"),
    "uint8": ((IMAGES * 255).byte(), r"images\.float\(\) / 255"),
    "complex": (IMAGES.to(torch.complex64), "dtype torch.complex64"),
    "float8": (IMAGES.to(torch.float8_e4m3fn), r"float8_e4m3fn; give float32: images\.float\(\)"),
    "sparse": (IMAGES.to_sparse(), r"a sparse tensor; give a dense one: images\.to_dense\(\)"),
    "none": (IMAGES[:0], "give at least one image"),
    "all NaN": (IMAGES * torch.nan, "the images 0; 1; 2; 3 of the batch are NaN or infinite; replace them"),
    "all infinite": (IMAGES / 0, "NaN or infinite"),
    "one image alone": (IMAGES[0], r"give \(B, 3, H, W\): images\[None\]"),
    "gray": (IMAGES[:, :1], r"images\.expand\(-1, 3, -1, -1\)"),
    "four channels": (IMAGES[:, [0, 1, 2, 0]], r"shape \(4, 4, 32, 32\); give \(B, 3, H, W\)"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), r"images\.permute\(0, 3, 1, 2\)"),
    "another size": (IMAGES[..., :16], r"images are \(32, 16\); this model takes \(32, 32\): resize them"),
    "another device": (IMAGES.to("meta"), r"images are on meta, the model is on cpu: images\.to\('cpu'\)"),
    "an array": (IMAGES.numpy(), "of type ndarray; give a tensor"),
    "a list": ([IMAGES[0]], "of type list; give a tensor"),
    "a file": ("image.png", "of type str; give a tensor"),
}


@pytest.fixture(scope="module")
def model() -> MSFlow:
    return tiny_model().eval()


@pytest.mark.parametrize("name", ["predict", "scores", "features", "nll", "__call__"])
@pytest.mark.parametrize("bad", BAD)
def test_images_that_do_not_fit_are_one_line(bad: str, name: str, model: MSFlow) -> None:
    given, message = BAD[bad]
    with pytest.raises(InputError, match=message) as caught:
        getattr(model, name)(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_floating_dtype_and_a_little_beyond_the_range_are_taken(dtype, model: MSFlow) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.predict((IMAGES * 1.2 - 0.1).to(dtype)).score.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_of_nan_is_told_and_the_others_are_scored_to_the_bit(value: float, model: MSFlow) -> None:
    spoilt = IMAGES.clone()
    spoilt[2, 0, 3, 3] = value
    with pytest.warns(InputWarning, match="pixels of the images 2 of the batch are NaN or infinite") as told:
        prediction = model.predict(spoilt)
    assert told[0].filename == __file__
    for one, other in zip(prediction, model.predict(IMAGES), strict=True):
        assert one[2].isnan().any()
        assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])


def test_training_refuses_an_unfit_range_and_leaves_nan_to_the_loss() -> None:
    model = tiny_model().train()
    with pytest.raises(InputError, match="images / 255"):
        model.nll(IMAGES * 255)
    assert model.nll(IMAGES * torch.nan).isnan().all()


def test_a_gpu_is_waited_for_at_the_first_batch_alone(monkeypatch) -> None:
    model, looked = tiny_model().eval(), []
    monkeypatch.setattr(msflow, "check_values", lambda images, may_be_nan: looked.append(len(images)))
    monkeypatch.setattr(msflow, "check_images", lambda images, size, device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model.flow, "parameters", lambda: iter([on_a_gpu]))
    for count in (1, 2, 3):
        model._check(IMAGES[:count])
    assert looked == [1]


def test_fake_images_of_a_tracer_have_no_values_to_look_at(model: MSFlow) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model.features(mode.from_tensor(IMAGES))[0].shape[0] == 4


LATENTS = [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)]
MASKS, MAPS = np.zeros((2, 8, 8), bool), np.random.default_rng(0).random((2, 8, 8))
MASKS[0, 2:4, 2:4] = True
BAD_CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "no levels": (lambda: anomaly_scores([], (8, 8)), "z is no sequence of tensors"),
    "arrays": (lambda: anomaly_scores([z.numpy() for z in LATENTS], (8, 8)), "z is no sequence of tensors"),
    "one level": (lambda: anomaly_scores(LATENTS[0], (8, 8)), "z is no sequence of tensors"),
    "no images": (lambda: anomaly_scores([z[:0] for z in LATENTS], (8, 8)), "give at least one image"),
    "two batches": (lambda: anomaly_scores([LATENTS[0], LATENTS[1][:1]], (8, 8)), "with the same B"),
    "no batch": (lambda: anomaly_scores([z[0] for z in LATENTS], (8, 8)), r"give \(B, C, H, W\) per level"),
    "integers": (lambda: anomaly_scores([z.int() for z in LATENTS], (8, 8)), "give floating ones on one device"),
    "two devices": (lambda: anomaly_scores([LATENTS[0], LATENTS[1].to("meta")], (8, 8)), "on one device"),
    "a side": (lambda: anomaly_scores(LATENTS, 8), r"image_size is 8; give \(height, width\)"),
    "no pixels": (lambda: anomaly_scores(LATENTS, (0, 8)), r"image_size is \(0, 8\)"),
    "ragged labels": (lambda: auroc([[0], [0, 1]], [0.0, 1.0]), "labels are no array"),
    "ragged scores": (lambda: auroc([0, 1], [[0.0], [0.0, 1.0]]), "scores are no array"),
    "no labels": (lambda: auroc([], []), "needs both classes"),
    "a limit that is text": (lambda: aupro(MASKS, MAPS, fpr_limit="a"), "fpr_limit is 'a'; it must be above 0"),
    "no masks": (lambda: aupro(MASKS[:0], MAPS[:0]), "add the missing images"),
    "maps of NaN": (lambda: aupro(MASKS, MAPS * np.nan), "maps hold NaN"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_latents_and_metrics_that_do_not_fit_are_one_line(bad: str) -> None:
    call, message = BAD_CALLS[bad]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert not re.search(r"\n", str(caught.value))
