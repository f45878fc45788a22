"""``predict``, ``evaluate`` and ``calibrate`` score with the copy of ``for_inference``, in the dtype asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.data import load_image, open_image_set
from fastmsflow.inference import BatchScorer, prepare, resolve_dtype
from fastmsflow.inference.scorer import Scorer
from fastmsflow.training import evaluate
from tests.helpers.predictions import SCORES, Command, rows, setting, times
from tests.helpers.tolerances import BFLOAT16_MAPS, BFLOAT16_SCORES, FOLDED

CLOSE = {"float32": FOLDED, "bfloat16": BFLOAT16_SCORES}
MAPS_CLOSE = {"float32": FOLDED, "bfloat16": BFLOAT16_MAPS}
ASKED = [((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)]
IDS = ["auto", "bfloat16"]
SIDE = 64
UNITS = {
    "bfloat16": "fastmsflow.cpu.features.has_bfloat16_units",
    "float16": "fastmsflow.cpu.features.has_float16_units",
}
LACKS = {
    "bfloat16": "this CPU has neither AMX-BF16 nor AVX512-BF16, and computes bfloat16 more slowly than float32",
    "float16": "this CPU has no AMX-FP16, and computes float16 more slowly than float32",
}


@pytest.fixture(autouse=True)
def has_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as one that has units for both half precisions, whichever it is: results are the same."""
    for question in UNITS.values():
        monkeypatch.setattr(question, lambda: True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that ``for_inference`` was called with."""
    dtypes, for_inference = list[torch.dtype](), MSFlow.for_inference

    def watched(network: MSFlow, dtype: torch.dtype = torch.float32) -> MSFlow:
        dtypes.append(dtype)
        return for_inference(network, dtype)

    monkeypatch.setattr(MSFlow, "for_inference", watched)
    return dtypes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with two checkpoints of one extractor, which have learnt nothing."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("best", "last")):
        torch.manual_seed(0)
        network = MSFlow("test_efficientnet", pretrained=False, image_size=(SIDE, SIDE), blocks=(1, 1, 1)).eval()
        with torch.no_grad():
            next(network.flow.parallel_flows[0].parameters()).add_(0.1 * seed)
        network.save(folder / f"{name}.safetensors")
    return folder


def test_auto_is_float16_on_a_gpu_and_float32_on_a_cpu() -> None:
    assert resolve_dtype("auto", torch.device("cuda", 1)) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("float32", torch.device("cuda")) == torch.float32
    with pytest.raises(InputError, match=r"^dtype half: give float32, bfloat16, float16 or auto$"):
        resolve_dtype("half", torch.device("cpu"))


@pytest.mark.parametrize("name", UNITS)
def test_a_half_precision_is_refused_on_a_cpu_without_its_units_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_dtype(name, torch.device("cpu")) == getattr(torch, name)
    monkeypatch.setattr(UNITS[name], lambda: False)
    with pytest.raises(InputError) as error:
        resolve_dtype(name, torch.device("cpu"))
    assert str(error.value) == f"dtype {name}: {LACKS[name]}; give float32 or auto"
    assert resolve_dtype(name, torch.device("cuda")) == getattr(torch, name)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", UNITS)
def test_a_verb_on_a_cpu_without_units_ends_in_one_line_and_writes_nothing(
    name: str, run: Path, checkpoint: Path, noise_images: Path, mvtec: Path, command, predict_parquet: Command,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(UNITS[name], lambda: False)
    line, out = f"fastmsflow: dtype {name}: {LACKS[name]}; give float32 or auto", tmp_path / "out"
    for form in ("csv", "parquet"):
        given = (checkpoint, noise_images, "--out", out, "--dtype", name)
        code, _, err = predict_parquet(*given, form=form)
        assert (code, err.strip().splitlines()[-1]) == (1, line)
    model = run / "best.safetensors"
    for verb in (
        ("evaluate", run, mvtec, "--class", "tile", "--out", out),
        ("calibrate", model, noise_images, "--out", out),
        ("export", model, tmp_path / "model.pt2", "--compiled"),
    ):
        code, printed = command(*verb, "--dtype", name)
        assert (code, printed.strip().splitlines()[-1]) == (1, line)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_a_batch_scorer_on_a_cpu_without_units_is_refused_as_it_loads(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNITS["bfloat16"], lambda: False)
    with pytest.raises(InputError, match=r"^dtype bfloat16: this CPU has neither"):
        BatchScorer(checkpoint, dtype="bfloat16", device="cpu").load()


def test_a_model_is_made_ready_once(calibrated_model: MSFlow) -> None:
    ready = prepare(calibrated_model, "bfloat16")
    assert (ready.flow.dtype, calibrated_model.flow.dtype) == (torch.bfloat16, torch.float32)
    assert ready.extractor.dtype == torch.float32
    assert prepare(ready, "float32") is ready
    assert prepare(calibrated_model, None) is calibrated_model


@pytest.mark.parametrize(("options", "dtype"), ASKED, ids=IDS)
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_predict_scores_with_a_model_made_for_inference(
    form: str, options: tuple[str, ...], dtype: torch.dtype, checkpoint: Path, calibrated_model: MSFlow,
    noise_images: Path, predict_parquet: Command, asked: list[torch.dtype], tmp_path: Path,
) -> None:  # fmt: skip
    maps = () if form == "parquet" else ("--no-heat-maps",)
    given = (checkpoint, noise_images, "--out", tmp_path, "--workers", 0, *maps, *options)
    assert predict_parquet(*given, form=form)[0] == 0
    assert asked == [dtype]
    if form == "parquet":
        assert setting(tmp_path)["dtype"] == str(dtype).removeprefix("torch.")
        with torch.no_grad():
            slow = calibrated_model.scores(
                torch.stack([load_image(file, (32, 32)) for file in sorted(noise_images.iterdir())])
            )
        found = [[row[name] for row in rows(tmp_path)] for name in SCORES]
        expected = [getattr(slow, name).tolist() for name in SCORES]
        np.testing.assert_allclose(found, expected, **CLOSE[str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_values_of_heat_maps_are_those_of_the_slow_path(
    dtype: str, calibrated_model: MSFlow, noise_images: Path
) -> None:
    pixels = torch.stack([load_image(file, (32, 32)) for file in sorted(noise_images.iterdir())])
    scorer = Scorer(calibrated_model, dtype=dtype)
    with torch.no_grad():
        expected = calibrated_model.scores(pixels).absolute_map.numpy()
    found = [one.score_map for one in scorer(pixels, [(36, 40)] * len(pixels))]
    np.testing.assert_allclose(found, expected, **MAPS_CLOSE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dtype"), ASKED, ids=IDS)
def test_evaluate_scores_with_models_made_for_inference_and_runs_their_extractor_once(
    options: tuple[str, ...], dtype: torch.dtype, run: Path, mvtec: Path, command, asked: list[torch.dtype],
    monkeypatch, tmp_path: Path,
) -> None:  # fmt: skip
    batches, features = list[int](), MSFlow.features
    monkeypatch.setattr(MSFlow, "features", lambda model, x: batches.append(len(x)) or features(model, x))
    assert command("evaluate", run, mvtec, "--class", "tile", "--out", tmp_path, *options)[0] == 0
    assert asked == [dtype, dtype]
    assert batches == [8]


@pytest.mark.parametrize("dtype", CLOSE)
def test_what_evaluate_finds_is_that_of_the_slow_path(dtype: str, run: Path, mvtec: Path) -> None:
    tiles, original = open_image_set(str(mvtec), "tile"), MSFlow.load(run / "best.safetensors")
    exact, expected = evaluate(original, tiles, dtype=None)
    evaluation, found = evaluate(original, tiles, dtype=dtype)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE[dtype])
    assert evaluation.pixel_auroc == pytest.approx(exact.pixel_auroc, abs=2e-2)
    assert original.flow.dtype == torch.float32


@pytest.mark.parametrize(("options", "dtype"), ASKED, ids=IDS)
def test_calibrate_scores_likewise_and_saves_the_model_that_was_trained(
    options: tuple[str, ...], dtype: torch.dtype, run: Path, mvtec: Path, command, asked: list[torch.dtype],
    tmp_path: Path,
) -> None:  # fmt: skip
    before, after = run / "best.safetensors", tmp_path / "calibrated.safetensors"
    good = mvtec / "tile/train/good"
    assert command("calibrate", before, good, "--out", after, "--false-alarms", 0.2, *options)[0] == 0
    assert asked == [dtype]
    saved, trained = MSFlow.load(after), MSFlow.load(before)
    assert saved.calibration is not None and len(saved.calibration.scores) == 8
    for one, other in zip(saved.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_dtype_that_is_not_known_is_refused_in_one_line(
    run: Path,
    checkpoint: Path,
    noise_images: Path,
    mvtec: Path,
    command,
    predict_parquet: Command,
    tmp_path: Path,
) -> None:
    line = "fastmsflow: dtype float64: give float32, bfloat16, float16 or auto"
    for form in ("csv", "parquet"):
        code, _, err = predict_parquet(
            checkpoint, noise_images, "--out", tmp_path / "out", "--dtype", "float64", form=form
        )
        assert (code, err) == (1, line)
    for verb in (("evaluate", run, mvtec, "--class", "tile"), ("calibrate", run / "best.safetensors", noise_images)):
        code, printed = command(*verb, "--dtype", "float64")
        assert (code, printed.strip().splitlines()[-1]) == (1, line)
    assert not (tmp_path / "out").exists()


# Parquet


def test_a_folder_of_results_is_gone_on_with_in_its_dtype_alone(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    given = (checkpoint, noise_shards, "--out", tmp_path, "--workers", 0)
    predict_parquet(*given)
    before = times(tmp_path)
    code, _, err = predict_parquet(*given, "--dtype", "bfloat16")
    assert (code, "holds results of another run (dtype was float32, is bfloat16); set that back" in err) == (1, True)
    assert times(tmp_path) == before
