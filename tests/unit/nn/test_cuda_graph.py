"""CUDA graphs of predictions: recorded, replayed, held and left behind; stand-ins for the graphs on a CPU."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastmsflow import InputError, MSFlow
from fastmsflow.nn import cuda_graph
from fastmsflow.nn.cuda_graph import CudaGraphCache
from tests.helpers.ops_parity import DEVICE
from tests.helpers.small_model import images, model


class Graph:
    """Stands in for a CUDA graph: keeps what ran while it recorded, runs it again."""

    recording: "Graph | None" = None

    def work(self) -> None:
        """Holds what a test replaces where it looks at the outputs."""

    def replay(self) -> None:
        self.work()


@contextmanager
def record(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def device(_: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda_graph, "_serves", lambda x: not torch.is_grad_enabled())


def doubler(calls: list[str]):
    def double(x: Tensor) -> tuple[Tensor]:
        out = 2 * x
        if Graph.recording is None:
            calls.append("eager")
        else:
            calls.append("recorded")
            Graph.recording.work = lambda: torch.mul(x, 2, out=out)
        return (out,)

    return double


def test_the_second_call_of_a_shape_is_recorded_and_later_ones_replayed(graphs: None) -> None:
    calls: list[str] = []
    double, play = doubler(calls), CudaGraphCache()
    with torch.no_grad():
        results = [play(double, [torch.full((2,), float(i))])[0] for i in range(5)]
        assert [r.tolist() for r in results] == [[2.0 * i] * 2 for i in range(5)]
        assert calls == ["eager", "eager", "recorded"]
        play(double, [torch.ones(3)])
        play(double, [torch.ones(2)], lambda: "another state")
        assert calls == ["eager", "eager", "recorded", "eager", "eager"]
        play.clear()
        play(double, [torch.ones(2)])
    assert calls[-1] == "eager"
    play(double, [torch.ones(2)])
    assert calls[-1] == "eager"


def test_a_recording_reads_no_weights_that_autocast_rounded_before(graphs: None) -> None:
    cached: list[bool] = []

    def look(x: Tensor) -> tuple[Tensor]:
        cached.append(torch.is_autocast_cache_enabled())
        return (x.clone(),)

    play = CudaGraphCache()
    with torch.no_grad():
        for _ in range(2):
            play(look, [torch.ones(2)])
    # A plain call; one that warms up and one that is recorded.
    assert cached == [True, False, False]
    assert torch.is_autocast_cache_enabled()


def test_what_cannot_be_recorded_runs_without_and_says_so_once(graphs: None) -> None:
    def waits_for_the_gpu(x: Tensor) -> tuple[Tensor]:
        if Graph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (2 * x,)

    play = CudaGraphCache()
    with torch.no_grad():
        play(waits_for_the_gpu, [torch.ones(2)])
        with pytest.warns(UserWarning, match="without"):
            assert play(waits_for_the_gpu, [torch.ones(2)])[0].tolist() == [2.0, 2.0]
        assert play(waits_for_the_gpu, [torch.ones(2)])[0].tolist() == [2.0, 2.0]


def test_only_the_last_used_graphs_are_held(graphs: None) -> None:
    calls: list[str] = []
    double, play = doubler(calls), CudaGraphCache()
    with torch.no_grad():
        for n in range(1, cuda_graph.MAX_GRAPHS + 2):
            for _ in range(3):
                play(double, [torch.ones(n)])
    assert len(play._recorded) == cuda_graph.MAX_GRAPHS
    assert calls.count("recorded") == cuda_graph.MAX_GRAPHS + 1


def let_a_graph_repeat(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has MSFlow's function of this name run again where a graph that it was recorded in is replayed -> how each of its
    own calls was made."""
    function, calls = getattr(MSFlow, name), list[str]()

    @functools.wraps(function)
    def watched(*args: object) -> tuple[Tensor, ...]:
        found = function(*args)
        calls.append("eager" if Graph.recording is None else "recorded")
        if Graph.recording is not None:
            Graph.recording.work = lambda: [old.copy_(new) for old, new in zip(found, function(*args), strict=True)]
        return found

    monkeypatch.setattr(MSFlow, name, watched)
    return calls


@pytest.mark.parametrize("name", ["features", "scores", "scores_of_features", "predict"])
def test_what_a_model_makes_of_a_shape_is_replayed_and_safe_to_keep(graphs: None, name: str, monkeypatch) -> None:
    original = model()
    given = [images() * share for share in (1.0, 0.7, 0.4, 0.1)]
    if name == "scores_of_features":
        given = [copy.deepcopy(original).features(x) for x in given]
    with torch.no_grad():
        expected = [getattr(copy.deepcopy(original), name)(x) for x in given]
        calls = let_a_graph_repeat(f"_{name}", monkeypatch)
        found = [getattr(original, name)(x) for x in given]
    assert calls == ["eager", "eager", "recorded"]
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(list(ours), list(theirs))
    # None within another.
    assert len(original._graphs._seen) == len(original._graphs._recorded) == 1


