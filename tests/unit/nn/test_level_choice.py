"""Layers of a backbone that are chosen by number: a transformer's blocks, its tokens, pooled grids, odd channels."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F

from fastmsflow import InputError
from fastmsflow.errors import InputWarning
from fastmsflow.nn.feature_extractor import FeatureExtractor
from fastmsflow.nn.level_choice import pool_level, with_even_channels

SIZE = (64, 96)


def extractor(name: str = "test_vit", size: tuple[int, int] = SIZE, **options) -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(name, pretrained=False, image_size=size, **options)


# A class token; a class and four registers; a class and four registers with rotary positions; one register alone.
@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", (42, 56), 5),
        ("vit_small_patch16_dinov3", (48, 64), 5),
        ("test_vit", SIZE, 1),
        ("test_vit2", SIZE, 1),
    ],
)
def test_blocks_are_those_of_the_whole_transformer_without_class_and_register_tokens(name, size, prefix) -> None:
    features = extractor(name, size, layers=(0, 1, 3))
    whole = timm.create_model(name, img_size=size).eval()
    whole.load_state_dict({key.removeprefix("model."): v for key, v in features.net.state_dict().items()}, strict=False)
    images = torch.rand(2, 3, *size)
    tokens: dict[int, torch.Tensor] = {}
    for number in (0, 1, 3):
        whole.blocks[number].register_forward_hook(lambda *of, number=number: tokens.update({number: of[2]}))
    with torch.no_grad():
        whole.forward_features((images - features.mean) / features.std)
    assert whole.num_prefix_tokens == prefix
    height, width = (side // features.strides[0] for side in size)
    for level, number in zip(features(images), (0, 1, 3), strict=True):
        sequence = tokens[number][:, prefix:]
        assert tokens[number].shape[1] == prefix + height * width
        assert torch.allclose(level, sequence.transpose(1, 2).reshape(2, -1, height, width), atol=1e-5)


def test_negative_layers_count_from_the_end() -> None:
    given, negative = extractor(layers=(1, 4, 5)), extractor(layers=(-5, -2, -1))
    assert given.layers == negative.layers == given.outputs == (1, 4, 5)
    images = torch.rand(1, 3, *SIZE)
    assert all(map(torch.equal, given(images), negative(images)))


def test_stages_of_a_convolutional_network_are_timms_outputs() -> None:
    chosen = extractor("tf_efficientnet_lite0", layers=(0, 2, 4))
    assert (chosen.channels, chosen.strides) == ((16, 40, 320), (2, 8, 32))
    assert chosen.description == "tf_efficientnet_lite0, layers 0, 2, 4 (strides 2, 8, 32)"
    assert [level.shape[2:] for level in chosen(torch.rand(1, 3, *SIZE))] == [(32, 48), (8, 12), (2, 3)]


def test_the_official_five_pad_by_reflection_whatever_layers_are_taken() -> None:
    chosen = extractor("resnet18", layers=(2, 3, 4))
    assert chosen.strides == (8, 16, 32)
    assert chosen.net.layer2[0].conv1.padding_mode == "reflect"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (2, 5)}, r"^layers is \(2, 5\); give three numbers of layers, e\.g\. \(2, 5, 8\)$"),
        ({"layers": "2,5"}, r"^layers is '2,5'; give three"),
        ({"layers": (1, 2, 6)}, "^layers are 1, 2, 6; test_vit has 0 to 5, or -6 to -1 from its end$"),
        ({"layers": (-7, 1, 2)}, "test_vit has 0 to 5"),
        ({"layers": (3, 2, 4)}, "^layers are 3, 2, 4; give three different ones in ascending order$"),
        ({"layers": (1, -5, 2)}, "give three different ones"),
        ({"layers": (1, 2, True)}, "layers is True; it must be a whole number"),
        ({"level_strides": (1, 0, 2)}, "level_strides is 0; it must be a whole number, 1 or more"),
        ({"level_strides": (2, 1, 2)}, "^level_strides are 2, 1, 2; give them in ascending order$"),
        (
            {"level_strides": (1, 2, 5)},
            "^level stride 5 pools more than the grid of 4x6 that test_vit makes of images of 64x96; give strides of at"
            " most 4, or larger images$",
        ),
    ],
    ids=str,
)
def test_what_is_no_choice_of_levels_is_one_line(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        extractor(**options)


def test_level_strides_average_one_grid_to_three_scales() -> None:
    size, options = (64, 128), {"layers": (1, 3, 5)}
    one_grid, scales = extractor(size=size, **options), extractor(size=size, **options, level_strides=(1, 2, 4))
    assert scales.strides == (16, 32, 64)
    images = torch.rand(2, 3, *size)
    for level, pooled, stride in zip(one_grid(images), scales(images), (1, 2, 4), strict=True):
        assert torch.allclose(pooled, F.avg_pool2d(level, stride), atol=1e-6)
        assert pooled.shape[2:] == (4 // stride, 8 // stride)


def test_a_border_that_the_stride_does_not_divide_is_pooled_too() -> None:
    level = torch.zeros(1, 1, 5, 7)
    level[..., -1, -1] = 1
    assert pool_level(level, 2).shape == (1, 1, 3, 4)
    assert pool_level(level, 2)[0, 0, -1, -1] > 0


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("vit_small_patch14_dinov2", (256, 256), "has patches of 14; 256 is no multiple: give 252 or 266"),
        ("test_vit", (112, 100), "has patches of 16; 100 is no multiple: give 96 or 112"),
        ("test_vit", (33, 100), "33 is no multiple: give 32 or 48; 100 is no multiple: give 96 or 112"),
        ("vit_small_patch14_dinov2", (42, 32), "32 is no multiple: give 42"),
    ],
)
def test_sides_that_the_patch_does_not_divide_are_refused_with_the_nearest_that_it_does(name, size, says) -> None:
    with pytest.raises(InputError, match=rf"^{name} .*{says}$"):
        extractor(name, size)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vit_small_patch16_dinov3", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (
            "vit_base_patch16_clip_224",
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
        ("test_vit", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_a_transformers_images_are_normalized_by_its_own_configuration(name, mean, std) -> None:
    with torch.device("meta"):
        features = FeatureExtractor(name, pretrained=False, image_size=(64, 64), layers=(0, 1, 2))
    assert features.mean.flatten().tolist() == pytest.approx(mean)
    assert features.std.flatten().tolist() == pytest.approx(std)


def test_odd_channels_get_the_images_brightness_and_a_word() -> None:
    with pytest.warns(
        InputWarning, match=r"^rexnet_100: levels of 61 channels get one more, the image's brightness"
    ) as warned:
        odd = extractor("rexnet_100", layers=(1, 2, 3))
    assert len(warned) == 1 and odd.channels == (38, 62, 128)
    with torch.no_grad():
        images = torch.rand(1, 3, *SIZE)
        normalized = (images - odd.mean) / odd.std
        own = odd.net(normalized)[1]
    padded = odd(images)[1]
    assert torch.equal(padded[:, :61], own)
    assert torch.allclose(padded[:, 61:], F.avg_pool2d(normalized.mean(1, keepdim=True), 8), atol=1e-6)


def test_even_channels_stay_without_a_copy_or_a_word() -> None:
    level = torch.rand(1, 4, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor()
    assert with_even_channels(level, torch.rand(1, 3, 8, 8)) is level
