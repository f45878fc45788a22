"""Gives every verb --config, --quiet and --json."""

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Annotated, Any

from .config_file import Config
from .options import OUTPUT, option
from .output import silence, warnings_in_yellow
from .recipe_options import set_parameters


def with_common_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Returns ``verb`` as a command that takes these options too; ``output`` and the defaults heed them."""

    def command(
        *,
        config: Config = None,
        quiet: Annotated[bool, option(OUTPUT, "Print nothing but errors.", "--quiet", "-q")] = False,
        as_json: Annotated[bool, option(OUTPUT, "Print the result as JSON, and nothing else.", "--json")] = False,
        **options: Any,
    ) -> None:
        silence(quiet, as_json)
        with warnings_in_yellow():
            verb(**options)

    *common, _ = inspect.signature(command).parameters.values()
    update_wrapper(command, verb)
    set_parameters(command, [*inspect.signature(verb).parameters.values(), *common])
    return command
