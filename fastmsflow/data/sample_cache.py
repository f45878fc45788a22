"""Keeps the sample sets that are drawn over scikit-image's photographs: each class is written once, whole."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from ..errors import UnavailableError


def sample_cache(name: str) -> Path:
    """Returns a folder of the user's cache, or one of this process's own where there is no home to write into."""
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmsflow" / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or any(folder.iterdir()):
            return folder
    return Path(_temporary(name).name)


def photograph(name: str) -> np.ndarray:
    """Returns a photograph that scikit-image bundles, (512, 512) uint8.

    Raises: UnavailableError if scikit-image is not installed.
    """
    try:
        import skimage.data as photographs
    except ImportError as error:
        raise UnavailableError("the texture photographs are not installed: pip install scikit-image") from error
    return getattr(photographs, name)()


def write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a folder beside ``target`` and renames it, so ``target`` is there whole or not at all.

    ``write`` has to write the same bytes every time.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        write(aside)
        aside.chmod(0o755)
        aside.rename(target)
    except OSError:
        # Another process may have finished first; its files are the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Writes gray pixels (H, W) uint8, and the folder that they lie in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_defective(folder: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    """Writes a defective test image (H, W) uint8 and its mask (H, W) bool where the MVTec AD layout has them; ``name``:
    KIND/NUMBER."""
    save_image(folder / f"test/{name}.png", image)
    save_image(folder / f"ground_truth/{name}_mask.png", mask.astype(np.uint8) * 255)


@cache
def _temporary(name: str) -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix=f"fastmsflow-{name}-")
