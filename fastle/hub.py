"""The Hugging Face hub: fetches and uploads folders through huggingface_hub, which the extra "hub" installs.

Its own environment variables and login hold: HF_HOME for the cache, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import FastleError
from .files import one_line

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # "user/model"


class HubError(FastleError):
    """The hub cannot be used, or does not do what was asked for."""


def download_folder(repo_id: str, names: Sequence[str]) -> Path:
    """Fetches files of a model into huggingface_hub's cache, those that are not there yet.

    Args:
        repo_id: "user/model".
        names: The files' names. Those that the model lacks are left out.

    Returns:
        The folder that holds them.

    Raises:
        HubError: huggingface_hub is not installed, there is no such model, or the hub cannot be reached.
    """
    hub = _hub(f"no folder {repo_id} is here, and to look for it on the Hugging Face hub takes")
    with _one_line_errors(f"no folder {repo_id} is here, and the Hugging Face hub does not give it"):
        return Path(hub.snapshot_download(repo_id, allow_patterns=list(names)))


def download_dataset(repo_id: str, patterns: Sequence[str], folder: Path) -> None:
    """Fetches files of a data set into a folder, those that are not there yet; huggingface_hub resumes and checks them.

    Args:
        repo_id: "user/dataset".
        patterns: Of the files' paths, with "*".
        folder: Where they go, created if need be.

    Raises:
        HubError: huggingface_hub is not installed, there is no such data set, or the hub cannot be reached.
    """
    hub = _hub(f"to fetch {repo_id} takes")
    with _one_line_errors(f"the Hugging Face hub does not give {repo_id}; the same command goes on with what is there"):
        hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=list(patterns), local_dir=folder)


def upload_folder(folder: Path, repo_id: str, *, private: bool) -> str:
    """Uploads the files of a folder to a model's repository, which is created if need be.

    Returns:
        The address of the repository.

    Raises:
        HubError: huggingface_hub is not installed, the hub refuses, or it cannot be reached.
    """
    hub = _hub(f"to upload {repo_id} takes")
    with _one_line_errors(f"the Hugging Face hub does not take {repo_id}"):
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with fastle")
        return str(address)


def _hub(needed: str) -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise HubError(f'{needed} huggingface_hub: pip install "fastle[hub]"') from None
    return huggingface_hub


@contextmanager
def _one_line_errors(fault: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # a base of the error is that of the HTTP library, which depends on the release
    kinds: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    try:
        yield
    except kinds as error:
        raise HubError(f"{fault} ({one_line(error)})") from None
