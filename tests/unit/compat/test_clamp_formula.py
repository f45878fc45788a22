"""Files with index permutations: which formula of the soft clamp is taken, and what is said about it."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastmsflow import InputError, MultiScaleFlow
from fastmsflow.cli import app
from fastmsflow.cli.output import warnings_in_yellow
from fastmsflow.compat import load_official, save_official
from fastmsflow.compat.convert import own_flow
from fastmsflow.compat.detect_clamp_formula import FormulaFit, compare_formulas
from fastmsflow.errors import InputWarning
from fastmsflow.reference.clamp_forms import ClampForm
from fastmsflow.training.start_from import model_from_checkpoint
from tests.helpers.paths import GOLDEN
from tests.helpers.trained_flows import CHANNELS, GRIDS, correlated, trained_flow

FORMS = {"0.2": "tanh", "master": "scaled_tanh"}
TWO = pytest.mark.parametrize("formula", list(FORMS))


def index_file(form: ClampForm, path: Path) -> Path:
    """A trained flow as FrEIA's git masters wrote it: with indices, whichever formula."""
    flow = trained_flow(form)
    masters = MultiScaleFlow(CHANNELS, flow.condition_channels, flow.blocks, clamp_form="scaled_tanh")
    masters.load_state_dict(flow.state_dict())
    save_official(masters, path)
    return path


def mean_nll(form: ClampForm, by: ClampForm, features: list[torch.Tensor]) -> float:
    flow = MultiScaleFlow(CHANNELS, (8, 16, 8), (2, 1, 1), clamp_form=by, backend="torch").eval()
    flow.load_state_dict(trained_flow(form).state_dict())
    with torch.no_grad():
        return flow.nll(features).double().mean().item()


@TWO
def test_the_comparison_finds_the_formula_that_a_flow_was_trained_with(formula: str) -> None:
    flow, features = trained_flow(FORMS[formula]), correlated(8, seed=999)
    fit = compare_formulas(flow, [[level[i : i + 3] for level in features] for i in (0, 3, 6)])
    assert (fit.trained_with, fit.images) == (formula, 8)
    for name, form in FORMS.items():
        assert fit.nll[name] == pytest.approx(mean_nll(FORMS[formula], form, features), rel=1e-5)
    assert abs(fit.nll["0.2"] - fit.nll["master"]) > 5
    written = {"0.2": "clamp tanh(r)", "master": "clamp tanh(r / clamp)"}[formula]
    assert fit.text.startswith(f"trained with {written}: mean nll {fit.nll[formula]:.1f} over 8 images")
    assert flow.clamp_form == FORMS[formula] == flow.parallel_flows[0].blocks[0].clamp_form


def test_formulas_that_agree_are_not_told_apart() -> None:
    flow = MultiScaleFlow(CHANNELS, (8, 16, 8), (1, 1, 1), backend="torch").eval()
    for level in flow.parallel_flows:
        torch.nn.init.zeros_(level.blocks[0].subnet.conv2.weight)
        torch.nn.init.zeros_(level.blocks[0].subnet.conv2.bias)
    fit = compare_formulas(flow, [correlated(4, seed=1)])
    assert fit.nll["0.2"] == fit.nll["master"]
    assert (fit.trained_with, fit.settle("auto")[0]) == (None, "0.2")
    assert "not told apart by 4 images: mean nll" in fit.text


@pytest.mark.parametrize("scale", [3.0, 1e20], ids=["large", "overflowing"])
def test_features_of_another_kind_are_compared_without_a_crash(scale: float) -> None:
    features = [scale * torch.randn(4, c, *grid) for c, grid in zip(CHANNELS, GRIDS, strict=True)]
    fit = compare_formulas(trained_flow("tanh"), [features])
    assert fit.images == 4
    if scale > 1e10:
        assert fit.trained_with is None
        assert fit.as_dict()["nll"] == {"0.2": None, "master": None}


def test_one_image_has_no_standard_error_and_decides_nothing() -> None:
    fit = compare_formulas(trained_flow("scaled_tanh"), [correlated(1, seed=1)])
    assert fit.trained_with is None
    assert fit.settle("auto") == ("0.2", f"{fit.text}; clamp tanh(r) is taken")


def test_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="no image to compare"):
        compare_formulas(trained_flow("tanh"), [])


