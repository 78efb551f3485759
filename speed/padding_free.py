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

The data loader flattens a batch while it still is on the host, where that waits for nothing (`flatten_while_loading`).
Attention goes through the row sequence by sequence, or through the padded batch at once where a GPU is quicker that
way; all other layers compute the row.

Upstream: SFTTrainer's own `padding_free` (TRL 1.16) needs a FlashAttention package, or computes a (T, T) mask on a CPU,
and DPOTrainer's is switched off. This can go once both work with SDPA.
"""

import functools
import types
from collections.abc import Callable
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
    """A batch of (B, L) token ids as a row of T tokens. (Not a dataclass: FSDP2 would copy one for every layer.)

    Data loaders pin it and send it to the device as they do tensors.
    """

    def __init__(
        self, batch_index: torch.Tensor, positions: torch.Tensor, row_index: torch.Tensor, segments: list[Segment]
    ) -> None:
        self.batch_index = batch_index  # (T,) int64: where each token of the row stands in the flattened batch
        self.positions = positions  # (1, T) int64: in their sequences
        self.row_index = row_index  # (B, L) int64: where each of the batch stands in the row; padding: any token
        self.segments = segments
        self.masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "FlatBatch":
        """Return the batch on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "FlatBatch":
        """Return the batch in memory from which a GPU copies while the host goes on."""
        return self._with_each(torch.Tensor.pin_memory)

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "FlatBatch":
        return FlatBatch(change(self.batch_index), change(self.positions), change(self.row_index), self.segments)

    @functools.cached_property
    def at_once_width(self) -> float:
        """Up to which width (heads x head size) a GPU attends quicker to the padded batch at once than by segment.

        Computed for an H100, not measured: for each segment a layer launches about 10 kernels of 6 microseconds,
        forward and backward; at once, as many as for two segments, to gather and to attend. A query and a key cost 14
        operations for each unit of width (4 forward, 10 backward), of which it does 2e14 a second. It is 0 where the
        batch has more than twice the row's tokens, as their copies are not in the estimate of memory.
        """
        size, length = self.row_index.shape
        sizes = [each.stop - each.start for each in self.segments]
        if len(sizes) <= 2 or size * length > 2 * sum(sizes):
            return 0
        by_segment = [n * (n / 2 + s.prefix_stop - s.prefix_start) for n, s in zip(sizes, self.segments, strict=True)]
        extra = size * length**2 / 2 - sum(by_segment)
        return (len(sizes) - 2) * 10 * 6e-6 * 2e14 / (14 * max(extra, 1))

    def mask(self, segment: Segment, window: int | None) -> torch.Tensor | None:
        """Return which tokens of the prefix and the segment each token of the segment attends to.

        The mask is (1, 1, segment, prefix + segment) bool, made once for each size; None if it is plainly causal, for
        which SDPA needs none. `window` is the size of a sliding window in tokens.
        """
        size, before = segment.stop - segment.start, segment.prefix_stop - segment.prefix_start
        if window is not None and window >= before + size:
            window = None
        if not before and window is None:
            return None
        if (size, before, window) not in self.masks:
            mask = torch.ones(1, 1, size, before + size, dtype=torch.bool, device=self.batch_index.device).tril(before)
            self.masks[size, before, window] = mask if window is None else mask.triu(before - window + 1)
        return self.masks[size, before, window]


