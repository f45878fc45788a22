"""Recognizes by the names of folders that not all images below a folder are good ones."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import InputError, InputWarning, first_few
from ..files import shown

GOOD, DEFECTIVE, MASK, TEST = "good", "defective", "mask", "test"
_WORDS = {
    GOOD: "good goods ok okay normal pass passed accept accepted nondefective nodefect nodefects defectfree faultfree"
    " anomalyfree withoutdefect withoutdefects nominal inlier inliers",
    DEFECTIVE: "bad ng nok ko notok notgood nogood nongood defect defects defective defectives anomaly anomalies"
    " anomalous abnormal fail failed failure failures fault faults faulty flaw flaws flawed reject rejects rejected"
    " outlier outliers broken damaged scrap negative negatives positive positives neg pos",
    MASK: "mask masks groundtruth groundtruths gt gts segmentation segmentations label labels annotation annotations",
    TEST: "test tests testing val valid validation eval evaluation",
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
# These tell enough wherever they stand in a name: "NG scratch", "defect_hole".
_CLEAR = {"ng", "nok", "defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "mask", "masks"}
_FILLERS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "part", "parts", "data", "set"}
# "train_good", "test bad": the image's kind stands beside the share of the images.
_SHARES = {"train", "training"}
_LAYOUT = "lay the images out as train/good, test/good, test/KIND and ground_truth/KIND"


def kind_of_folder(name: str) -> str | None:
    """Returns the kind of images that a folder's name tells of: GOOD, DEFECTIVE, MASK or TEST; None for others."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()
    words = [word for word in re.findall(r"[^\W\d_]+", apart) if word not in _FILLERS]
    kind = _KINDS.get("".join(words)) or next((_KINDS[word] for word in words if word in _CLEAR), None)
    kinds = [_KINDS.get(word) for word in words if word not in _SHARES]
    if kind is None and None not in kinds:
        kind = next((each for each in (MASK, DEFECTIVE, TEST, GOOD) if each in kinds), None)
    return kind


def refuse_mixed(root: Path, images: Iterable[Path]) -> None:
    """Raises: InputError if folders' names say that not all ``images`` below ``root`` are good ones.

    An InputWarning tells of several folders whose names say nothing.
    """
    folders = _folders_below(root, images)
    kinds = {folder: kind_of_folder(os.path.basename(folder)) for folder in folders}  # noqa: PTH119
    good = [folder for folder in folders if kinds[folder] == GOOD]
    # Beside a folder of good images, others hold something else.
    beside = {os.path.dirname(folder) for folder in good}  # noqa: PTH120
    others = [
        folder
        for folder in folders
        if kinds[folder] in (DEFECTIVE, MASK, TEST)
        or (kinds[folder] is None and os.path.dirname(folder) in beside and folder not in _above(good))  # noqa: PTH120
    ]
    if not others:
        _warn_of_kinds(root, folders)
        return
    # Good images of a test are not to be learned from.
    good.sort(key=lambda folder: any(kind_of_folder(part) in (DEFECTIVE, MASK, TEST) for part in Path(folder).parts))
    seen = first_few([shown(folder) for folder in sorted([*good, *others])])
    name = (
        f"name the folder of good images, {shown(root / good[0])}" if good else "name the folder of good images alone"
    )
    raise InputError(
        f"{shown(root)}: all images below it would be taken for good ones, and it holds folders called {seen}; {name},"
        f" or {_LAYOUT}"
    )


def _warn_of_kinds(root: Path, folders: Sequence[str]) -> None:
    """Tells of folders beside each other whose names say nothing: they may be kinds of images."""
    beside = [folder for folder in folders if "/" not in folder and kind_of_folder(folder) is None]
    if len(beside) > 1:
        names = first_few([shown(folder) for folder in beside])
        warnings.warn(
            f"{shown(root)}: all images below it, in folders {names}, are taken for good ones; if some are not, name"
            " the folder of good images alone",
            InputWarning,
            stacklevel=3,
        )


def refuse_misnamed(test: Path, kind: str, images: Iterable[Path], good: str = "good") -> None:
    """Raises: InputError if the name of the folder ``kind`` of ``test``, or of one below it, contradicts that its
    ``images`` are good, if it is ``good``, and of one kind of defect otherwise."""
    named = kind_of_folder(kind)
    if named == GOOD and kind != good:
        raise InputError(f"{shown(test / kind)}: the folder of good test images must be called {good}; rename it")
    if named == MASK:
        raise InputError(
            f"{shown(test / kind)}: holds masks by its name, and its images would be taken for a kind of defect; put"
            " masks into ground_truth/KIND, beside test"
        )
    wrong = (DEFECTIVE, MASK) if kind == good else (GOOD, MASK)
    for folder in _folders_below(test / kind, images):
        if kind_of_folder(os.path.basename(folder)) in wrong:  # noqa: PTH119
            what = "good" if kind == good else "defective"
            raise InputError(
                f"{shown(test / kind / folder)}: all images below {shown(test / kind)} are taken for {what} ones;"
                f" {_LAYOUT}"
            )


def _folders_below(root: Path, images: Iterable[Path]) -> list[str]:
    """Returns the folders below ``root`` with images in or below them, relative to it, sorted."""
    # No image has a path of its own here: there may be a million.
    start = os.path.join(root, "")  # noqa: PTH118
    parents = {os.path.dirname(image) for image in images}  # noqa: PTH120
    found = {parent.removeprefix(start) for parent in parents if parent.startswith(start)}
    return sorted(found.union(*map(_parents, found))) if found else []


def _parents(folder: str) -> list[str]:
    return [str(parent) for parent in Path(folder).parents if str(parent) != "."]


def _above(folders: Sequence[str]) -> set[str]:
    return {parent for folder in folders for parent in _parents(folder)}
