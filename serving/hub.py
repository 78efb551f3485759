"""Upload an exported folder to the Hugging Face hub, with the hub's own calls."""

import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from errors import TemporaryError, UserError, reason

# What an earlier export may have left in a repository, and what a reader would take for a part of this one.
OUTDATED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_*"]
OUTDATED += ["added_tokens.json", "tokenizer.model", "*chat_template*", "Modelfile"]


def check_repository(name: str, key: str) -> tuple[str, bool]:
    """Return the whole id, with the owner, of the model repository `name`, and whether it is there and public.

    Nothing is created. Raises `UserError` about `key` without a token, or the right to write there.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{key} {name!r}: not a name on the hub, which is name or owner/name") from error
    if huggingface_hub.get_token() is None:
        raise UserError(f"{key} {name}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    try:
        account: dict[str, Any] = api.whoami()
        whole = name if "/" in name else f"{account['name']}/{name}"
        public = not api.model_info(whole).private
        api.auth_check(whole, write=True)
        return whole, public
    except RepositoryNotFoundError:
        if why := _why_not_create(whole, account):
            raise UserError(f"{key} {name}: it is not there, and cannot be created: {why}") from None
        return whole, False
    except Exception as error:  # of the hub's client, or of its HTTP library
        raise _refused(f"{key} {name}", error) from error


def _why_not_create(name: str, account: dict[str, Any]) -> str:
    """Return why an account and its token may not create the repository `name`, "" if the hub tells of no reason."""
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])} | {account["name"]: "admin"}
    user, owner, token = account["name"], name.split("/")[0], account.get("auth", {}).get("accessToken") or {}
    if owner not in roles:
        return f"{owner} is neither {user}, whose token this is, nor one of its organizations"
    if roles[owner] == "read":
        return f"{user}, whose token this is, may only read there"
    return "the token may only read" if token.get("role") == "read" else ""


def upload(folder: Path, name: str, key: str) -> str:
    """Upload a folder into the repository `name`; return its address. Raises `UserError`: the folder stays here.

    A new repository is private. Of an old one, the files that are `OUTDATED` are deleted in the same commit.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export", delete_patterns=OUTDATED)
    except Exception as error:  # as above
        options = [word for pattern in OUTDATED for word in ("--delete", pattern)]
        again = shlex.join(["hf", "upload", name, str(folder), "--private", *options])
        raise _refused(f"{key} {name}: {folder} is whole, but not uploaded (`{again}` tries again)", error) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"


def _refused(what: str, error: Exception) -> UserError:
    """Return the mistake that the hub reports; a `TemporaryError` if it was not reached, or had one of its own."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return (UserError if 400 <= status < 500 else TemporaryError)(f"{what}: {reason(error)}")
