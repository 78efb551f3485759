"""Run on two ranks by test_compiled_layers.py: train compiled and eager layers alike, and print the graphs compiled."""

import functools
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from test_padding_free import batch, make  # noqa: E402  (found by the line above)
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from speed.compiled_layers import compile_layers  # noqa: E402
from speed.memory import decoder_layers  # noqa: E402
from speed.padding_free import remove_padding  # noqa: E402


def shard(model, how):
    layers = decoder_layers(model)
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp1":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def train(how, every, cache):
    losses = {}
    for name in ("eager", "compiled"):
        model = make("gemma")
        remove_padding(model, pairs=True)
        add_fused_lm_head(model)
        if name == "compiled":
            compile_layers(model, Path(cache))
        if every:
            model.activation_checkpointing_enable(every_n_layers=every)
        model = shard(model, how)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[name] = []
        for lengths in ((30, 12, 21, 30), (9, 22, 14, 11), (25, 25, 25, 25)):
            mine = [length - distributed.get_rank() for length in lengths]
            loss = -model(**batch(mine, prompts=(4, 5)), fused_lm_head=True).log_probs.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    torch.testing.assert_close(losses["compiled"], losses["eager"], rtol=1e-5, atol=0)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for how, every in (("ddp", 0), ("fsdp1", 2), ("fsdp2", 1)):
        train(how, every, sys.argv[1])
        if distributed.get_rank() == 0:
            print(how, torch._dynamo.utils.counters["stats"].pop("unique_graphs"))
        torch.compiler.reset()
    distributed.destroy_process_group()
