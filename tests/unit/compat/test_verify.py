"""The numerical check: what it measures, what it lets pass, what it does not."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastmsflow import InputError, MSFlow, MultiScaleFlow, UnavailableError
from fastmsflow.cli import app
from fastmsflow.compat import numerical_check, save_official
from fastmsflow.compat.numerical_check import check_numerics, noise
from fastmsflow.data.image_io import load_image
from fastmsflow.data.synthetic_textures import training_tiles
from fastmsflow.nn.subnets import ConditionedSubnet
from tests.helpers.ops_parity import DEVICE
from tests.helpers.paths import GOLDEN

pytestmark = pytest.mark.slow


def small_flow() -> MultiScaleFlow:
    torch.manual_seed(0)
    return MultiScaleFlow((8, 12, 16), (8, 4, 8), (1, 1, 2))


def run(*args: object):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


@pytest.fixture
def torch_only(monkeypatch) -> None:
    """The interpreter is slow."""

    def unavailable(*_: object) -> bool:
        raise UnavailableError("no kernels here")

    monkeypatch.setattr(numerical_check, "uses_triton", unavailable)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Tiles of a real photograph."""
    from PIL import Image
    from skimage import data

    folder = tmp_path / "tiles of brick"
    folder.mkdir()
    for i, tile in enumerate(training_tiles(data.brick())[:5]):
        Image.fromarray(tile).save(folder / f"{i}.png")
    return folder


def test_every_backend_and_dtype_is_compared_and_within() -> None:
    flow = small_flow().to(DEVICE)
    result = check_numerics(flow, noise(flow, (16, 16), 2), (16, 16))
    assert [(row.backend, row.dtype) for row in result.rows] == [
        (backend, dtype) for backend in ("torch", "triton") for dtype in ("float32", "bfloat16", "float16")
    ]
    assert result.images == 2
    # The interpreter truncates to bfloat16, so the kernels' bfloat16 is twice as far off as on a GPU.
    assert all(row.within for row in result.rows if (row.backend, row.dtype) != ("triton", "bfloat16"))
    first = result.rows[0]
    assert 0 < first.z < 1e-4 and 0 < first.seconds < 10
    assert first.rank_correlation == pytest.approx(1)


def test_noise_for_a_rectangle_is_higher_or_wider_as_its_images_are() -> None:
    (levels,) = noise(small_flow(), (32, 64), 2)
    assert [tuple(level.shape[2:]) for level in levels] == [(4, 8), (2, 4), (1, 2)]


def test_differences_are_those_to_float64(torch_only: None) -> None:
    flow = small_flow()
    (x,) = noise(flow, (32, 32), 2)
    row = check_numerics(flow, [x], (32, 32)).rows[1]
    with torch.no_grad():
        z, log_det = flow.double()([level.double() for level in x])
        flow.backend = "torch"
        ours, our_log_det = flow.bfloat16()([level.bfloat16() for level in x])
    assert row.dtype == "bfloat16"
    assert row.z == pytest.approx(max((a - b).abs().max().item() for a, b in zip(ours, z, strict=True)), rel=0.05)
    assert row.log_det == pytest.approx((our_log_det - log_det).abs().max().item(), rel=0.05)


