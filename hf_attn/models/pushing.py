"""Pushing converted models and their adapters, with their cards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_attn.models.cards import check_folder, is_generated, write_model_card


def push(folder: str | os.PathLike, repo: str, *, private: bool = False, **facts: Any) -> str:
    """See `hf_attn.push`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"no such folder: {folder}")
    card = folder / "README.md"
    if not card.is_file() or is_generated(card.read_text(encoding="utf-8")):
        write_model_card(folder, repo=repo, **facts)
    elif facts:
        raise ValueError(f"{card} was written by hand, so {', '.join(facts)} would be lost; put them into it yourself")
    check_folder(folder)
    api = HfApi()
    address = str(api.create_repo(repo, private=private, exist_ok=True))
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with hf-attn", ignore_patterns=[".*"])
    return address


def push_card(describe: Callable[[Path], Any], repo: str, options: dict[str, Any]) -> None:
    """Give a repository the card of something in memory, unless it has one that somebody wrote.

    transformers keeps the card that a repository has and writes an empty one otherwise, so ours goes there first.

    Args:
        describe: writes the files into a folder that a card is made from (config.json or hf_attn.json).
        options: those of `push_to_hub`.
    """
    api = HfApi(token=options.get("token"))
    repo = api.create_repo(repo, private=options.get("private"), exist_ok=True).repo_id
    where = {"repo_id": repo, "revision": options.get("revision")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if api.file_exists(filename="README.md", **where):
            old = api.hf_hub_download(filename="README.md", local_dir=folder / "old", **where)
            if not is_generated(Path(old).read_text(encoding="utf-8")):
                return
        describe(folder)
        card = write_model_card(folder, repo=repo)
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", commit_message="Card", **where)
