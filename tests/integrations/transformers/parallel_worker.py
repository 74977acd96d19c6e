"""One of two gloo processes: tensor parallelism and an FSDP2 training step beside one process; rank 0 prints JSON."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.integrations.transformers.modes import EQUAL, SPARSE, sparse
from tests.integrations.transformers.tiny import tokens


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach() - want.detach()).abs().max())


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :4] = 0
    return tokens(2, 23), mask


def tensor_parallel(name: str, folder: str) -> dict[str, float]:
    """Logits and greedy tokens of a model whose heads are split over two processes."""
    from transformers.distributed import DistributedConfig

    options = {"attn_implementation": f"hf_attn_{name}", "hf_attn": {"mechanism": name, **SPARSE[name]}}
    whole = AutoModelForCausalLM.from_pretrained(folder, **options)
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), **options)
    heads = []
    attention = split.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda module, args, out: heads.append(out.shape[-1] // attention.head_dim))
    ids, mask = inputs()
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask).logits for model in (split, whole))
    greedy = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    same = torch.equal(split.generate(ids, **greedy), whole.generate(ids, **greedy))
    return {
        "logits": distance(got[mask.bool()], want[mask.bool()]),
        "tokens differ": float(not same),
        "heads": heads[0],
    }


def sharded_step(name: str) -> dict[str, float]:
    """Loss and first-layer gradient of one FSDP2 step, both ranks on the same batch, against one process."""
    whole, shard = sparse(name).train(), sparse(name).train()
    for layer in shard.model.layers:
        fully_shard(layer)
    fully_shard(shard)
    ids, mask = inputs()
    labels = ids.masked_fill(mask == 0, -100)
    found = {}
    for kind, model in (("whole", whole), ("shard", shard)):
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        grad = model.model.layers[0].self_attn.k_proj.weight.grad
        found[kind] = loss, grad.full_tensor() if kind == "shard" else grad
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {
        "loss": distance(found["shard"][0], found["whole"][0]),
        "grad": distance(found["shard"][1], found["whole"][1]),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict] = {}
    for name in EQUAL:
        results[f"tensor {name}"] = tensor_parallel(name, folder)
        results[f"fsdp {name}"] = sharded_step(name)
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_ATTN_BACKEND"] = "torch"
    main(sys.argv[1])
