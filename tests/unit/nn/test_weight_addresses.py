"""Every move and replacement of a weight that a recorded graph reads is noticed, at little cost."""

import copy
import timeit
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastmsflow import MSFlow
from fastmsflow.nn.cuda_graph import WeightAddresses
from fastmsflow.nn.feature_pooling import FeatureNormalizer


def model() -> MSFlow:
    return MSFlow("resnet18", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1), backend="torch").eval()


def moved(name: str) -> Callable[[MSFlow], None]:
    def change(original: MSFlow) -> None:
        tensor = original.state_dict(keep_vars=True)[name]
        tensor.data = tensor.data.clone()

    return change


def replaced_weight(original: MSFlow) -> None:
    conv = original.extractor.net.conv1
    conv.weight = nn.Parameter(conv.weight.detach())


def replaced_weight_in_the_registry(original: MSFlow) -> None:
    conv = original.extractor.net.conv1
    conv._parameters["weight"] = nn.Parameter(conv.weight.detach())


def replaced_buffer(original: MSFlow) -> None:
    norm = original.extractor.net.bn1
    norm.running_mean = norm.running_mean.clone()


def replaced_scalar(original: MSFlow) -> None:
    norm = original.extractor.net.bn1
    norm.num_batches_tracked = norm.num_batches_tracked.clone()


def removed_weight(original: MSFlow) -> None:
    original.flow.parallel_flows[0].blocks[0].subnet.conv1.bias = None


def replaced_module(original: MSFlow) -> None:
    block = original.flow.parallel_flows[0].blocks[0]
    block.subnet.conv1 = copy.deepcopy(block.subnet.conv1)


def replaced_part(original: MSFlow) -> None:
    original.flow = copy.deepcopy(original.flow)


def added_part(original: MSFlow) -> None:
    original.standardiser = FeatureNormalizer(original.extractor.channels)


def deep_part_in_another_dtype(original: MSFlow) -> None:
    original.extractor.net.layer1.double()


def deep_part_in_another_layout(original: MSFlow) -> None:
    original.extractor.net.layer1.to(memory_format=torch.channels_last)


CHANGES = [
    moved("extractor.net.conv1.weight"),
    moved("extractor.net.bn1.running_var"),
    moved("flow.fusion_flow.subnet_1.conv1.weight"),
    replaced_weight,
    replaced_weight_in_the_registry,
    replaced_buffer,
    replaced_scalar,
    removed_weight,
    replaced_module,
    replaced_part,
    added_part,
    deep_part_in_another_dtype,
    deep_part_in_another_layout,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_move_or_a_replacement_is_noticed_once(change: Callable[[MSFlow], None]) -> None:
    original, places = model(), WeightAddresses()
    first = places.version_of(original)
    assert places.version_of(original) == first
    change(original)
    second = places.version_of(original)
    assert second != first
    assert places.version_of(original) == second


def test_weights_of_inference_mode_that_moved_are_noticed() -> None:
    with torch.inference_mode():
        original, places = model(), WeightAddresses()
        first = places.version_of(original)
        assert places.version_of(original) == first
        moved("extractor.net.conv1.weight")(original)
        assert places.version_of(original) != first


def test_a_copy_of_a_model_has_places_of_its_own() -> None:
    original = model()
    original._weight_addresses.version_of(original)
    copied = copy.deepcopy(original)
    first = copied._weight_addresses.version_of(copied)
    moved("extractor.net.conv1.weight")(original)
    assert copied._weight_addresses.version_of(copied) == first


def test_unchanged_places_cost_far_less_than_a_walk_over_the_weights() -> None:
    original, places = model(), WeightAddresses()

    def walk() -> list[int]:
        return [tensor.data_ptr() for tensor in (*original.parameters(), *original.buffers())]

    def fastest(function: Callable[[], object]) -> float:
        return min(timeit.repeat(function, number=20, repeat=20))

    # It takes a seventeenth of it; with two calls of Python for each tensor it took a quarter.
    assert fastest(lambda: places.version_of(original)) < 0.15 * fastest(walk)
