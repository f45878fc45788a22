"""The frozen backbone: reflection padding, other families, what is frozen, what is refused."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastmsflow.errors import InputError
from fastmsflow.nn.feature_extractor import OFFICIAL, FeatureExtractor


class ReflectedConv(nn.Conv2d):
    """A convolution that pads nothing, behind an explicit reflection."""

    def forward(self, x: Tensor) -> Tensor:
        vertical, horizontal = self.padding
        x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode="reflect")
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def torchvision_resnet(name: str) -> nn.Module:
    """torchvision's ResNet, its padded convolutions reflecting, all its values random."""
    net = getattr(torchvision.models, name)(weights=None).double().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.__class__ = ReflectedConv
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            for positive in (module.running_var, module.weight):
                nn.init.uniform_(positive, 0.5, 1.5)
    return net


def stages(net: nn.Module, images: Tensor) -> list[Tensor]:
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(1, 3, 1, 1)
    x = net.maxpool(net.relu(net.bn1(net.conv1((images - mean) / std))))
    levels = []
    for stage in (net.layer1, net.layer2, net.layer3):
        x = stage(x)
        levels.append(x)
    return levels


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_five_equal_a_resnet_that_pads_by_reflection(name: str) -> None:
    torch.manual_seed(0)
    reference = torchvision_resnet(name)
    extractor = FeatureExtractor(name, pretrained=False).double()
    values = reference.state_dict()
    extractor.net.load_state_dict({key: values[key] for key in extractor.net.state_dict()})
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = stages(reference, images)
    got = extractor(images)
    assert extractor.name == f"{name}.tv_in1k"
    assert extractor.strides == (4, 8, 16)
    assert extractor.channels == tuple(level.shape[1] for level in expected)
    for level, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-10, atol=1e-10)


def test_max_pool_stays_ordinary() -> None:
    extractor = FeatureExtractor("resnet18", pretrained=False)
    pools = [module for module in extractor.modules() if isinstance(module, nn.MaxPool2d)]
    assert len(pools) == 1
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(pools[0](x), F.max_pool2d(x, 3, 2, 1))


def padding_modes(extractor: FeatureExtractor) -> set[str]:
    convolutions = [m for m in extractor.modules() if isinstance(m, nn.Conv2d) and m.padding != (0, 0)]
    return {module.padding_mode for module in convolutions}


def test_only_the_official_five_reflect() -> None:
    assert padding_modes(FeatureExtractor("resnet18.tv_in1k", pretrained=False)) == {"reflect"}
    assert padding_modes(FeatureExtractor("resnet18.a1_in1k", pretrained=False)) == {"zeros"}
    assert padding_modes(FeatureExtractor("resnet26", pretrained=False)) == {"zeros"}


@pytest.fixture(scope="module")
def small() -> FeatureExtractor:
    return FeatureExtractor("resnet18", pretrained=False)


def test_frozen_in_eval_without_gradient_but_trainable_behind(small: FeatureExtractor) -> None:
    model = nn.ModuleDict({"extractor": small, "head": nn.Conv2d(64, 2, 1)}).train()
    assert not any(module.training for module in small.modules())
    assert not any(parameter.requires_grad for parameter in small.parameters())
    before = {key: value.clone() for key, value in small.state_dict().items()}
    features = small(torch.rand(2, 3, 64, 64, requires_grad=True))
    assert not any(level.requires_grad or level.is_inference() for level in features)
    model["head"](features[0]).sum().backward()
    assert model["head"].weight.grad is not None
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_normalises_by_the_models_own_configuration(small: FeatureExtractor) -> None:
    assert small.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert small.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    lite = FeatureExtractor("tf_efficientnet_lite0", pretrained=False)
    assert lite.mean.flatten().tolist() == lite.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert not {"mean", "std"} & set(small.state_dict())


