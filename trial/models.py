"""Load a model and its tokenizer, for training and for inference."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import PassingError, UserError, one_line
from storage.hub import looks_like_path, quiet_lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_source(source: str, key: str) -> None:
    """Refuse what is plainly not a model: a path to nothing. Only the hub can tell whether it has a model."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{key} {source!r}: a folder without a config.json is no model")
    if not path.is_dir() and looks_like_path(source):
        raise UserError(f"{key} {source!r}: no such folder")


def load_model_and_tokenizer(
    source: str, key: str = "model_name", weights: bool = True, **model_init_kwargs: Any
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model with float32 weights (see `config/training_args.py`) and its tokenizer.

    `source` is a folder or a hub id; `key` is what the user calls it. `model_init_kwargs` go to the model's
    `from_pretrained`. Without `weights` only the config and the tokenizer are read, and the parameters have shapes but
    no values (torch's meta device). Raises `UserError` where there is no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_source(source, key)
    # Where to look, and how far to trust it, holds for the model and the tokenizer.
    shared = {
        k: v for k, v in model_init_kwargs.items() if k in ("revision", "subfolder", "token", "trust_remote_code")
    }
    try:
        with quiet_lookup():
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
            if weights:
                model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": torch.float32, **model_init_kwargs})
            else:
                config = AutoConfig.from_pretrained(source, **shared)
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(
                        config,
                        dtype=torch.float32,
                        trust_remote_code=bool(shared.get("trust_remote_code")),
                        attn_implementation=model_init_kwargs.get("attn_implementation"),
                    )
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise UserError(f"{key} {source!r}: {one_line(error)}") from error
        reason = f"no such folder, and the hub does not give it: {one_line(error)}"
        raise PassingError(f"{key} {source!r}: {reason}") from error
    if tokenizer.pad_token_id is None:
        # Labels are ours (-100 where unsupervised), so padding with EOS hides no EOS from the loss.
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
