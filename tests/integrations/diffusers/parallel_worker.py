"""One of two processes under Ulysses context parallelism; compares with the model alone and prints "ok".

Arguments: rank, world size, rendezvous file.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

import hf_attn
from hf_attn.mechanism import observe
from tests.integrations.diffusers.tiny import BAND, SMALL, build

warnings.simplefilter("ignore")


def inputs_of(tiny):
    """Arguments of the model's first call in a run."""
    seen = []
    handle = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    tiny.run(**({"height": 32, "width": 64} if tiny.model.__class__.__name__.startswith("Wan") else {}))
    handle.remove()
    return {**seen[0], "return_dict": False}


def parallelise(model, config):
    """What `enable_parallelism` does, without asking for an accelerator."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)


def check(name, density, rank, ranks, train=False):
    tiny = build(name)
    kwargs = inputs_of(tiny)
    hf_attn.apply(tiny.model, "band", density=density, **SMALL)
    if train:
        alone = _gradient(tiny.model, kwargs)
    else:
        with torch.no_grad():
            alone = tiny.model(**kwargs)[0]
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, ranks), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ranks))
    config.setup(rank, ranks, torch.device("cpu"), mesh=mesh)
    parallelise(tiny.model, config)
    seen = []
    with observe(lambda mechanism, call, options: seen.append(call)):
        if train:
            together = _gradient(tiny.model, kwargs)
        else:
            with torch.no_grad():
                together = tiny.model(**kwargs)[0]
    assert seen and all(call.layer.head_offset == rank * call.query.shape[1] for call in seen)
    assert all(call.query.shape[1] == 2 // ranks for call in seen), seen[0].query.shape
    difference = (together - alone).abs().max().item()
    assert difference <= 2e-6 * max(alone.abs().max().item(), 1.0), (name, density, difference)
    assert hf_attn.stats(tiny.model)["totals"]["fallbacks"] == 0


def _gradient(model, kwargs):
    latent = kwargs["hidden_states"].detach().clone().requires_grad_()
    model(**{**kwargs, "hidden_states": latent})[0].square().sum().backward()
    total = latent.grad.clone()
    return total


def main() -> None:
    rank, ranks, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    hf_attn.register_mechanism(BAND)
    for name in ("wan", "flux"):
        for density in (1.0, 0.3):
            check(name, density, rank, ranks)
    print("ok")
    dist.destroy_process_group()


main()
