"""The command line: one file a verb, which parses, calls the library and prints."""

from typing import Annotated

import typer

from .._version import __version__
from . import benchmark, calibrate, convert, demo, evaluate, export, predict, shard, submit, train, verify
from .common_options import with_common_options
from .config_file import ConfigurableCommand
from .options import VerbGroup, new_spelling
from .output import console

__all__ = ["app"]

app: typer.Typer = typer.Typer(
    cls=VerbGroup,
    help="MSFlow anomaly detection: learns from good images, then finds and locates defects.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # The help does not show old spellings.
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": new_spelling},
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"fastmsflow {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Takes the options before a verb."""


for verb in (
    demo.demo,
    train.train,
    evaluate.evaluate,
    calibrate.calibrate,
    predict.predict,
    submit.submit,
    export.export,
    shard.shard,
    convert.convert,
    verify.verify,
    benchmark.benchmark,
):
    app.command(cls=ConfigurableCommand)(with_common_options(verb))
