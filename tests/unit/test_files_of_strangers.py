"""Files of strangers, each key changed to every other type: one line that names the file, and never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmsflow import InputError, MSFlow
from fastmsflow.benchmarking.compare import compare
from fastmsflow.compat import load_official, save_official
from fastmsflow.compat.convert import own_flow, own_to_official
from fastmsflow.models.checkpoint import read_config
from fastmsflow.state_dicts import load_pickled
from tests.helpers.memory_limit import memory_limit
from tests.helpers.mutations import WRONG, line_of, mutations, refused
from tests.helpers.tiny_model import tiny_model

CALIBRATION = {"scores": [1.0, 2.0], "peaks": [1.0, 2.0], "typical": 0.5, "false_alarms": 0.4}
# These may be missing, or hold anything.
FREE = ("notes.", "official_layout = None", "calibration = None")
RAW = ("", "{", "[]", "5", "null", '"x"', "[" * 10**5, '{"a":' * 10**5, "9" * 5000)


@pytest.fixture(scope="module")
def model() -> MSFlow:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def saved(model: MSFlow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path, epoch=3)
    return path


@pytest.fixture(scope="module")
def config(saved: Path) -> dict[str, Any]:
    layout = {"order": [0, 1, 2], "dense": True}
    return {**read_config(saved), "calibration": CALIBRATION, "official_layout": layout}


def write(path: Path, config: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors or {"x": torch.zeros(1)}, path, {"format": "fastmsflow-1", "config": text})
    return path


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def outline(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As many blocks as the configuration says, so that nothing else is wrong."""
    return {
        f"flow.parallel_flows.{level}.blocks.{i}.x": torch.zeros(1)
        for level, blocks in enumerate(config["flow"]["blocks"])
        for i in range(blocks)
    }