def flatten_batch(input_ids: torch.Tensor, attention_mask: torch.Tensor, pairs: bool) -> FlatBatch | None:
    """Return a batch, (B, L) each, as a row. With `pairs`, sequences i and i + B/2 are a pair.

    Returns None unless all padding is at the ends of the sequences.
    """
    device, (size, length) = input_ids.device, input_ids.shape
    # Copy once: on a GPU each step below would wait for the device. A data loader's batch is on the CPU.
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
    row_index = row_index.clamp(min=0)  # only padding before the first token is below
    stops = (lengths - shared).cumsum(0)
    starts = stops - (lengths - shared)
    prefix_starts = torch.where(shared > 0, starts.roll(half), 0)
    bounds = torch.stack([starts, stops, prefix_starts, prefix_starts + shared], dim=1).tolist()
    segments = [Segment(*each) for each in bounds if each[0] < each[1]]
    batch_index, positions = own.flatten().nonzero().squeeze(1), offsets[own][None]
    return FlatBatch(batch_index, positions, row_index, segments).to(device)


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

    `query`, `key`, `value`: (1, heads, T, head size). Returns (1, T, heads, head size). A GPU attends at once where
    that is quicker.
    """
    if flat_batch is None:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.is_cuda:
        # A kernel with a mask computes what it hides, too, at about half the speed.
        masked = sliding_window is not None and sliding_window < flat_batch.row_index.shape[1]
        if query.shape[1] * query.shape[3] * (4 if masked else 1) <= flat_batch.at_once_width:
            return attend_at_once(module, query, key, value, attention_mask, flat_batch, sliding_window, **kwargs)
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


def attend_at_once(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    flat_batch: FlatBatch,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute what `attend_by_sequence` does, with one SDPA over the padded batch, (B, heads, L, head size).

    No token sees the padding, which comes after it, and what the padding gets is left out: its gradients are 0. The
    prompt of a pair is attended to twice.
    """
    shape = flat_batch.row_index.shape
    query, key, value = (
        row[0].transpose(0, 1).index_select(0, flat_batch.row_index.flatten()).unflatten(0, shape).transpose(1, 2)
        for row in (query, key, value)
    )
    mask = flat_batch.mask(Segment(0, shape[1]), sliding_window)
    kwargs["is_causal"] = mask is None
    attended, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return attended.flatten(0, 1).index_select(0, flat_batch.batch_index)[None], None


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
    computed as before. A batch that comes without its `flat_batch` is flattened here.
    """
    if not can_remove_padding(model):
        return False
    config, decoder = model.config, model.base_model
    padded_forward = type(decoder).forward

    @functools.wraps(padded_forward)
    def forward(
        self: PreTrainedModel,
        input_ids: Any = None,
        attention_mask: Any = None,
        flat_batch: FlatBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        others = ("position_ids", "past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions")
        plain = input_ids is not None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        plain &= kwargs.get("use_cache") is False and all(kwargs.get(name) is None for name in others)
        if plain and flat_batch is None:
            flat_batch = flatten_batch(input_ids, attention_mask, pairs and len(input_ids) % 2 == 0)
        if not plain or flat_batch is None:
            return padded_forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kwargs.pop("position_ids", None)
        outputs = padded_forward(
            self,
            input_ids=input_ids.flatten()[flat_batch.batch_index][None],
            # transformers uses a 4D mask as it is. Without one it would make its own, of (T, T).
            attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),
            position_ids=flat_batch.positions,
            flat_batch=flat_batch,
            **kwargs,
        )
        (hidden,) = outputs.last_hidden_state
        # The values at padded positions do not matter.
        outputs.last_hidden_state = hidden.index_select(0, flat_batch.row_index.flatten()).view(*input_ids.shape, -1)
        return outputs

    decoder.forward = types.MethodType(forward, decoder)
    config._attn_implementation = ATTENTION
    return True


def flatten_while_loading(trainer: Any, pairs: bool) -> None:
    """Have `trainer`'s data collator flatten each batch, if its model skips padding; the model then gets `flat_batch`.

    Otherwise the model reads each batch back from a GPU, and for that waits until the last step is done. Where one
    process loads the batches of all ranks that stays so: accelerate can share out nothing but tensors.
    """
    if trainer.model.config._attn_implementation == ATTENTION and not trainer.accelerator.dispatch_batches:
        trainer.data_collator = functools.partial(collate_flat, trainer.data_collator, pairs)


def collate_flat(collate: Callable[[list], dict[str, Any]], pairs: bool, rows: list) -> dict[str, Any]:
    """Return the batch that `collate` makes of `rows`, with its `flat_batch` if it has one."""
    batch = collate(rows)
    mask = batch.get("attention_mask")  # packed rows have none
    flat = None if mask is None else flatten_batch(batch["input_ids"], mask, pairs)
    return batch if flat is None else batch | {"flat_batch": flat}
