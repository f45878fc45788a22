"""BatchScorer takes its model from wherever it is, and one line says what it refuses."""

import copy
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.errors import UnavailableError
from fastmsflow.inference import BatchScorer
from tests.helpers.batches import RESULTS, assert_same, on_cpu
from tests.helpers.web_servers import send, web_server


def test_a_model_that_is_given_stays_as_it_is(
    batch_model: MSFlow, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    given = copy.deepcopy(batch_model).train()
    state = copy.deepcopy(given.state_dict())
    trained = [parameter.requires_grad for parameter in given.parameters()]
    results = on_cpu(given)({"bytes": batch_contents})
    assert_same(results, expected)
    assert given.training
    assert [parameter.requires_grad for parameter in given.parameters()] == trained
    for name, tensor in given.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert (tensor.device, tensor.dtype, tensor.stride()) == (
            state[name].device, state[name].dtype, state[name].stride())  # fmt: skip


@pytest.mark.parametrize("where", ["folder", "memory", "file", "http", "later"])
def test_a_model_comes_from_wherever_it_is(
    where: str,
    batch_checkpoint: Path,
    batch_model: MSFlow,
    batch_contents: list[bytes],
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    if where == "http":
        pytest.importorskip("aiohttp", reason="needs aiohttp")
        with web_server(lambda request: send(request, batch_checkpoint.read_bytes())) as server:
            assert_same(on_cpu(f"{server}/model.safetensors")({"bytes": batch_contents}), expected)
        return
    place: str | Path = tmp_path / "model"
    if where == "folder":
        batch_model.save_pretrained(place)
    elif where == "memory":
        place = "memory://models/a.safetensors"
        pytest.importorskip("fsspec").filesystem("memory").pipe(place, batch_checkpoint.read_bytes())
    elif where == "file":
        pytest.importorskip("fsspec")
        place = f"file://{batch_checkpoint}"
    scorer = on_cpu(place)
    if where == "later":
        for _ in range(2):
            with pytest.raises(InputError, match=r"/model: no such file; give the path of a fastmsflow checkpoint"):
                scorer({"bytes": batch_contents})
        shutil.copy(batch_checkpoint, place)
    assert_same(scorer({"bytes": batch_contents}), expected)


REFUSED_AT_ONCE = [
    ({"threshold": float("inf")}, "threshold is inf; it must be finite"),
    ({"threshold": float("nan")}, "threshold is nan; it must be finite"),
    ({"false_alarms": 0.0}, "false_alarms is 0.0; it must be above 0, below 1"),
    ({"false_alarms": 1.5}, "false_alarms is 1.5; it must be above 0, below 1"),
    ({"dtype": "int8"}, "dtype int8: give float32, bfloat16, float16 or auto"),
    ({"dtype": torch.float32}, "dtype torch.float32: give float32, bfloat16, float16 or auto"),
    ({"engine": "onnx"}, "engine 'onnx' is not known; give torch or openvino"),
    ({"tile": 31}, "tile is 31; it must be a whole number, 32 to 65536"),
    ({"tile": 64, "overlap": 1}, "overlap is 1; it must be 0 or more, below 1"),
    *(
        ({"device": device}, f"device {device!r} is not known; give auto, cpu, cuda or cuda:N")
        for device in ("gpu", "", "mps", "meta", "cuda:x", "cuda:-1", None)
    ),
]


@pytest.mark.parametrize(("options", "line"), REFUSED_AT_ONCE, ids=str)
def test_an_argument_that_cannot_be_had_is_refused_before_anything_is_loaded(
    options: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError) as refused:
        BatchScorer("nowhere.safetensors", **options)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"", "not a whole safetensors file"), (b"no model" * 99, "not a whole safetensors file"), (None, "no such file")],
)
@pytest.mark.parametrize("scheme", ["", "memory://", "http://"])
def test_what_is_no_model_is_told_in_one_line_that_names_it(
    content: bytes | None, line: str, scheme: str, tmp_path: Path
) -> None:
    def answer(request: Any) -> None:
        send(request, content or b"", 404 if content is None else 200)

    if scheme:
        pytest.importorskip("aiohttp" if scheme == "http://" else "fsspec")
    with web_server(answer) as server:
        place = f"{server}/model" if scheme == "http://" else f"{scheme}{tmp_path}/model"
        if content is not None and scheme == "memory://":
            pytest.importorskip("fsspec").filesystem("memory").pipe(place, content)
        elif content is not None and not scheme:
            Path(place).write_bytes(content)
        with pytest.raises(InputError) as refused:
            on_cpu(place).load()
    assert str(refused.value).startswith(f"{place}: {line}")
    assert "\n" not in str(refused.value)


def test_a_server_without_its_model_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    monkeypatch.setattr("fastmsflow.data.url_images.TIMEOUT", 0.3)
    ended = threading.Event()
    with web_server(lambda request: ended.wait(60)) as server:
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"^http://.*/m: no answer within 0.3 s"):
            on_cpu(f"{server}/m").load()
        assert time.monotonic() - begin < 30
        ended.set()


def test_a_model_that_lacks_something_is_named_by_its_url(
    batch_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("memory://models/b", batch_checkpoint.read_bytes())

    def lacking(path: Path) -> MSFlow:
        raise UnavailableError(f"{path}: does not hold its extractor's weights")

    monkeypatch.setattr(MSFlow, "load", lacking)
    with pytest.raises(UnavailableError, match=r"^memory://models/b: does not hold its extractor's weights$"):
        on_cpu("memory://models/b").load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_named(device: str, batch_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=rf"^device {device}: this process sees 0 GPUs; give auto or cpu$"):
        BatchScorer(batch_checkpoint, device=device).load()


def test_auto_is_float32_without_a_gpu(
    batch_checkpoint: Path, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    assert set(expected) == RESULTS
    if not torch.cuda.is_available():
        assert_same(BatchScorer(batch_checkpoint)({"bytes": batch_contents}), expected)