def test_every_key_of_a_checkpoints_configuration(config: dict[str, Any], tmp_path: Path) -> None:
    path, held = tmp_path / "model.safetensors", outline(config)
    assert line_of(lambda: read_config(write(path, config, held))) is None
    for what, is_other, changed in mutations(config):
        line = line_of(lambda changed=changed: read_config(write(path, changed, held)))
        assert line is None or line.startswith(f"{path}: its configuration is damaged ("), what
        assert line is not None or not is_other or what.startswith(FREE), what


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: raw[:9])
def test_a_configuration_that_is_no_json_object(raw: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", raw)
    for use in (MSFlow.load, own_flow, lambda path: own_to_official(path, tmp_path / "o.pt")):
        assert "its configuration is damaged" in refused(lambda use=use: use(path))


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a billion blocks": (lambda c: c["flow"].update(blocks=[2, 5, 10**9]), "blocks.0. is 2, the file holds 1"),
    "a channel more": (lambda c: c["flow"].update(channels=[34, 48, 192]), r"flow.channels is \[34"),
    "conditions": (lambda c: c["flow"].update(condition_channels=[64, 64, 2**19]), "does not fit the model"),
    "a huge size": (lambda c: c.update(image_size=[32, 10**6]), r"image_size\[1\] is 1000000"),
    "a giant": (lambda c: c.update(extractor="vit_giant_patch14_reg4_dinov2.lvd142m"), "does not fit the model"),
    "no model of timm": (lambda c: c.update(extractor="x" * 200), "extractor 'xxx.* is not a timm model"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_configuration_that_its_tensors_do_not_bear_out(
    kind: str, config: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    change, message = CHECKPOINTS[kind]
    changed = json.loads(json.dumps(config))
    change(changed)
    path = write(tmp_path / "model.safetensors", changed, all_tensors(saved))
    with memory_limit(), pytest.raises(InputError, match=rf"^{path}: .*{message}"):
        MSFlow.load(path)


def test_a_checkpoint_that_is_larger_than_the_memory_and_empty(config: dict[str, Any], tmp_path: Path) -> None:
    """The file has holes: it takes a few blocks of the disk."""
    size = 5 * 10**9
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    metadata = {"format": "fastmsflow-1", "config": json.dumps(config)}
    header = json.dumps({"__metadata__": metadata, "flow.parallel_flows.0.blocks.0.x": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with memory_limit(11_000):
        assert "flow.blocks[1] is 1, the file holds 0" in refused(lambda: MSFlow.load(tmp_path / "model.safetensors"))


def test_a_checkpoint_that_changes_while_it_is_read(saved: Path, tmp_path: Path, monkeypatch) -> None:
    """A copy in place of the file, as `cp` makes it, is half of both for a while."""
    from fastmsflow.models import checkpoint

    path = Path(shutil.copy(saved, tmp_path / "model.safetensors"))
    load = checkpoint.load

    def meanwhile(content: bytes) -> dict[str, torch.Tensor]:
        path.write_bytes(content[:1000])
        tensors = load(content)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(checkpoint, "load", meanwhile)
    # The file has been read whole by then, and nothing is mapped that is cut short.
    MSFlow.load(path)
    assert path.stat().st_size == 1000
    stat = checkpoint.os.fstat
    calls: list[int] = []

    def changed(number: int) -> Any:
        calls.append(number)
        if len(calls) == 2:
            path.write_bytes(b"another")
        return stat(number)

    shutil.copy(saved, path)
    monkeypatch.setattr(checkpoint.os, "fstat", changed)
    with pytest.raises(InputError, match="changed while it was read; write a new checkpoint under another name, then"):
        MSFlow.load(path)


PERM = "flow.fusion_flow.perm0"
SCALE = "flow.parallel_flows.0.blocks.0.global_scale"
TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "no permutation": (PERM, torch.zeros_like, "is no permutation"),
    "beyond the channels": (PERM, lambda perm: perm + 1, "is no permutation"),
    "a block's": ("flow.parallel_flows.1.blocks.0.perm", lambda perm: -perm, "is no permutation"),
    "floating": (PERM, lambda perm: perm.float(), "is torch.float32, not torch.int64"),
    "whole": (SCALE, lambda scale: scale.int(), "is torch.int64, not torch.float32"),
    "complex": (SCALE, lambda scale: scale.to(torch.complex64), "is torch.complex64, not|is torch.int64, not"),
    "truth": (SCALE, lambda scale: scale.bool(), "is torch.bool, not torch.float32"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_another_kind(kind: str, config: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    key, change, message = TENSORS[kind]
    tensors = all_tensors(saved)
    path = write(tmp_path / "model.safetensors", config, {**tensors, key: change(tensors[key])})
    for use in (MSFlow.load, own_flow):
        with pytest.raises(InputError, match=rf"{key.removeprefix('flow.')} ({message})"):
            use(path)


def test_every_key_of_a_models_folder(model: MSFlow, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    for what, is_other, changed in mutations(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        if is_other and not what.startswith(FREE) and "= None" not in what:
            assert refused(lambda: MSFlow.from_pretrained(tmp_path / "model")).startswith(f"{path}: damaged ("), what
    for raw in RAW:
        path.write_text(raw)
        assert refused(lambda: MSFlow.from_pretrained(tmp_path / "model")).startswith(f"{path}: damaged (")
    path.unlink()
    MSFlow.from_pretrained(tmp_path / "model")


@pytest.fixture(scope="module")
def official(model: MSFlow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("official") / "model.pt"
    save_official(model.flow, path)
    return torch.load(path, weights_only=True)


def as_indices(content: dict[str, Any]) -> None:
    """Writes permutations as FrEIA's git master does."""
    for state in content["parallel_flows"]:
        for key in [key for key in state if key.endswith(".w_perm")]:
            state[key] = state[key][:, :, 0, 0].argmax(1)
            state[f"{key}_inv"] = state[key].argsort()


def changed_index(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    def run(content: dict[str, Any]) -> None:
        as_indices(content)
        state = content["parallel_flows"][0]
        state["module_list.0.w_perm"] = change(state["module_list.0.w_perm"])

    return run


def first(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda content: change(content["parallel_flows"][0])


GLOBAL = "module_list.0.global_scale"
OFFICIAL: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a billionth block": (first(lambda s: s.update({"module_list.1000000000.x": torch.zeros(1)})), "does not fit"),
    "digits": (first(lambda s: s.update({f"module_list.{'9' * 5000}.x": torch.zeros(1)})), "does not fit"),
    "a long key": (first(lambda s: s.update({"k" * 10**7: torch.zeros(1)})), "unexpected kkk"),
    "a view": (first(lambda s: s.update({GLOBAL: torch.zeros(1).expand(1, 10**9, 1, 1)})), "the file holds"),
    "no values": (first(lambda s: s.update({GLOBAL: torch.zeros(1, 0, 10**9, 1)})), "missing fusion_flow"),
    "one level often": (lambda c: c.update(parallel_flows=c["parallel_flows"][:1] * 1000), "the file holds"),
    "sparse": (first(lambda s: s.update({GLOBAL: s[GLOBAL].to_sparse()})), "not dense"),
    "on no device": (first(lambda s: s.update({GLOBAL: s[GLOBAL].to("meta")})), "not dense"),
    "truth": (first(lambda s: s.update({GLOBAL: s[GLOBAL].bool()})), "is torch.bool, not torch.float32"),
    "zeros for indices": (changed_index(torch.zeros_like), "are not a hard permutation"),
    "indices beyond": (changed_index(lambda perm: perm + 1), "are not a hard permutation"),
    "indices from behind": (changed_index(lambda perm: perm - len(perm)), "are not a hard permutation"),
    "floating indices": (changed_index(lambda perm: perm + 0.5), "is torch.float32, not torch.int64"),
    "a fused one": (lambda c: c["fusion_flow"]["module_list.1.perm"].zero_(), "are not a hard permutation"),
    "numbers for keys": (lambda c: c.update(parallel_flows=[{1: torch.zeros(1)}]), "not a list of state dicts"),
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_an_official_file_that_is_believed_in_nothing(kind: str, official: dict[str, Any], tmp_path: Path) -> None:
    change, message = OFFICIAL[kind]
    content = {
        **official,
        "fusion_flow": {key: value.clone() for key, value in official["fusion_flow"].items()},
        "parallel_flows": [dict(state) for state in official["parallel_flows"]],
    }
    change(content)
    torch.save(content, tmp_path / "model.pt")
    with memory_limit(), pytest.raises(InputError, match=rf"^{tmp_path}/model\.pt: .*({message})") as caught:
        load_official(tmp_path / "model.pt", variant="0.2")
    assert len(str(caught.value)) < 5000


def test_every_key_of_an_official_file(official: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for key in ("parallel_flows", "fusion_flow"):
        for value in (*WRONG, [{}], [{"a": 1}], [[torch.zeros(1)]], {"a": torch.zeros(1)}, torch.zeros(2)):
            torch.save({**official, key: value}, path)
            assert refused(lambda: load_official(path)).startswith(f"{path}: "), (key, value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_compressed_official_file(official: dict[str, Any], tmp_path: Path) -> None:
    import zipfile

    torch.save(official, tmp_path / "model.pt")
    packed = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive, packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert "compressed, which torch.save's files are not" in refused(lambda: load_official(tmp_path / "packed.pt"))


def test_every_key_of_a_suites_results(tmp_path: Path) -> None:
    content = {
        "machine_info": {"device": "CPU"},
        "benchmarks": [{"fullname": "a", "stats": {"median": 1.0}}],
    }
    good, path = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(content))
    for what, is_other, changed in mutations(content):
        path.write_text(json.dumps(changed))
        assert line_of(lambda: compare(good, path)) is not None or not is_other, what
    for raw in RAW:
        path.write_text(raw)
        assert refused(lambda: compare(good, path)).startswith(f"{path}: not a result of the suite (")


def test_every_key_of_a_class_runs_results(saved: Path, tmp_path: Path) -> None:
    from fastmsflow.training.every_class import _results_of

    content = {
        "images": {"name": "a"},
        "rounds": [{"epoch": 3, "image_auroc": 0.5, "image_auroc_log": 0.5, "image_auroc_absolute": 0.5}],
        "seconds": {"training": 1.0},
    }
    shutil.copy(saved, tmp_path / "last.safetensors")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert _results_of(tmp_path)[1] == 1
    for what, is_other, changed in mutations(content):
        path.write_text(json.dumps(changed))
        # A metric may be missing.
        taken = not is_other or ("image_auroc" in what and what.endswith("None"))
        assert line_of(lambda: _results_of(tmp_path)) is not None or taken, what
    for raw in RAW:
        path.write_text(raw)
        assert refused(lambda: _results_of(tmp_path)).startswith(f"{path}: damaged")


def test_a_failure_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    from fastmsflow.training.class_queue import FAILED_FILE, train_each

    (tmp_path / "a").mkdir()
    for raw in (*RAW, '{"reason": 5}', "{}"):
        (tmp_path / "a" / FAILED_FILE).write_text(raw)
        done: list[str] = []
        assert train_each(tmp_path, ["a"], done.append, lambda name, reason: None) == {}
        assert done == ["a"]


def test_torch_says_nothing_of_a_file_beside_the_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kinds = {"sparse": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}
    recwarn.clear()
    for name, tensor in kinds.items():
        torch.save({"x": tensor}, tmp_path / name)
        assert load_pickled(tmp_path / name)["x"].shape == (3, 3)
    assert [str(warning.message) for warning in recwarn] == []