@pytest.mark.parametrize(
    ("master", "formula"),
    [([1.1, 1.8, 3.3, 3.9], None), ([1.6, 2.3, 3.8, 4.4], "0.2"), ([0.6, 1.3, 2.8, 3.4], "master")],
    ids=["within", "beyond", "beyond the other way"],
)
def test_a_difference_decides_from_twice_its_standard_error_on(master, formula, monkeypatch) -> None:
    nll = {"tanh": [1.0, 2.0, 3.0, 4.0], "scaled_tanh": master}
    levels = [torch.zeros(4, c, 1, 1) for c in CHANNELS]
    monkeypatch.setattr(
        MultiScaleFlow,
        "log_likelihood_maps",
        lambda flow, _: ([level.sum(dim=1) for level in levels], -torch.tensor(nll[flow.clamp_form])),
    )
    assert compare_formulas(trained_flow("tanh"), [levels]).trained_with == formula


@pytest.mark.slow
def test_images_that_neither_formula_fits_decide_nothing() -> None:
    """A flow that knows eight images by heart: to others the formula that is not its own may seem the better one."""
    torch.manual_seed(5)
    flow = MultiScaleFlow(CHANNELS, (8, 16, 8), (2, 3, 3), backend="torch").train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    known, others = correlated(8, seed=1), correlated(8, seed=2)
    for _ in range(150):
        optimizer.zero_grad()
        flow.nll(known).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100.0)
        optimizer.step()
    assert compare_formulas(flow.eval(), [known]).trained_with == "0.2"
    fit = compare_formulas(flow, [others])
    assert fit.nll["master"] < fit.nll["0.2"], "these images do not mislead; the test shows nothing"
    assert (fit.trained_with, fit.settle("auto")[0]) == (None, "0.2")
    assert re.search(r"neither fits them \(mean z\^2 \d+\.\d\), so give images that it was trained on", fit.text)


def test_that_a_flow_has_hardly_been_trained_is_said_where_0_2s_formula_is_found() -> None:
    """Small features far from standard normal: larger log-scales alone make them likelier."""
    torch.manual_seed(5)
    flow = MultiScaleFlow(CHANNELS, (8, 16, 8), (2, 3, 3), clamp_form="scaled_tanh", backend="torch").train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    small = [0.1 * level for level in correlated(8, seed=1)]
    for _ in range(15):
        optimizer.zero_grad()
        flow.nll(small).mean().backward()
        optimizer.step()
    fit = compare_formulas(flow.eval(), [small])
    assert fit.nll["0.2"] < fit.nll["master"], "these images do not mislead; the test shows nothing"
    assert (fit.trained_with, fit.is_doubtful) == ("0.2", True)
    assert re.search(r"; no proof, since mean z\^2 is 0\.\d\d: it has hardly been trained$", fit.text)


def test_files_may_come_from_a_generator_and_not_be_mixed_with_features(weights: Path, tmp_path: Path) -> None:
    path = index_file("tanh", tmp_path / "index.pt")
    with pytest.raises(InputError, match="tensors and files"):
        load_official(path, images=[tmp_path, *correlated(2, seed=1)])
    doubles = (level.double() for level in correlated(8, seed=3))
    with pytest.warns(InputWarning, match="trained with clamp tanh"):
        load_official(path, images=doubles)
    with pytest.raises(InputError, match="no image"):
        load_official(path, images=[level[:0] for level in correlated(1, seed=1)])


def test_auto_takes_tanh_for_indices_and_names_the_alternative_once(tmp_path: Path) -> None:
    path = index_file("scaled_tanh", tmp_path / "official.pt")
    with pytest.warns(InputWarning) as caught:
        flow = load_official(path)
    assert flow.clamp_form == "tanh" == flow.parallel_flows[2].blocks[0].clamp_form
    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith(f"{path}: has index permutations") and "\n" not in line
    assert "clamp tanh(r) is taken" in line and "variant='master'" in line
    assert f"`fastmsflow verify {path} TRAINING_IMAGES` tells which" in line
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@TWO
def test_a_formula_that_is_named_is_taken_without_a_word(formula: str, tmp_path: Path) -> None:
    path = index_file("tanh", tmp_path / "official.pt")
    assert load_official(path, variant=formula).clamp_form == FORMS[formula]


@pytest.mark.filterwarnings("error")
def test_nothing_is_compared_or_said_for_dense_files() -> None:
    flow = load_official(GOLDEN / "tiny.pt", images="no such folder")
    assert flow.clamp_form == "tanh"


