"""Round weights to 4 bits and back, as QLoRA's adapters saw them in training, on any machine."""

import torch
from transformers import PreTrainedModel

from errors import UserError

# What NF4 takes of a weight: 4 bits, a scale of 8 bits for 64 weights, and a float32 one for 256 such scales.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def count_weights(parameter: torch.Tensor) -> int:
    """Return how many weights a parameter has; bitsandbytes packs two of 4 bits into a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def round_to_4bit(model: PreTrainedModel, held_in: torch.dtype) -> None:
    """Round the linear layers of a model's decoder to NF4; the weights keep their type, and their new values.

    An adapter that was trained on rounded weights makes up for their error as well. `held_in` is the type that they
    had before they were rounded in its training. Raises `UserError` without bitsandbytes.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        needed = "pip install 'bitsandbytes>=0.46', or add it to requirements.txt"
        raise UserError(f"its adapter was trained on weights of 4 bits, which needs a package: {needed}") from None
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            # As in training (config/lora.py), where the scales are quantized, too.
            rounded, state = quantize_4bit(module.weight.data.to(held_in), quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(rounded, state).to(module.weight.dtype)
