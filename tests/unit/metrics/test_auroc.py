"""AUROC against brute force and scikit-learn, its errors, and its speed."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fastmsflow.errors import InputError
from fastmsflow.metrics import auroc


def pairs_won(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of (defective, good) pairs in the right order, ties half, pair by pair."""
    won = [(d > g) + 0.5 * (d == g) for d in scores[labels] for g in scores[~labels]]
    return sum(won) / len(won)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40))
@settings(max_examples=200, deadline=None)
def test_equals_brute_force_with_many_ties(items: list[tuple[bool, int]]) -> None:
    labels = np.array([label for label, _ in items])
    scores = np.array([score for _, score in items], dtype=np.float32) / 4
    if labels.all() or not labels.any():
        return
    assert auroc(labels, scores) == pytest.approx(pairs_won(labels, scores), abs=1e-12)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(500,), (5, 20, 30)])
def test_equals_sklearn(dtype: type, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(shape) < 0.2
    scores = (rng.normal(size=shape) * 3 + labels).astype(dtype)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12)


def test_perfect_inverted_constant() -> None:
    labels = np.array([0, 0, 1, 1])
    assert auroc(labels, np.array([0.1, 0.2, 0.3, 0.4])) == 1.0
    assert auroc(labels, np.array([0.4, 0.3, 0.2, 0.1])) == 0.0
    assert auroc(labels, np.ones(4)) == 0.5


def test_infinities_are_scores() -> None:
    assert auroc([0, 0, 1, 1], np.array([-np.inf, 0.0, 0.0, np.inf])) == 0.875


def test_strictly_increasing_transform_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    labels, scores = rng.random(300) < 0.5, rng.normal(size=300).round(1)
    assert auroc(labels, np.exp(scores) * 7 - 3) == auroc(labels, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_takes_torch_tensors_with_gradients(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    scores = torch.tensor([0.5, 0.5, 0.25, 1.0], dtype=dtype, requires_grad=True)
    assert auroc(labels, scores) == 0.875


def test_leaves_its_arguments_alone() -> None:
    labels, scores = np.array([1, 0, 1, 0]), np.array([3.0, 2.0, 1.0, 0.0])
    auroc(labels, scores)
    assert labels.tolist() == [1, 0, 1, 0] and scores.tolist() == [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "scores", "says"),
    [
        ([1, 1], [0.0, 1.0], "0 good and 2 defective"),
        ([0, 0], [0.0, 1.0], "2 good and 0 defective"),
        ([], [], "both classes"),
        ([0, 1], [0.0, 1.0, 2.0], "shape"),
        ([0, 1], [[0.0, 1.0]], "shape"),
        ([0, 1], [np.nan, 1.0], "NaN"),
        ([0, 1], [1.0, np.nan], "NaN"),
        ([0, 255], [0.0, 1.0], "0 and 1"),
        ([0, 1], ["a", "b"], "real numbers"),
        ([0, 1], [1j, 2j], "real numbers"),
    ],
)
def test_errors(labels: list, scores: list, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        auroc(np.array(labels), np.array(scores))
    assert "\n" not in str(error.value)


def test_200_maps_of_512_in_time_and_memory() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random((200, 512, 512), dtype=np.float32)
    labels = np.zeros(scores.shape, dtype=bool)
    labels[100:, 100:200, 200:280] = True
    scores[labels] += 0.5
    tracemalloc.start()
    started = time.perf_counter()
    value = auroc(labels, scores)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value == pytest.approx(0.875, abs=1e-3)  # uniform against uniform + 0.5
    assert seconds <= 10
    assert peak <= 1.5 * scores.nbytes
