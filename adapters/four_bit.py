"""Round weights to 4 bits and back, as QLoRA's adapters saw them in training, on any machine."""

import logging

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# What NF4 takes of a weight: 4 bits, a scale of 8 bits for 64 weights, and a float32 one for 256 such scales.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def count_weights(parameter: torch.Tensor) -> int:
    """Return how many weights a parameter has; bitsandbytes packs two of 4 bits into a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def round_to_4bit(model: PreTrainedModel) -> None:
    """Round the linear layers of a model's decoder to NF4; the weights keep their type, and their new values.

    An adapter that was trained on rounded weights makes up for their error as well. Without bitsandbytes the weights
    stay as they are, with a warning.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        logger.warning("without bitsandbytes the base is taken unrounded: answers differ a little from training's")
        return
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            # From bf16, as in training, where the scales are quantized too (config/lora.py).
            rounded, state = quantize_4bit(module.weight.data.bfloat16(), quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(rounded, state).to(module.weight.dtype)
