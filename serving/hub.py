"""Upload an exported folder to the Hugging Face hub, with the hub's own calls."""

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from errors import TemporaryError, UserError, reason


def open_repository(name: str, key: str) -> str:
    """Create the model repository `name`, private, unless it is there; return its whole id, with the owner.

    Raises `UserError` about `key` if the hub refuses that, for want of a token or of the right to write there.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{key} {name!r}: not a name on the hub, which is name or owner/name") from error
    if huggingface_hub.get_token() is None:
        raise UserError(f"{key} {name}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    try:
        return huggingface_hub.HfApi().create_repo(name, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the hub's client, or of its HTTP library
        raise _refused(f"{key} {name}", error) from error


def upload(folder: Path, name: str, key: str) -> str:
    """Upload a folder into the repository `name`; return its address. Raises `UserError`: the folder stays here."""
    try:
        huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export")
    except Exception as error:  # as above
        again = shlex.join(["hf", "upload", name, str(folder)])
        raise _refused(f"{key} {name}: {folder} is whole, but not uploaded (`{again}` tries again)", error) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"


def _refused(what: str, error: Exception) -> UserError:
    """Return the mistake that the hub reports; a `TemporaryError` if it was not reached, or had one of its own."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return (UserError if 400 <= status < 500 else TemporaryError)(f"{what}: {reason(error)}")