@pytest.mark.parametrize("name", ["features", "scores"])
def test_nothing_is_replayed_in_training_or_where_gradients_are_taken(graphs: None, name: str, monkeypatch) -> None:
    original = model()
    calls = let_a_graph_repeat(f"_{name}", monkeypatch)
    for _ in range(3):
        getattr(original, name)(images())
    original.train()
    with torch.no_grad():
        for _ in range(3):
            getattr(original, name)(images())
    assert calls == ["eager"] * 6


def test_no_features_at_all_are_refused_where_graphs_are_replayed(graphs: None) -> None:
    with torch.no_grad(), pytest.raises(InputError, match="0 levels given"):
        model().scores_of_features([])


@pytest.mark.parametrize(
    ("name", "calls_after"),
    [
        ("extractor.net.conv1.weight", []),
        ("flow.parallel_flows.0.blocks.0.subnet.conv2.weight", []),
        ("flow.parallel_flows.0.blocks.0.global_offset", []),
        # What is kept of it is computed in the next call and counted as given up in the one after it, and both are made
        # as they are; the third warms up and is recorded.
        ("flow.parallel_flows.0.blocks.0.subnet.conv1.weight", ["eager", "eager", "eager", "recorded"]),
    ],
)
def test_weights_changed_in_place_are_read_by_the_graph_or_met_by_a_new_one(
    graphs: None, name: str, calls_after: list[str], monkeypatch
) -> None:
    original = model("resnet18")
    calls = let_a_graph_repeat("_predict", monkeypatch)
    with torch.no_grad():
        before, *_ = [original.predict(images()) for _ in range(3)]
        assert calls == ["eager", "eager", "recorded"]
        original.get_parameter(name).mul_(1.5).add_(0.1)
        found = [original.predict(images()) for _ in range(4)]
    assert calls[3:] == calls_after
    expected = copy.deepcopy(original).predict(images()).log_score
    assert not torch.equal(before.log_score, expected)
    assert all(torch.equal(prediction.log_score, expected) for prediction in found)


def predictions_state(original: MSFlow) -> object:
    """Returns what tells if a graph may be replayed."""
    states = []
    original._graphs = lambda function, inputs, state: states.append(state()) or function(*inputs)
    original.predict(images())
    return states[0]


def test_a_fused_step_is_met_by_new_values_and_a_new_graph() -> None:
    """Fused optimizers move no version."""
    original = model()
    before, state = original.predict(images()), predictions_state(original)
    optimizer = torch.optim.Adam(original.flow.parameters(), lr=0.1, fused=True)
    features = [torch.randn_like(level) for level in original.features(images())]
    original.flow.nll(features).mean().backward()
    optimizer.step()
    after = original.predict(images())
    assert not torch.equal(before.log_score, after.log_score)
    assert torch.equal(after.log_score, copy.deepcopy(original).predict(images()).log_score)
    assert predictions_state(original) != state


@pytest.mark.parametrize("part", ["flow", "extractor"])
def test_a_part_that_moved_is_met_by_a_new_graph(part: str) -> None:
    original = model()
    state = predictions_state(original)
    getattr(original, part).double().float()
    assert predictions_state(original) != state


def test_a_recording_holds_the_kept_values_that_it_reads(graphs: None) -> None:
    flow, play = model().flow, CudaGraphCache()
    x = [torch.randn(1, c, 4, 6, device=DEVICE) for c in flow.channels]
    with torch.no_grad():
        for _ in range(2):
            play(lambda *x: (flow.log_likelihood_maps(x)[1],), x)
    (recorded,) = play._recorded.values()
    # A block caches the shares of its first weight, and the condition's map.
    of_blocks, heads, orders = 2 * sum(flow.blocks), 2, len(flow.channels)
    assert len(recorded.cached_values) == of_blocks + heads + orders


def test_images_that_share_memory_and_inference_mode_are_taken(graphs: None) -> None:
    calls: list[str] = []
    double, play = doubler(calls), CudaGraphCache()
    with torch.inference_mode():
        for _ in range(2):
            assert play(double, [torch.ones(1).expand(3)])[0].tolist() == [2.0] * 3
    with torch.no_grad():
        assert play(double, [torch.ones(1).expand(3)])[0].tolist() == [2.0] * 3
    assert calls == ["eager", "eager", "recorded"]
    with torch.inference_mode():
        made = model()
        made.predict(images())
    made.predict(images())


def test_training_and_moves_leave_graphs_behind(graphs: None) -> None:
    calls: list[str] = []
    original, double = model(), doubler(calls)
    with torch.no_grad():
        for move in (original.train, original.eval, original.double):
            for _ in range(2):
                original._graphs(double, [torch.ones(2)])
            move()
            assert not original._graphs._recorded