def test_precisions_and_memory_formats(small: FeatureExtractor) -> None:
    images = torch.rand(2, 3, 64, 64)
    expected = small(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = small(images)
    channels_last = FeatureExtractor("resnet18", pretrained=False).to(memory_format=torch.channels_last)
    channels_last.load_state_dict(small.state_dict())
    laid_out = channels_last(images.to(memory_format=torch.channels_last))
    for level, half, other in zip(expected, mixed, laid_out, strict=True):
        assert (half.float() - level).norm() < 0.05 * level.norm()
        torch.testing.assert_close(other, level, rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float64):
        converted = FeatureExtractor("resnet18", pretrained=False)
        converted.load_state_dict(small.state_dict())
        for level, wanted in zip(converted.to(dtype)(images), expected, strict=True):
            assert level.dtype == dtype
            assert (level.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("convnext_atto", (40, 80, 160), (4, 8, 16)),
        ("mobilenetv3_small_100", (16, 24, 48), (4, 8, 16)),
        ("regnetx_002", (24, 56, 152), (4, 8, 16)),
        ("efficientnet_b0", (24, 40, 112), (4, 8, 16)),
        ("swin_tiny_patch4_window7_224", (96, 192, 384), (4, 8, 16)),
        ("vit_tiny_patch16_224", (192, 192, 192), (16, 16, 16)),
    ],
)
def test_other_families(name: str, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    extractor = FeatureExtractor(name, pretrained=False, image_size=(64, 96))
    assert (extractor.channels, extractor.strides) == (channels, strides)
    shapes = [tuple(level.shape) for level in extractor(torch.rand(2, 3, 64, 96))]
    assert shapes == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]


def test_a_model_of_one_size_refuses_others() -> None:
    with pytest.raises(InputError, match=r"takes \(224, 224\); resize"):
        FeatureExtractor("vit_tiny_patch16_224", pretrained=False)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 64, 64), "give \\(B, 3, H, W\\)"),
        (torch.zeros(1, 1, 64, 64), "give \\(B, 3, H, W\\)"),
        (torch.zeros(1, 3, 31, 64), "at least 32"),
    ],
)
def test_images_that_are_refused(small: FeatureExtractor, images: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        small(images)


def test_smallest_image(small: FeatureExtractor) -> None:
    assert [tuple(level.shape[2:]) for level in small(torch.rand(1, 3, 32, 32))] == [(8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wide_resnet50", "did you mean wide_resnet50_2"),
        ("resnet18.tv_in1", "did you mean resnet18.tv_in1k"),
        ("no such thing at all", "list_models"),
        # timm 1.0.15 serves no features of it, later versions not three levels.
        ("crossvit_tiny_240", "three|features_only not implemented"),
    ],
)
def test_names_that_are_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        FeatureExtractor(name, pretrained=False)
    assert "\n" not in str(error.value)


def test_a_model_that_serves_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("features_only not implemented\nfor this model.")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(InputError, match=r"cannot build resnet26 for features \(features_only not implemented\);"):
        FeatureExtractor("resnet26", pretrained=False)


@pytest.mark.slow
def test_importing_it_does_not_import_timm() -> None:
    code = "import sys, fastmsflow.nn.feature_extractor; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["legacy_xception", "xception41"])
def test_a_network_that_collects_features_by_hooks_stays_as_it_is(name: str) -> None:
    extractor = FeatureExtractor(name, pretrained=False)
    images = torch.rand(1, 3, 96, 96)
    extractor.fold_batch_norms((96, 96))
    before = extractor(images)
    extractor.fuse_convolutions((96, 96))
    assert all(map(torch.equal, extractor(images), before))


def test_a_users_hook_goes_on_being_called() -> None:
    extractor, calls = FeatureExtractor("resnet18", pretrained=False), []
    extractor.net.layer2.register_forward_hook(lambda *_: calls.append("layer2"))
    extractor.fold_batch_norms((64, 64))
    extractor.fuse_convolutions((64, 64))
    calls.clear()
    extractor(torch.rand(1, 3, 64, 64))
    assert calls == ["layer2"]
