"""Models as folders in the Hugging Face hub's form."""

import json
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError, MSFlow, UnavailableError, backend
from fastmsflow.models import hub


@pytest.fixture(scope="module")
def model() -> MSFlow:
    torch.manual_seed(0)
    return MSFlow("resnet18", pretrained=False, image_size=(64, 96), blocks=(1, 1, 1), pool="max", standardise=True)


@pytest.fixture
def folder(model: MSFlow, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_holds_weights_configuration_and_card(model: MSFlow, folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((folder / "config.json").read_text()) == model.config
    card = (folder / "README.md").read_text()
    assert "library_name: fastmsflow" in card
    assert "anomaly-detection" in card
    assert "2308.15300" in card


def test_what_is_read_back_predicts_the_same(model: MSFlow, folder: Path) -> None:
    images = torch.rand(2, 3, 64, 96)
    back = MSFlow.from_pretrained(folder, backend="torch")
    assert not back.training
    assert back.flow.backend == "torch"
    assert back.config == model.config
    with backend.use("torch"):
        for ours, theirs in zip(model.eval().predict(images), back.predict(images), strict=True):
            assert torch.equal(ours, theirs)


def test_a_repository_of_the_hub_is_downloaded(model: MSFlow, folder: Path, monkeypatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, **options) -> str:
        asked.append((repo_id, filename, options.get("revision")))
        return str(folder / filename)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    back = MSFlow.from_pretrained("someone/bottle", revision="v1")
    assert ("someone/bottle", "model.safetensors", "v1") in asked
    assert torch.equal(back.flow.fusion_flow.perm0, model.flow.fusion_flow.perm0)


def test_without_network_a_missing_folder_is_named_at_once(monkeypatch) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    for name in ("runs/bottle", "/no/such/folder"):
        with pytest.raises(UnavailableError, match=f"{name}: no such folder, and the hub is not reachable; give one"):
            MSFlow.from_pretrained(name)


def test_a_folder_without_weights_and_one_of_another_model_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        MSFlow.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        MSFlow.from_pretrained(folder)


def test_a_file_is_not_called_a_missing_folder(folder: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: a file, not a folder; MSFlow\.load reads"):
        MSFlow.from_pretrained(folder / "config.json")


@pytest.mark.parametrize("option", ["map_location", "image_size", "backnd"])
def test_options_that_would_change_nothing_are_refused(option: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"does not take {option}: a model is read as it was saved"):
        MSFlow.from_pretrained(folder, **{option: "cuda"})


def test_a_model_for_inference_is_not_saved(model: MSFlow, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save the model that it was made from"):
        model.for_inference().save_pretrained(tmp_path / "model")
