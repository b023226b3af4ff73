"""Pushing a finished folder, a dataset or a model, to the Hub in one commit."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError


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
    folder: str | os.PathLike[str],
    name: str,
    repo_type: str,
    private: bool = False,
    revision: str | None = None,
    replace: str | list[str] | None = None,
    again: str | None = None,
) -> str:
    """Upload all of a folder to the Hub as one commit; repository and branch are made when there are none.

    A commit is there whole or not at all. When it does not come about, the repository or branch that was made for it
    is deleted again; one that was there before stays as it was.

    Args:
        folder: what to upload. It stays as it is, whatever happens.
        name: `organisation/name`.
        repo_type: `dataset` or `model`.
        private: make the repository private. One that exists must be private already.
        revision: the branch, `main` without it.
        replace: patterns of files; those in the repository that are not in the folder go with the same commit.
        again: what an error advises; without it, to upload this folder by hand.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token or no right to write, no connection, an answer that is no success.
    """
    check_repo_name(name)
    api = huggingface_hub.HfApi()
    repo: dict[str, Any] = {"repo_id": name, "repo_type": repo_type}
    made, branch, head = "", None, None  # what is made for this commit, and the commit it stands at before
    try:
        if not api.repo_exists(**repo):
            api.create_repo(**repo, private=private or None, exist_ok=True)
            made = "repository"
            head = api.repo_info(**repo).sha
        elif private and not api.repo_info(**repo).private:
            raise UserError(f"{name}: not pushed, it exists and is public; accepted: a new or a private repository")
        if revision and not api.revision_exists(**repo, revision=revision):
            api.create_branch(**repo, branch=revision, exist_ok=True)
            made, branch = made or "branch", revision
            head = api.repo_info(**repo, revision=branch).sha
        commit = api.upload_folder(**repo, folder_path=Path(folder), revision=revision, delete_patterns=replace)
    except BaseException as error:  # an interrupt too must leave nothing behind
        left = take_back(api, repo, made, branch, head) if made else ""
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        # The client lets through errors of whatever network library it uses
        on_branch = f" --revision {revision}" if revision else ""
        kept = "" if again else f"{folder} is complete and stays. "
        again = again or f"hf upload {name} {folder} . --repo-type {repo_type}{on_branch}"
        raise UserError(
            f"{name}: not pushed: {reason(error)}; {left}{kept}A token with the right to write comes "
            f"from `hf auth login` or HF_TOKEN; to push again: {again}"
        ) from error
    return commit.commit_url


def take_back(api: huggingface_hub.HfApi, repo: dict, made: str, branch: str | None, head: str | None) -> str:
    """Delete the repository or branch that was `made` for a commit, unless it is past `head`; say what is left."""
    try:
        if head and api.repo_info(**repo, revision=branch).sha != head:
            return f"yet a commit has arrived in the new {made}, which stays. "  # its answer was lost on the way
        if made == "repository":
            api.delete_repo(**repo)
        elif branch:
            api.delete_branch(**repo, branch=branch)
    except Exception:  # what kept the commit away may well keep this away
        return f"the new {made} stays on the Hub without these files. "
    return ""


def reason(error: BaseException) -> str:
    """What a client's error says, and what was behind it."""
    text = str(error).rstrip(". ") or type(error).__name__
    return f"{text} ({error.__cause__})" if error.__cause__ and str(error.__cause__) not in text else text
