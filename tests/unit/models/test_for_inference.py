"""Models made ready for inference: folded batch norms, half precision, values kept of weights."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmsflow import InputError, MSFlow, MultiScaleFlow
from fastmsflow.errors import InputWarning
from fastmsflow.nn.feature_extractor import FeatureExtractor
from fastmsflow.nn.fuse_conv_bn import fuse_conv_bn
from fastmsflow.nn.fuse_conv_relu import FusedConvolution
from fastmsflow.nn.weight_cache import WeightCache
from tests.helpers.ops_parity import DEVICE
from tests.helpers.small_model import SIZE, images, model
from tests.helpers.tolerances import AUTOCAST, FOLDED


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_100"])
def test_a_model_for_inference_predicts_the_same(name: str) -> None:
    original = model(name)
    fast = original.for_inference()
    assert (fast.made_for_inference, original.made_for_inference) == (True, False)
    assert norms(original.extractor) > 10
    assert norms(fast.extractor) == 0
    assert not any(p.requires_grad for p in fast.parameters())
    for ours, theirs in zip(fast.predict(images()), original.predict(images()), strict=True):
        torch.testing.assert_close(ours, theirs, **FOLDED)


def test_in_bfloat16_maps_stay_near_and_sums_are_float32() -> None:
    original = model()
    fast = original.for_inference(torch.bfloat16)
    # On a CPU bfloat16 would move the features, and float16 is slow.
    extractor = torch.float16 if DEVICE == "cuda" else torch.float32
    assert (fast.flow.dtype, fast.extractor.dtype, fast.extractor.mean.dtype) == (
        torch.bfloat16,
        extractor,
        torch.float32,
    )
    assert {level.dtype for level in fast.features(images())} == {torch.bfloat16}
    with torch.no_grad():
        exact, _ = original.flow.log_likelihood_maps(original.features(images()))
        maps, log_det = fast.flow.log_likelihood_maps(fast.features(images()))
    assert {m.dtype for m in (*maps, log_det)} == {torch.float32}
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(maps, exact, strict=True)]
    assert max(errors) < AUTOCAST["bfloat16"]


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")], ids=str)
def test_a_cpu_without_units_is_warned_of_and_never_gets_an_extractor_in_float16(
    dtype: torch.dtype, units: str, has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"fastmsflow.cpu.features.has_{units}_units", lambda: has_units)
    monkeypatch.setattr("fastmsflow.models.fused_extractor.has_float16_units", lambda: has_units)
    original = model("test_efficientnet").cpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = original.for_inference(dtype)
    told = [str(warning.message) for warning in caught if warning.category is InputWarning]
    assert [line.endswith("more slowly than float32; take torch.float32") for line in told] == [True] * (not has_units)
    assert fast.flow.dtype == dtype
    in_float16 = dtype == torch.float16 and has_units
    assert fast.extractor.dtype == (torch.float16 if in_float16 else torch.float32)
    with torch.no_grad():
        assert torch.isfinite(fast.scores(images().cpu()).log_score).all()


def test_half_precision_leaves_the_standardisation_as_it_was() -> None:
    original = MSFlow(
        "resnet18", pretrained=False, image_size=SIZE, blocks=(1, 1, 1), standardise=True, backend="torch"
    ).eval()
    original.standardiser.fit(original.pooled(images().cpu()))
    fast = original.for_inference(torch.bfloat16)
    assert torch.equal(fast.standardiser.mean0, original.standardiser.mean0)
    assert fast.standardiser.mean0.dtype == torch.float32
    assert {level.dtype for level in fast.features(images().cpu())} == {torch.bfloat16}


def test_a_convolution_used_twice_keeps_its_norm() -> None:
    class Net(nn.Module):
        """Its convolution's output goes past the norm as well, which no hook sees."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.normal_()

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.conv(x)
            return [x + self.norm(x)]

    net, x = Net().eval(), torch.rand(1, 3, 8, 8)
    copied = fuse_conv_bn(net, x)
    assert norms(copied) == 1
    assert torch.equal(copied(x)[0], net(x)[0])


