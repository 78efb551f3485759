"""Training without padding: a batch's tokens in one row, in which no sequence sees another.

The data loader makes a rectangle of a batch, with padding up to its longest sequence: of public samples in batches of
four, two fifths of it. Here the decoder is given the tokens alone. What goes in and what comes out keep their shapes,
so TRL's losses and metrics, and what a step learns from, stay what they were.

    batch (B, L)        row (1, T)
    a b c .             a b c d e f g
    d e f g             0 1 2 0 1 2 3       positions

The two sequences of a preference pair begin with the same prompt. It is computed once: what it is to the answers does
not depend on them, as attention is causal. The rejected answer attends to the chosen one's prompt, and to itself.

    p q a .             p q a b c
    p q b c             0 1 2 2 3

Upstream: SFTTrainer's own `padding_free` (TRL 1.16) needs a FlashAttention package, or computes a (T, T) mask on a CPU,
and DPOTrainer's is switched off. This can go once both work with SDPA.
"""

import functools
import types
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# What tests/test_padding_free.py compares with the same model on padded batches. Others stay padded.
FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
ATTENTION = "sdpa_by_sequence"


class Run(NamedTuple):
    """Tokens `start` to `stop` of a row. They attend to each other, and to those from `prefix_start` to
    `prefix_stop`, which come before them in their sequence."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


class Row:
    """A batch of (B, L) token ids as a row of T tokens. (No dataclass: FSDP2 would take it apart for every layer.)"""

    def __init__(self, taken: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, runs: list[Run]) -> None:
        self.taken = taken  # (T,) int64, where each token stands in the flattened batch
        self.positions = positions  # (1, T) int64, in their sequences
        self.places = places  # (B L,) int64, where each of the flattened batch's tokens stands in the row; padding: 0
        self.runs = runs
        self.masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, run: Run, window: int | None) -> torch.Tensor | None:
        """Which tokens (T_run, T_prefix + T_run) of the run and its prefix each of the run's attends to; None for all
        up to itself, for which SDPA needs no mask."""
        size, before = run.stop - run.start, run.prefix_stop - run.prefix_start
        if window is not None and window >= before + size:
            window = None
        if not before and window is None:
            return None
        if (size, before, window) not in self.masks:
            mask = torch.ones(size, before + size, dtype=torch.bool, device=self.taken.device).tril(before)
            self.masks[size, before, window] = mask if window is None else mask.triu(before - window + 1)
        return self.masks[size, before, window]


def lay_out(input_ids: torch.Tensor, attention_mask: torch.Tensor, pairs: bool) -> Row | None:
    """The row of a batch, (B, L) each, of which sequence i and i + B/2 are a pair's if it holds `pairs`.

    None unless all padding is at the sequences' ends.
    """
    device, (size, length) = input_ids.device, input_ids.shape
    # Once: each step below would wait for a GPU.
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()
    offsets = torch.arange(length).expand(size, length)
    lengths = attention_mask.sum(1)
    kept = offsets < lengths[:, None]
    if not torch.equal(kept, attention_mask.bool()):
        return None
    shared = torch.zeros_like(lengths)
    if pairs:
        chosen, rejected = input_ids.chunk(2)
        alike = (chosen == rejected) & kept[: size // 2] & kept[size // 2 :]
        shared[size // 2 :] = alike.long().cumprod(1).sum(1)
    own = kept & (offsets >= shared[:, None])
    places = (own.flatten().cumsum(0) - 1).view(size, length)
    if pairs:
        places[size // 2 :] = torch.where(own[size // 2 :], places[size // 2 :], places[: size // 2])
    places = places.masked_fill(~kept, 0)

    runs, start, starts = [], 0, []
    for index, (whole, prefix) in enumerate(torch.stack([lengths, shared], 1).tolist()):
        starts.append(start)
        stop = start + whole - prefix
        prefix_start = starts[index - size // 2] if prefix else 0
        if stop > start:
            runs.append(Run(start, stop, prefix_start, prefix_start + prefix))
        start = stop
    tensors = (own.flatten().nonzero().squeeze(1), offsets[own][None], places.flatten())
    return Row(*(tensor.to(device) for tensor in tensors), runs)


def attend_by_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row: Row | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, run by run of a `row`; as it is where there is none (generation).

    `query`, `key`, `value`: (1, heads, T, head size). Returns (1, T, heads, head size).
    """
    if row is None:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attended = []
    for run in row.runs:
        queries, *seen = (tensor[:, :, run.start : run.stop] for tensor in (query, key, value))
        if run.prefix_stop:
            prefixes = (tensor[:, :, run.prefix_start : run.prefix_stop] for tensor in (key, value))
            seen = [torch.cat(parts, dim=2) for parts in zip(prefixes, seen, strict=True)]
        mask = row.mask(run, sliding_window)
        attended.append(sdpa_attention_forward(module, queries, *seen, mask, **kwargs | {"is_causal": mask is None})[0])
    return torch.cat(attended, dim=1), None


AttentionInterface.register(ATTENTION, attend_by_sequence)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def can_remove_padding(model: PreTrainedModel) -> bool:
    """Whether the model is of one of `FAMILIES`, with causal SDPA attention."""
    config = model.config
    return (
        config.model_type in FAMILIES
        and config._attn_implementation in ("sdpa", ATTENTION)
        and not getattr(config, "use_bidirectional_attention", False)
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def why_padded(model: PreTrainedModel, args: TrainingArguments) -> str | None:
    """What keeps a training with `args` at padded batches, if anything does."""
    if args.torch_compile:
        return "torch_compile"  # it wants no loops over sequences
    if getattr(args, "neftune_noise_alpha", None):
        return "neftune_noise_alpha"  # its noise is scaled by the length of a batch's rows
    if not can_remove_padding(model):
        return f"{model.config.model_type}, {model.config._attn_implementation} attention"
    return None


def remove_padding(model: PreTrainedModel, pairs: bool) -> bool:
    """Have `model`'s decoder compute a batch without its padding, and if it holds `pairs` their prompts once; whether
    it can. Call it before the model is wrapped.

    Batches that come with positions, a cache or padding elsewhere than at the ends are computed as ever.
    """
    if not can_remove_padding(model):
        return False
    config, decoder = model.config, model.base_model
    padded_forward = type(decoder).forward

    @functools.wraps(padded_forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        others = ("position_ids", "past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions")
        plain = kwargs.get("use_cache") is False and not any(kwargs.get(name) is not None for name in others)
        row = None
        if plain and input_ids is not None and attention_mask is not None and attention_mask.dim() == 2:
            row = lay_out(input_ids, attention_mask, pairs and len(input_ids) % 2 == 0)
        if row is None:
            return padded_forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs = padded_forward(
            self,
            input_ids=input_ids.flatten()[row.taken][None],
            # transformers takes a mask of four dimensions for ready, and makes none of its own, which would be (T, T).
            attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),
            position_ids=row.positions,
            row=row,
            **kwargs,
        )
        (hidden,) = outputs.last_hidden_state
        # What stands where there was padding does not matter, as ever.
        outputs.last_hidden_state = hidden.index_select(0, row.places).view(*input_ids.shape, -1)
        return outputs

    decoder.forward = types.MethodType(forward, decoder)
    config._attn_implementation = ATTENTION
    return True
