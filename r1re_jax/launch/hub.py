"""An exported folder onto the Hugging Face hub; what cannot succeed is refused before any work.

No token is printed: none is asked for beyond what huggingface_hub finds itself, and messages of the
hub are cleaned of it.
"""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1re_jax.model.hf_config import PRODUCER
from r1re_jax.policy_files import RECIPE

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
TOKEN = re.compile(r"\b(hf|api_org)_\w{16,}|(?<=Bearer )[^\s'\"]+")
# What an earlier export may leave beside a new one that is cut into other files.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
OWN = {".gitattributes"}  # the hub's, in every repository
SHOWN = 5


class HubError(ValueError):
    """A folder that was not pushed; the message says why and what to do."""


def check_push(name: str, *, private: bool = False, overwrite: bool = False) -> None:
    """Refuse a push that cannot or must not succeed. Reads from the hub, writes nothing.

    Args:
        name: ORG/NAME of the repository.
        private: whether nobody else is to see it.
        overwrite: whether what a repository of that name holds may be replaced.

    Raises:
        HubError: no such name can be, nobody is logged in, the account may not write there, or the
            repository holds what no export wrote, or is public and asked to be private.
    """
    _check_name(name)
    _find_repository(_log_in(name), name, private=private, overwrite=overwrite)


def push(
    folder: str | os.PathLike, name: str, *, private: bool = False, overwrite: bool = False
) -> str:
    """Upload an exported folder, as one repository; it is made where there is none.

    Args:
        folder: as `save_policy` writes it.
        name: ORG/NAME of the repository.
        private: whether nobody else is to see it; else the account's default decides.
        overwrite: replace all that the repository holds, whoever wrote it; its history stays.

    Returns:
        The address of the repository.

    Raises:
        HubError: as of `check_push`, or the hub refused; the folder stays as it is.
    """
    try:
        _check_name(name)
        api = _log_in(name)
        # Asked again: exporting takes a while, and the hub may have changed.
        if not _find_repository(api, name, private=private, overwrite=overwrite):
            _ask(api.create_repo, name, private=True if private else None)
        _ask(
            api.upload_folder,
            repo_id=name,
            folder_path=folder,
            commit_message="Export by r1re_jax",
            delete_patterns=["*"] if overwrite else WEIGHTS,
        )
    except HubError as error:
        again = ["hf", "upload", name, os.fspath(folder), "."] + ["--private"] * private
        raise HubError(
            f"not pushed: {error}\nThe export is in {os.fspath(folder)}. Once that is mended, this"
            f" uploads it: {shlex.join(again)}"
        ) from None
    return f"{api.endpoint}/{name}"


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not NAME.fullmatch(name):
        raise HubError(f"{name!r} is no name on the hub; expected ORG/NAME, as in ann/my-policy")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{name!r} is no name on the hub: {error}") from None


def _log_in(name: str) -> Any:
    """Return the hub's interface if somebody is logged in who may write under that name."""
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if _ask(huggingface_hub.get_token) is None:
        raise HubError(
            "nobody is logged in to the Hugging Face hub. Run `hf auth login`, or set HF_TOKEN to a"
            " token with write access (https://huggingface.co/settings/tokens)"
        )
    api = huggingface_hub.HfApi()
    _check_account(_ask(api.whoami), name.partition("/")[0])
    return api


def _check_account(account: Mapping[str, Any], owner: str) -> None:
    """Refuse a token that only reads, and an owner that the user does not belong to."""
    user = account.get("name")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"the token of {user} may only read; log in with one that may write: `hf auth login`,"
            " or HF_TOKEN"
        )
    owners = [user, *(one.get("name") for one in account.get("orgs", ()))]
    if account.get("type") == "user" and owner.lower() not in [str(one).lower() for one in owners]:
        raise HubError(
            f"{user} may not write under {owner}; expected one of {', '.join(map(str, owners))}"
        )


def _find_repository(api: Any, name: str, *, private: bool, overwrite: bool) -> bool:
    """Return whether the repository is there; refuse one that must not be written to."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = api.model_info(name)
    except GatedRepoError:
        raise HubError(f"{name} is there and closed to this account; choose another name") from None
    except RepositoryNotFoundError:
        return False
    except Exception as error:
        raise HubError(_cleaned(error)) from None
    if private and not found.private:
        raise HubError(
            f"{name} is there and public, and pushing does not change that: make it private in its"
            " settings on the hub, or choose another name"
        )
    files = {file.rfilename for file in found.siblings or ()} - OWN
    if files and not overwrite and not _is_export(api, name, files):
        some = ", ".join(sorted(files)[:SHOWN]) + (", …" if len(files) > SHOWN else "")
        raise HubError(
            f"{name} on the hub holds what no export wrote ({some}): nothing is overwritten. Choose"
            " another name, or pass --push_overwrite to replace all of it"
        )
    return True


def _is_export(api: Any, name: str, files: set[str]) -> bool:
    """Whether an export wrote what a repository holds, by the marks that `save_policy` leaves.

    Other programs copy config.json with all its keys, but not r1re.json.
    """
    if not {RECIPE, "config.json"} <= files:
        return False
    with tempfile.TemporaryDirectory() as place:
        path = _ask(api.hf_hub_download, name, "config.json", local_dir=place)
        try:
            config = json.loads(Path(path).read_text("utf-8"))
        except ValueError:
            return False
    return isinstance(config, dict) and config.get("producer") == PRODUCER


def _ask(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Ask the hub; whatever fails there (network, rights, its own checks) becomes a HubError."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        # Without the cause: its traceback may hold the request with its token.
        raise HubError(_cleaned(error)) from None


def _cleaned(error: Exception) -> str:
    """Return an error's message without the token, which some show as part of a request."""
    return TOKEN.sub("<token>", f"{type(error).__name__}: {error}")
