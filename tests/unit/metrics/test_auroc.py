"""AUROC and F1 against brute force and scikit-learn, their errors, and the speed."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from fastmsflow.errors import InputError
from fastmsflow.metrics import auroc, f1_at, f1_max


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


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40),
    st.sampled_from([-5, -0.5, 0, 0.25, 0.3, 0.75, 9]),
)
@settings(max_examples=200, deadline=None)
def test_f1_at_a_threshold_equals_sklearn_with_many_ties(items: list[tuple[bool, int]], threshold: float) -> None:
    labels = np.array([label for label, _ in items])
    scores = np.array([score for _, score in items], dtype=np.float32) / 4
    if labels.all() or not labels.any():
        return
    found = f1_at(labels, scores, threshold)
    assert found == pytest.approx(f1_score(labels, scores > threshold, zero_division=0), abs=1e-12)
    assert found <= f1_max(labels, scores)


def test_f1_compares_float32_scores_with_the_threshold_itself_not_with_its_nearest_float32() -> None:
    scores = np.array([0.1, 0.0], np.float32)  # this 0.1 is 0.100000001490
    assert f1_at([1, 0], scores, 0.1) == 1
    assert f1_at([1, 0], torch.from_numpy(scores).bfloat16(), 0.1) == 1  # 0.1001
    assert f1_at([1, 0], scores, float(scores[0])) == 0


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
    for metric in (auroc, lambda *items: f1_at(*items, 0.5)):
        with pytest.raises(InputError, match=says) as error:
            metric(np.array(labels), np.array(scores))
        assert "\n" not in str(error.value)


def test_f1_refuses_a_threshold_that_is_not_finite() -> None:
    with pytest.raises(InputError, match="threshold is nan; it must be finite"):
        f1_at([1, 0], [1.0, 0.0], float("nan"))


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
