"""The command line: parses, calls, prints. Verbs are listed in the order of these imports."""

from . import learning  # noqa: F401, I001
from . import judging  # noqa: F401
from . import prediction  # noqa: F401
from . import shard  # noqa: F401
from . import official  # noqa: F401
from . import benchmark  # noqa: F401
from .options import app

__all__ = ["app"]
