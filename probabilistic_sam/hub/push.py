"""Push a finished folder, a dataset, a model or a static Space, to the Hub in one commit."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError


def check_repo_name(name: str) -> None:
    """Check the name of a repository before any work is done.

    Raises:
        UserError: `name` is not `organisation/name`.
    """
    reason = ""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = f" ({error})"
    if reason or name.count("/") != 1:
        raise UserError(f"{name!r} is not a repository name{reason}; accepted: organisation/name")


def push_folder(
    folder: str | os.PathLike[str],
    name: str,
    repo_type: str,
    private: bool = False,
    revision: str | None = None,
    replace: str | list[str] | None = None,
    again: str | None = None,
) -> str:
    """Upload a folder to the Hub as one commit. The repository and the branch are created if they do not exist.

    A commit is atomic. After a failed push nothing is deleted: a repository or branch that this call created remains,
    and the error names it.

    Args:
        folder: what to upload.
        name: `organisation/name`.
        repo_type: `dataset`, `model` or `space` (a static one).
        private: make the repository private. An existing repository must already be private.
        revision: branch to push to, `main` by default.
        replace: patterns of files. Matching files of the repository that are not in the folder are deleted in the same
            commit.
        again: command that repeats the push, for the error message. By default the command that uploads this folder.

    Returns:
        The URL of the commit.

    Raises:
        UserError: no token, no permission to write, no connection, or an error answered by the Hub.
    """
    check_repo_name(name)
    api = huggingface_hub.HfApi()
    repo: dict[str, Any] = {"repo_id": name, "repo_type": repo_type}
    created = []
    try:
        if not api.repo_exists(**repo):
            api.create_repo(**repo, private=private or None, space_sdk="static" if repo_type == "space" else None)
            created.append(f"repository {name}")
        elif private and not api.repo_info(**repo).private:
            raise UserError(f"{name}: not pushed, it exists and is public; accepted: a new or a private repository")
        if revision and not api.revision_exists(**repo, revision=revision):
            api.create_branch(**repo, branch=revision)
            created.append(f"branch {revision}")
        commit = api.upload_folder(**repo, folder_path=Path(folder), revision=revision, delete_patterns=replace)
    except UserError:
        raise
    except Exception as error:  # the client passes on the errors of its network library
        message = f"{name}: push failed: {reason(error)}; "
        if created:
            page = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{name}"
            message += f"created on the Hub and not deleted: {', '.join(created)} (to delete by hand: {page}); "
        if not again:
            message += f"{folder} is complete; "
            again = f"hf upload {name} {folder} . --repo-type {repo_type}" + f" --revision {revision}" * bool(revision)
        message += f"a token with write permission comes from `hf auth login` or HF_TOKEN; to push again: {again}"
        raise UserError(message) from error
    return commit.commit_url


def reason(error: BaseException) -> str:
    """Text of an error and of its cause."""
    text = str(error).rstrip(". ") or type(error).__name__
    return f"{text} ({error.__cause__})" if error.__cause__ and str(error.__cause__) not in text else text