def test_batch_norms_of_a_network_that_takes_no_small_image_are_folded_all_the_same() -> None:
    class Particular(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> list[Tensor]:
            assert x.shape[-1] >= 96
            return self.net(x)

    extractor = FeatureExtractor("test_efficientnet", pretrained=False)
    extractor.net = Particular(extractor.net)
    assert norms(extractor) > 5
    extractor.fold_batch_norms((96, 96))
    assert norms(extractor) == 0


def test_a_model_that_is_made_for_inference_twice_stays_as_it_is() -> None:
    fast = MSFlow("resnetv2_50", pretrained=False, image_size=SIZE, blocks=(1, 1, 1)).for_inference()
    again = fast.for_inference()
    counts = [sum(isinstance(m, FusedConvolution) for m in each.modules()) for each in (fast, again)]
    assert counts[0] == counts[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(again.predict(images()), fast.predict(images()), strict=True))


def test_a_model_for_inference_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save the model that it was made from"):
        model().for_inference().save(tmp_path / "model.safetensors")


def test_cached_values_follow_their_weights() -> None:
    cache: WeightCache[float] = WeightCache()
    weight = torch.ones(2)
    calls = []

    def compute() -> float:
        calls.append(1)
        return weight.sum().item()

    with torch.no_grad():
        assert [cache.get(compute, [weight]) for _ in range(3)] == [2.0] * 3
        assert len(calls) == 1
        weight.add_(1)
        assert cache.get(compute, [weight]) == 4.0
        weight.data = torch.zeros(2)
        assert cache.get(compute, [weight]) == 0.0
        count = len(calls)
        assert copy.deepcopy(cache).get(compute, [weight]) == pickle.loads(pickle.dumps(cache)).get(compute, [weight])
        assert len(calls) == count + 2
    cache.get(compute, [weight])
    cache.get(compute, [weight])
    assert len(calls) == count + 4


@torch.no_grad()
def test_cached_values_follow_weights_at_the_address_of_older_ones() -> None:
    weight, memory, cache = nn.Parameter(torch.zeros(4)), bytearray(16), WeightCache[float]()
    for value in (1.0, 2.0):
        weight.data = torch.frombuffer(memory, dtype=torch.float32).fill_(value)
        assert cache.get(lambda: float(weight[0]), [weight]) == value


@pytest.mark.slow
def test_eval_drops_values_cached_from_half_precision() -> None:
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 16), (8, 8), (1, 1), backend="triton").to(DEVICE).half().eval().requires_grad_(False)
    x = [torch.randn(2, c, 4, 4, device=DEVICE).half() for c in flow.channels]
    with torch.no_grad():
        before = flow.log_likelihoods(x)
        # Nothing tells of writes through ``.data``; eval() is to be called after them.
        for name, parameter in flow.named_parameters():
            if name.endswith(("conv2.bias", "global_scale", "global_offset")):
                parameter.data.add_(1)
        after, expected = flow.eval().log_likelihoods(x), copy.deepcopy(flow).log_likelihoods(x)
    assert not torch.equal(before[0], expected[0])
    assert all(map(torch.equal, after, expected))


def test_a_cached_value_that_another_thread_drops_is_still_returned(monkeypatch) -> None:
    cache: WeightCache[int] = WeightCache()

    class UsedValues(list):
        """Stands in for the other thread: it comes in between."""

        def append(self, _: object) -> None:
            cache.clear()

    monkeypatch.setattr("fastmsflow.nn.weight_cache._used_values", UsedValues())
    with torch.no_grad():
        assert [cache.get(lambda: 1, [torch.ones(1)]) for _ in range(2)] == [1, 1]


def test_features_by_fused_convolutions_are_the_same_up_to_rounding() -> None:
    original = model()
    for fused, plain in zip(original.pooled(images(), fused=True), original.pooled(images()), strict=True):
        torch.testing.assert_close(fused, plain, **FOLDED)


def test_convolutions_are_fused_once_for_given_weights() -> None:
    original = model().cpu()
    pixels = images().cpu()
    before = original.pooled(pixels, fused=True)
    cached = original._fused_extractor._entry
    original.features(pixels, fused=True)
    assert original._fused_extractor._entry is cached
    next(original.extractor.parameters()).data = torch.zeros_like(next(original.extractor.parameters()))
    after = original.pooled(pixels, fused=True)
    assert not torch.equal(before[0], after[0])


def test_a_saved_model_has_the_weights_that_were_not_fused(tmp_path) -> None:
    original = model().cpu()
    expected = {name: value.clone() for name, value in original.state_dict().items()}
    original.pooled(images().cpu(), fused=True)
    assert original.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in original.state_dict().items())
