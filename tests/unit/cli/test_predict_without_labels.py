"""The line that predict prints where it has no threshold."""

from fastmsflow.cli.predict import no_labels
from fastmsflow.inference.tiled_models import AS_TRAINED, TileOptions


def test_the_remedy_has_the_options_of_the_tiles_that_have_no_threshold() -> None:
    options = TileOptions(tile=64, top_share=0.001).command
    assert options == " --tile 64 --top-share 0.001"
    assert no_labels("m.safetensors", False, options) == (
        "no labels: m.safetensors has no threshold for these tiles; calibrate it with"
        " `fastmsflow calibrate MODEL GOOD_IMAGES --tile 64 --top-share 0.001`, or give --threshold"
    )


def test_without_options_the_remedy_is_as_the_model_was_trained() -> None:
    assert "MODEL GOOD_IMAGES`, or give" in no_labels("m.safetensors", False, AS_TRAINED.command)
