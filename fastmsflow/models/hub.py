"""Saves models as folders, here or on the Hugging Face hub, and reads them."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download

from ..backend import Backend
from ..errors import InputError, UnavailableError
from ..files import shown
from ..hub_access import hub_answers, hub_offline
from ..schema import read_json_file
from .checkpoint import ModelDescription

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHTS_FILE = constants.SAFETENSORS_SINGLE_FILE
# A model is read as it was saved; the mixin would ignore its other options silently.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
OPTIONS = ("backend", *HUB_OPTIONS)


class HubModel(PyTorchModelHubMixin, tags=["anomaly-detection"]):
    """Gives a model with ``config``, ``save`` and ``load`` the hub's methods.

    These are ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.
    """

    if TYPE_CHECKING:

        @property
        def config(self) -> dict[str, Any]: ...
        def save(self, path: str | Path) -> None: ...
        @classmethod
        def load(cls, path: str | Path, backend: Backend) -> "Self": ...

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes a folder with the checkpoint, the configuration as JSON, for people, and a model card.

        ``options``: those of PyTorchModelHubMixin, ``repo_id`` and ``push_to_hub`` among them.
        """
        return super().save_pretrained(save_directory, **{"config": self.config, **options})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "Self":
        """Reads a model from a folder that ``save_pretrained`` wrote, or from a repository ``"owner/name"`` of the hub.

        ``options``: ``backend``, and the hub's ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
        ``force_download``.
        Raises: InputError if the folder holds no such model or an option is not one of these; UnavailableError if there
        is neither folder nor repository.
        """
        name = pretrained_model_name_or_path
        unknown = ", ".join(option for option in options if option not in OPTIONS)
        if unknown:
            raise InputError(
                f"{name}: from_pretrained does not take {unknown}: a model is read as it was saved, on the CPU; options"
                f" are {', '.join(OPTIONS)}"
            )
        backend: Backend = options.pop("backend", "auto")
        if Path(name).is_dir():
            return cls.load(_checked(Path(name)) / WEIGHTS_FILE, backend)
        if Path(name).is_file():
            raise InputError(f"{shown(name)}: a file, not a folder; MSFlow.load reads checkpoints")
        # Otherwise huggingface_hub itself would retry for most of a minute.
        offline = not hub_answers()
        try:
            with hub_offline(offline):
                # The mixin would read the configuration for people first, and believe it.
                weights = hf_hub_download(str(name), WEIGHTS_FILE, **options)
        except (OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            # The hub answers 401 for what is not there or private.
            failed = status is not None and status not in (401, 404)
            fact = f"not on the hub ({f'status {status}' if failed else type(error).__name__})"
            if offline:
                fact = "the hub is not reachable"
            raise UnavailableError(
                f"{name}: no such folder, and {fact}; give one that save_pretrained wrote"
            ) from error
        return cls.load(weights, backend)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / WEIGHTS_FILE)


def _checked(folder: Path) -> Path:
    """Returns ``folder``. Raises: InputError if its configuration for people, which need not be there, is damaged."""
    path = folder / constants.CONFIG_NAME
    with suppress(FileNotFoundError):
        read_json_file(path, ModelDescription, f"{shown(path)}: damaged", "save the model again, or remove this file")
    return folder
