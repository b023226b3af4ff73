"""Pushing a finished folder, a dataset or a model, to the Hub in one commit."""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import UserError


def check_repo_name(name: str) -> None:
    """Refuse what is no name of a repository, before work is spent on what is to be pushed.

    Raises:
        UserError: `name` is not `organisation/name`.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name of a repository ({error}); accepted: organisation/name") from error
    if name.count("/") != 1:
        raise UserError(f"{name!r} is no name of a repository; accepted: organisation/name")


def push_folder(
    folder: str | os.PathLike[str], name: str, repo_type: str, private: bool = False, replace: str | None = None
) -> str:
    """Upload all of a folder to the Hub as one commit; the repository is made when there is none.

    Args:
        folder: what to upload. It stays as it is, whatever happens.
        name: `organisation/name`.
        repo_type: `dataset` or `model`.
        private: make the repository private. One that exists must be private already.
        replace: pattern of files; those in the repository that are not in the folder go with the same commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token or no right to write, no connection, an answer that is no success.
    """
    check_repo_name(name)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, repo_type=repo_type, private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type=repo_type).private:
            raise UserError(f"{name}: not pushed, it exists and is public; accepted: a new or a private repository")
        commit = api.upload_folder(
            repo_id=name, repo_type=repo_type, folder_path=Path(folder), delete_patterns=replace
        )
    except UserError:
        raise
    except Exception as error:  # the client lets through errors of whatever network library it uses
        raise UserError(
            f"{name}: not pushed: {error or type(error).__name__}; {folder} is complete and stays. A token with the "
            f"right to write comes from `hf auth login` or HF_TOKEN; to push again: "
            f"hf upload {name} {folder} . --repo-type {repo_type}"
        ) from error
    return commit.commit_url
