"""What would fail without a word: dropped masks, lost packing, towers of a VLM, adapters on a wrong base."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from hf_attn.call import AttentionCall
from hf_attn.integrations.transformers.attention import watching
from hf_attn.integrations.transformers.config import PREFIX, mechanism_of
from hf_attn.integrations.transformers.model import implementations


def base_model(target: Any) -> Any:
    """The transformers model inside a PEFT model; anything else as it is."""
    return target.get_base_model() if hasattr(target, "get_base_model") else target


def wrong_towers(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Sub-configs that got the mechanism because a plain string goes to all of them."""
    found = implementations(model.config)
    if "text_config" not in found:
        return
    wanted = (model.config.hf_attn or {}).get("targets") or ["", "text_config"]
    hit = [target for target, impl in found.items() if mechanism_of(impl) and target not in wanted]
    if hit:
        yield (
            f"{PREFIX}{name} is also set on {', '.join(hit)}: a plain attn_implementation string goes to every tower. "
            f'Load with attn_implementation={{"text_config": "{PREFIX}{name}"}}, or call hf_attn.apply(model, '
            f"{name!r}, ...), which takes the text model only; set the others back with "
            f"model.set_attn_implementation({{{hit[0]!r}: 'sdpa'}})"
        )


def wrong_base(target: Any, model: PreTrainedModel) -> Iterator[str]:
    """Adapters that were trained on another base than the one they sit on."""
    for adapter, config in (getattr(target, "peft_config", None) or {}).items():
        trained_on, here = getattr(config, "base_model_name_or_path", None), model.config._name_or_path
        if not trained_on or not here or _same(trained_on, here):
            continue
        theirs = (_saved_options(trained_on) or {}).get("mechanism")
        ours = (model.config.hf_attn or {}).get("mechanism")
        about = f", which uses {theirs!r} while this model uses {ours!r}" if theirs != ours else ""
        yield (
            f"adapter {adapter!r} was trained on {trained_on!r}{about}, but sits on {here!r}; load "
            f"{trained_on!r} first and put the adapter on it"
        )


def _same(a: str, b: str) -> bool:
    return a == b or (Path(a).is_dir() and Path(b).is_dir() and Path(a).resolve() == Path(b).resolve())


def _saved_options(folder: str) -> dict[str, Any] | None:
    """`config.hf_attn` of a checkpoint in a local folder; the Hub is not asked."""
    file = Path(folder) / "config.json"
    return json.loads(file.read_text()).get("hf_attn") if file.is_file() else None


def dropped_masks(model: PreTrainedModel, name: str, ids: Tensor) -> Iterator[str]:
    """Layers that see padding as text, from one left-padded forward."""
    mask = torch.ones_like(ids)
    mask[:, : ids.shape[1] // 4] = 0
    layers = [call.layer.index for call in _calls(model, ids, attention_mask=mask) if call.tokens.is_plain]
    if layers:
        yield (
            f"padding does not reach {PREFIX}{name} in layers {layers}: {type(model).__name__} drops attention_mask on "
            "the way, and padded batches would be wrong; feed rows of one length, or use attn_implementation='sdpa'"
        )


def lost_packing(model: PreTrainedModel, ids: Tensor) -> str | None:
    """What to do when a packed row would lose its borders under the model's own settings, else `None`."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters or ids.shape[1] < 4:
        return None
    half = ids.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None].to(ids.device)
    calls = _calls(model, ids, position_ids=positions)
    if not any(call.tokens.is_plain for call in calls):
        return None
    return (
        "packed rows lose their borders with use_cache=True (the default of this model) or with an attention_mask: "
        "train with use_cache=False and without a mask, hf_attn.training.packing.keep_packing(trainer) does both"
    )


def _calls(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> list[AttentionCall]:
    """The attention calls of one forward in eval mode; none when the model does not take these inputs."""
    seen: list[AttentionCall] = []
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), warnings.catch_warnings(), watching(lambda call, resolved, reason: seen.append(call)):
            warnings.simplefilter("ignore")
            model(input_ids=ids, **inputs)
    except Exception:
        return []
    finally:
        _restore(flags)
    return seen


def _restore(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training