@TWO
def test_good_features_choose_the_formula(formula: str, tmp_path: Path) -> None:
    path = index_file(FORMS[formula], tmp_path / "official.pt")
    with pytest.warns(InputWarning, match=re.escape(f"{path}: trained with clamp tanh(r")) as caught:
        flow = load_official(path, images=correlated(40, seed=2))
    assert len(caught) == 1 and "over 32 images" in str(caught[0].message)
    assert flow.clamp_form == FORMS[formula]
    features = correlated(3, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(flow.nll(features), trained_flow(FORMS[formula]).nll(features))


@TWO
def test_a_named_formula_stays_and_is_contradicted_by_images_that_fit_the_other(formula: str, tmp_path: Path) -> None:
    path = index_file(FORMS[formula], tmp_path / "official.pt")
    other = {"0.2": "master", "master": "0.2"}[formula]
    with pytest.warns(InputWarning, match=rf"trained with .*; variant '{other}' was asked for: leave it out") as caught:
        assert load_official(path, variant=other, images=correlated(8, seed=2)).clamp_form == FORMS[other]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_official(path, variant=formula, images=correlated(8, seed=2)).clamp_form == FORMS[formula]


def test_features_of_other_levels_are_refused(tmp_path: Path) -> None:
    path = index_file("tanh", tmp_path / "official.pt")
    with pytest.raises(InputError, match="2 levels given"):
        load_official(path, images=correlated(4, seed=2)[:2])


def resnets_file(folder: Path) -> Path:
    torch.manual_seed(2)
    save_official(MultiScaleFlow((64, 128, 256), (8, 8, 8), (1, 1, 1), clamp_form="scaled_tanh"), folder / "resnet.pt")
    return folder / "resnet.pt"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    import timm

    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.slow
def test_images_are_files_folders_or_tensors(weights: Path, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    (tmp_path / "good").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"good/{i}.png")
    lines = []
    files = sorted((tmp_path / "good").iterdir())
    tensor = pixels.permute(0, 3, 1, 2) / 255
    for images in (tmp_path / "good", [str(files[0]), *files[1:]], [tmp_path / "good"], tensor, files[0]):
        with pytest.warns(InputWarning) as caught:
            load_official(
                resnets_file(tmp_path),
                images=images,
                extractor="resnet18",
                extractor_weights=weights,
                image_size=(64, 64),
                pool="max",
            )
        lines.append(str(caught[0].message))
    assert len(set(lines[:4])) == 1 and "3 images" in lines[0]
    assert "not told apart by 1 image:" in lines[4]


def test_an_extractor_of_other_channels_is_refused(weights: Path, tmp_path: Path) -> None:
    index_file("tanh", tmp_path / "official.pt")
    with pytest.raises(InputError, match=r"its flow takes channels \(16, 24, 40\), resnet18.tv_in1k yields"):
        load_official(
            tmp_path / "official.pt",
            images=torch.rand(2, 3, 64, 64),
            extractor="resnet18",
            extractor_weights=weights,
        )


def test_the_text_names_both_means() -> None:
    fit = FormulaFit({"0.2": 12.34, "master": 5.06}, 7, "master", 1.0)
    assert fit.text == "trained with clamp tanh(r / clamp): mean nll 5.1 over 7 images, 12.3 by clamp tanh(r)"
    assert fit.settle("auto") == ("master", fit.text)
    assert fit.settle("master") == ("master", fit.text)
    assert (fit.contradicts("0.2"), fit.contradicts("master"), fit.contradicts("auto")) == (True, False, False)


def test_convert_names_the_alternative_in_one_yellow_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_official(MultiScaleFlow((24, 40, 112), blocks=(1, 1, 1), clamp_form="scaled_tanh"), tmp_path / "official.pt")
    words = ["convert", str(tmp_path / "official.pt"), str(tmp_path / "own.safetensors"), "--image-size", "64"]
    words += ["--extractor", "tf_efficientnet_lite0"]
    result = CliRunner().invoke(app, words)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 0
    assert line.startswith(f"{tmp_path}/official.pt: has index permutations")
    assert own_flow(tmp_path / "own.safetensors").clamp_form == "tanh"
    assert CliRunner().invoke(app, [*words, "--variant", "master"]).stderr == ""
    assert own_flow(tmp_path / "own.safetensors").clamp_form == "scaled_tanh"


def test_train_names_the_alternative_in_one_yellow_line(weights: Path, tmp_path: Path, capsys) -> None:
    options = {"extractor": "resnet18", "pool": "avg", "extractor_weights": weights, "standardise": False}
    with warnings_in_yellow():
        model = model_from_checkpoint(resnets_file(tmp_path), options, set(), (64, 64))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/resnet.pt: has index permutations")
    assert model.flow.clamp_form == "tanh"


def test_other_warnings_stay_pythons_in_the_command_line(capsys) -> None:
    with pytest.warns(DeprecationWarning, match="old"), warnings_in_yellow():
        warnings.warn("new [red]", InputWarning, stacklevel=1)
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "new [red]\n"
