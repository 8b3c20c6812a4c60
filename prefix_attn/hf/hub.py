"""The Hugging Face Hub: model cards, uploads, and the options of downloads."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
CARD = "README.md"
_DOWNLOAD = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_NO_EFFECT = {
    "torch_dtype": "parameters of prefixes are float32",
    "dtype": "parameters of prefixes are float32",
    "autocast_adapter_dtype": "parameters of prefixes are float32",
    "torch_device": "a prefix goes to the device of its base model",
    "device_map": "a prefix goes to the device of its base model",
    "low_cpu_mem_usage": "a prefix is small",
    "ephemeral_gpu_offload": "a prefix is small",
}


def download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``given`` that say where to find a prefix. PEFT's others change nothing here, which is a warning.

    Raises:
        TypeError: an option that nobody knows.
    """
    if unknown := sorted(given.keys() - {*_DOWNLOAD, *_NO_EFFECT}):
        raise TypeError(f"unknown options {unknown}; there are {[*_DOWNLOAD]}")
    for name in given.keys() & _NO_EFFECT.keys():
        _log.warning("%s=%r changes nothing: %s", name, given[name], _NO_EFFECT[name])
    return {name: given[name] for name in _DOWNLOAD if given.get(name) is not None}


def card_text(there: str | None, data: Mapping[str, Any], body: str) -> str:
    """A model card with the metadata ``data``: ``there`` with its text and its other metadata, or a new one.

    A card whose metadata cannot be read is left as it is: nobody loses a training over a README.

    Args:
        there: the card that the folder or repository has.
        data: of the card. Tags are added to those that it has; None leaves out a field.
        body: the text of a new card.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    text = f"---\n{{}}\n---\n\n{body}" if there is None else there
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        _log.warning("%s stays as it is: its metadata cannot be read (%s)", CARD, error)
        return text
    for name, value in data.items():
        if name == "tags":
            card.data["tags"] = sorted({*(card.data.get("tags") or []), *value})
        elif value is not None:
            card.data[name] = value
    return str(card)


def push(
    save: Callable[[str], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
    **upload: Any,
) -> Any:
    """Save into a folder and upload it. Nothing is requested before the arguments are checked and the files are made.

    Args:
        save: writes the files into the folder that it is given.
        repo_id: the repository, made if it is not there.
        private: whether a new repository is private; default: as the owner's settings say.
        token: of every request; default: the one of ``hf auth login``.
        revision: the branch, made if it is not there.
        create_pr: open a pull request instead.
        tags: one or more further tags of the model card.
        upload: more options of ``huggingface_hub.upload_folder``, such as commit_message.

    Returns:
        What ``upload_folder`` returns.

    Raises:
        TypeError: unknown options.
        ValueError: no name of a repository, or ``private`` and a repository that is public.
    """
    from tempfile import TemporaryDirectory

    from huggingface_hub import create_branch, create_repo, repo_info, upload_folder
    from huggingface_hub.utils import validate_repo_id

    taken = {"repo_id", "folder_path", "repo_type", "self"}
    if unknown := sorted(upload.keys() - (inspect.signature(upload_folder).parameters.keys() - taken)):
        raise TypeError(f"push_to_hub has no options {unknown}; it takes those of huggingface_hub.upload_folder")
    validate_repo_id(repo_id or "")  # which lets None pass
    if not isinstance(revision, str | None):
        raise TypeError(f"revision must be the name of a branch, got {revision!r}")
    tags = [tags] if isinstance(tags, str) else [*(tags or ())]
    with TemporaryDirectory() as folder:
        save(folder)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and repo_info(repo_id, token=token).private is False:
            raise ValueError(f"private=True: {repo_id} is there already, and public; nothing was uploaded")
        _finish_card(Path(folder) / CARD, repo_id, token, tags)
        if revision is not None and not revision.startswith("refs/pr"):
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        options = {"token": token, "revision": revision, "create_pr": create_pr}
        return upload_folder(repo_id=repo_id, folder_path=folder, **options, **upload)


def _finish_card(path: Path, repo_id: str, token: Any, tags: Iterable[str]) -> None:
    """Add ``tags`` to the card at ``path``. Of a card that the repository has, text and other metadata stay."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import EntryNotFoundError

    ours = ModelCard.load(path)
    data = ours.data.to_dict()
    try:
        there: str | None = str(ModelCard.load(repo_id, token=token, ignore_metadata_errors=True))
    except EntryNotFoundError:
        there = None
    text = card_text(there, data | {"tags": [*data.get("tags", ()), *tags]}, ours.text)
    path.write_text(text, encoding="utf-8")
