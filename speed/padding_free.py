"""Train without padding: a batch's tokens in one row, in which no sequence sees another.

The data loader pads a batch to its longest sequence; in public samples in batches of four, two fifths of the positions
are padding. Here the decoder gets the tokens alone. Inputs and outputs keep their shapes, so TRL's losses and metrics
are unchanged, and so is what a step learns from.

    batch (B, L)        row (1, T)
    a b c .             a b c d e f g
    d e f g             0 1 2 0 1 2 3       positions

The two sequences of a preference pair begin with the same prompt. It is computed once: attention is causal, so the
prompt does not depend on the answers. The rejected answer attends to the chosen one's prompt and to itself.

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

# Those that tests/speed/test_padding_free.py compares with padded batches. All others stay padded.
FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
ATTENTION = "sdpa_by_sequence"


class Segment(NamedTuple):
    """Tokens `start` to `stop` of the row: a sequence, or what follows the prefix it shares with an earlier sequence.

    They attend to each other and to the prefix, tokens `prefix_start` to `prefix_stop`.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


class FlatBatch:
    """A batch of (B, L) token ids as a row of T tokens. (Not a dataclass: FSDP2 would copy one for every layer.)"""

    def __init__(
        self, batch_index: torch.Tensor, positions: torch.Tensor, row_index: torch.Tensor, segments: list[Segment]
    ) -> None:
        self.batch_index = batch_index  # (T,) int64: where each token of the row stands in the flattened batch
        self.positions = positions  # (1, T) int64: in their sequences
        self.row_index = row_index  # (B L,) int64: where each of the flattened batch stands in the row; padding: 0
        self.segments = segments
        self.masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, segment: Segment, window: int | None) -> torch.Tensor | None:
        """Return which tokens of the prefix and the segment each token of the segment attends to.

        The mask is (segment, prefix + segment) bool, made once for each size; None if it is plainly causal, for which
        SDPA needs none. `window` is the size of a sliding window in tokens.
        """
        size, before = segment.stop - segment.start, segment.prefix_stop - segment.prefix_start
        if window is not None and window >= before + size:
            window = None
        if not before and window is None:
            return None
        if (size, before, window) not in self.masks:
            mask = torch.ones(size, before + size, dtype=torch.bool, device=self.batch_index.device).tril(before)
            self.masks[size, before, window] = mask if window is None else mask.triu(before - window + 1)
        return self.masks[size, before, window]


def flatten_batch(input_ids: torch.Tensor, attention_mask: torch.Tensor, pairs: bool) -> FlatBatch | None:
    """Return a batch, (B, L) each, as a row. With `pairs`, sequences i and i + B/2 are a pair.

    Returns None unless all padding is at the ends of the sequences.
    """
    device, (size, length) = input_ids.device, input_ids.shape
    # Copy once: on a GPU each step below would wait for the device.
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()
    offsets = torch.arange(length).expand(size, length)
    lengths = attention_mask.sum(1)
    real = offsets < lengths[:, None]
    if not torch.equal(real, attention_mask.bool()):
        return None
    shared, half = torch.zeros_like(lengths), size // 2
    if pairs:
        alike = (input_ids[:half] == input_ids[half:]) & real[:half] & real[half:]
        shared[half:] = alike.long().cumprod(1).sum(1)
    own = real & (offsets >= shared[:, None])
    row_index = (own.flatten().cumsum(0) - 1).view(size, length)
    if pairs:
        row_index[half:] = torch.where(own[half:], row_index[half:], row_index[:half])
    row_index = row_index.masked_fill(~real, 0)
    stops = (lengths - shared).cumsum(0)
    starts = stops - (lengths - shared)
    prefix_starts = torch.where(shared > 0, starts.roll(half), 0)
    bounds = torch.stack([starts, stops, prefix_starts, prefix_starts + shared], dim=1).tolist()
    segments = [Segment(*each) for each in bounds if each[0] < each[1]]
    batch_index, positions = own.flatten().nonzero().squeeze(1), offsets[own][None]
    return FlatBatch(batch_index.to(device), positions.to(device), row_index.flatten().to(device), segments)


def attend_by_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    flat_batch: FlatBatch | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' SDPA attention segment by segment; without a `flat_batch` (generation) as it is.

    `query`, `key`, `value`: (1, heads, T, head size). Returns (1, T, heads, head size).
    """
    if flat_batch is None:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attended = []
    for segment in flat_batch.segments:
        own, prefix = slice(segment.start, segment.stop), slice(segment.prefix_start, segment.prefix_stop)
        keys, values = key[:, :, own], value[:, :, own]
        if segment.prefix_stop:
            keys, values = (torch.cat([whole[:, :, prefix], whole[:, :, own]], dim=2) for whole in (key, value))
        mask = flat_batch.mask(segment, sliding_window)
        kwargs["is_causal"] = mask is None
        attended.append(sdpa_attention_forward(module, query[:, :, own], keys, values, mask, **kwargs)[0])
    return torch.cat(attended, dim=1), None


AttentionInterface.register(ATTENTION, attend_by_sequence)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def can_remove_padding(model: PreTrainedModel) -> bool:
    """Tell whether the model is of one of `FAMILIES`, with causal SDPA attention."""
    config = model.config
    return (
        config.model_type in FAMILIES
        and config._attn_implementation in ("sdpa", ATTENTION)
        and not getattr(config, "use_bidirectional_attention", False)
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def why_padded(model: PreTrainedModel, args: TrainingArguments) -> str | None:
    """Return what forces a training with `args` to use padded batches; None if nothing does."""
    if args.torch_compile:
        return "torch_compile"  # it cannot compile the loop over segments
    if getattr(args, "neftune_noise_alpha", None):
        return "neftune_noise_alpha"  # the length of a batch's rows scales its noise
    if not can_remove_padding(model):
        return f"{model.config.model_type}, {model.config._attn_implementation} attention"
    return None


def remove_padding(model: PreTrainedModel, pairs: bool) -> bool:
    """Make `model`'s decoder skip padding and, with `pairs`, compute shared prompts once. Returns whether it can.

    Call it before the model is wrapped. Batches with positions, a cache or padding elsewhere than at the ends are
    computed as before.
    """
    if not can_remove_padding(model):
        return False
    config, decoder = model.config, model.base_model
    padded_forward = type(decoder).forward

    @functools.wraps(padded_forward)
    def forward(self: PreTrainedModel, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        others = ("position_ids", "past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions")
        plain = input_ids is not None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        plain &= kwargs.get("use_cache") is False and all(kwargs.get(name) is None for name in others)
        flat = flatten_batch(input_ids, attention_mask, pairs and len(input_ids) % 2 == 0) if plain else None
        if flat is None:
            return padded_forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs = padded_forward(
            self,
            input_ids=input_ids.flatten()[flat.batch_index][None],
            # transformers uses a 4D mask as it is. Without one it would make its own, of (T, T).
            attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),
            position_ids=flat.positions,
            flat_batch=flat,
            **kwargs,
        )
        (hidden,) = outputs.last_hidden_state
        # The values at padded positions do not matter.
        outputs.last_hidden_state = hidden.index_select(0, flat.row_index).view(*input_ids.shape, -1)
        return outputs

    decoder.forward = types.MethodType(forward, decoder)
    config._attn_implementation = ATTENTION
    return True