def test_a_wrong_result_is_beyond_the_limit(monkeypatch, torch_only: None) -> None:
    hidden = ConditionedSubnet.hidden

    def wrong_in_float32(self, x, *args):
        return hidden(self, x, *args) * (1.01 if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(ConditionedSubnet, "hidden", wrong_in_float32)
    flow = small_flow()
    result = check_numerics(flow, noise(flow, (32, 32), 2), (32, 32))
    assert not result.within
    assert {row.dtype for row in result.rows if not row.within} >= {"float32"}


def test_nan_is_not_within(torch_only: None) -> None:
    flow = small_flow()
    x = [torch.full_like(level, math.nan) for level in next(iter(noise(flow, (32, 32), 1)))]
    result = check_numerics(flow, [x], (32, 32))
    assert not any(row.within for row in result.rows)
    written = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert written["rows"][0]["z"] is written["rows"][0]["rank_correlation"] is None


def test_nothing_to_compare_on_is_refused(torch_only: None) -> None:
    with pytest.raises(InputError, match="no image"):
        check_numerics(small_flow(), [], (32, 32))


def test_the_flow_stays_as_it_was(torch_only: None) -> None:
    flow = small_flow().train()
    check_numerics(flow, noise(flow, (32, 32), 1), (32, 32))
    assert flow.training and flow.dtype == torch.float32 and all(p.requires_grad for p in flow.parameters())


def test_the_command_names_the_variant_and_writes_json(tmp_path: Path, torch_only: None) -> None:
    result = run(GOLDEN / "tiny.pt", "--image-size", 32, "--out", tmp_path / "certificate.json")
    written = json.loads((tmp_path / "certificate.json").read_text())
    within = {f"{row['backend']} {row['dtype']}": row["within"] for row in written["rows"]}
    assert "FrEIA 0.2" in result.output and "8 times noise" in result.output
    assert within == {"torch float32": True, "torch bfloat16": True, "torch float16": True}
    assert "no kernels here" in result.output
    assert result.exit_code == 0


def test_noise_cannot_tell_the_formula_of_an_index_file_and_the_command_says_so(tmp_path, torch_only: None) -> None:
    torch.manual_seed(0)
    path = tmp_path / "master.pt"
    save_official(MultiScaleFlow((16, 24, 40), (8, 16, 8), (1, 1, 1), clamp_form="scaled_tanh"), path)
    result = run(path, "--image-size", 32, "--out", tmp_path / "certificate.json")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{path}: has index permutations") and f"fastmsflow verify {path} TRAINING_IMAGES" in line
    assert "FrEIA 0.2: clamp tanh(r);" in result.stdout
    assert json.loads((tmp_path / "certificate.json").read_text())["formula_fit"] is None
    named = run(path, "--image-size", 32, "--variant", "master")
    assert "git master: clamp tanh(r / clamp);" in named.stdout
    assert named.stderr == ""


@pytest.fixture
def resnet(tmp_path: Path) -> tuple[object, ...]:
    """The options of a small extractor, and its weights' file."""
    import timm

    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    return "--extractor", "resnet18", "--extractor-weights", tmp_path / "weights.pth", "--image-size", 64


@pytest.fixture
def fitted(photographs: Path, resnet: tuple[object, ...], tmp_path: Path) -> dict[str, Path]:
    """Index files whose flows learned the photographs, by the formula that they learned with."""
    torch.manual_seed(2)
    model = MSFlow("resnet18", image_size=(64, 64), extractor_weights=resnet[3])
    images = torch.stack([load_image(file, (64, 64)) for file in sorted(photographs.iterdir())])
    features = model.features(images)
    paths = {}
    for formula, form in (("0.2", "tanh"), ("master", "scaled_tanh")):
        flow = MultiScaleFlow((64, 128, 256), (8, 8, 8), (1, 1, 1), clamp_form=form, backend="torch")
        optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            flow.nll(features).mean().backward()
            optimizer.step()
        masters = MultiScaleFlow((64, 128, 256), (8, 8, 8), (1, 1, 1), clamp_form="scaled_tanh")
        masters.load_state_dict(flow.state_dict())
        paths[formula] = tmp_path / f"{formula}.pt"
        save_official(masters, paths[formula])
    return paths


def test_good_images_tell_the_formula_and_it_is_certified(
    fitted: dict[str, Path], photographs: Path, resnet, tmp_path: Path, torch_only: None, monkeypatch
) -> None:
    through_the_extractor = []
    features = MSFlow.features
    monkeypatch.setattr(
        MSFlow, "features", lambda *given: through_the_extractor.append(len(given[1])) or features(*given)
    )
    written = {"0.2": "clamp tanh(r)", "master": "clamp tanh(r / clamp)"}
    for formula, path in fitted.items():
        through_the_extractor.clear()
        result = run(path, photographs, *resnet, "--out", tmp_path / "certificate.json")
        assert result.exit_code == 0, result.output
        first, second = result.stdout.splitlines()[:2]
        assert first.startswith(f"{path}: trained with {written[formula]}: mean nll")
        assert f": {written[formula]}; 5 images" in second
        assert result.stderr == ""
        assert sum(through_the_extractor) == 5
        fit = json.loads((tmp_path / "certificate.json").read_text())["formula_fit"]
        assert (fit["trained_with"], fit["images"]) == (formula, 5)
        assert (fit["nll"]["0.2"] < fit["nll"]["master"]) == (formula == "0.2")
        assert first.endswith(fit["text"])


def test_a_formula_that_the_images_contradict_is_certified_with_a_warning(
    fitted: dict[str, Path], photographs: Path, resnet, torch_only: None
) -> None:
    result = run(fitted["0.2"], photographs, *resnet, "--variant", "master")
    (line,) = result.stderr.splitlines()
    assert "trained with clamp tanh(r):" in line and line.endswith("variant 'master' was asked for: leave it out")
    assert "git master: clamp tanh(r / clamp); 5 images" in result.stdout
    agreed = run(fitted["0.2"], photographs, *resnet, "--variant", "0.2")
    assert agreed.stderr == "" and "trained with clamp tanh(r):" in agreed.stdout


def test_images_that_tell_nothing_leave_a_warning(
    fitted: dict[str, Path], photographs: Path, resnet, torch_only: None
) -> None:
    result = run(fitted["master"], photographs, *resnet, "--max-images", 1)
    (line,) = result.stderr.splitlines()
    assert "the formulas are not told apart by 1 image:" in line and line.endswith("; clamp tanh(r) is taken")
    assert "FrEIA 0.2: clamp tanh(r); 1 images" in result.stdout


def test_dense_files_have_nothing_to_compare(photographs: Path, resnet, tmp_path: Path, torch_only: None) -> None:
    torch.manual_seed(0)
    save_official(MultiScaleFlow((64, 128, 256), (8, 8, 8), (1, 1, 1)), tmp_path / "dense.pt")
    result = run(tmp_path / "dense.pt", photographs, *resnet, "--json")
    assert json.loads(result.stdout)["formula_fit"] is None
    assert result.stderr == ""


def test_images_go_through_the_models_own_extractor(photographs: Path, tmp_path: Path, torch_only: None) -> None:
    torch.manual_seed(0)
    model = MSFlow("resnet18", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1))
    model.save(tmp_path / "model.safetensors")
    (photographs / "broken.png").write_bytes(b"no image")
    result = run(tmp_path / "model.safetensors", photographs)
    assert "5 images" in result.output
    assert "skipped" in result.output and "broken.png" in result.output
    assert result.exit_code == 1
    (photographs / "broken.png").unlink()
    assert run(tmp_path / "model.safetensors", photographs).exit_code == 0
    limited = run(tmp_path / "model.safetensors", photographs, "--max-images", 2)
    assert "2 images" in limited.output


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_missing_checkpoint_is_one_line(name: str, tmp_path: Path) -> None:
    result = run(tmp_path / name)
    assert isinstance(result.exception, InputError)
    assert name in str(result.exception) and "\n" not in str(result.exception)
