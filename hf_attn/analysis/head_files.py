"""Head classes on disk: a safetensors file, a folder for the Hub, and DuoAttention's own format."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_attn.analysis.head_classes import HeadCalibration
from hf_attn.checks import refuse_existing
from hf_attn.integrations.hub.names import hub_id
from hf_attn.mechanism import parse_config
from hf_attn.mechanisms.lserve import classify_heads

FILE = "lserve_heads.safetensors"
_FORMAT = "hf_attn.lserve_heads"


def retrieval_heads(found: HeadCalibration, static_sparsity: float) -> Tensor:
    """Bool `[layers, Hkv]`, True = retrieval: `classify_heads` over the layers that were measured, True elsewhere."""
    measured = found.gates.isfinite().all(-1)
    retrieval = torch.ones(found.gates.shape, dtype=torch.bool)
    retrieval[measured] = classify_heads(found.gates[measured], static_sparsity)
    return retrieval


def lserve_options(found: HeadCalibration, static_sparsity: float, **options: Any) -> dict[str, Any]:
    """Options for `hf_attn.apply(model, "lserve", ...)`: the gates and the share of streaming heads.

    Where some layers could not be measured the classes themselves are given, as a share over all heads would count
    those layers. Scales, where measured, come along as `kv_scales`; `options` are added as they are.
    """
    made: dict[str, Any] = {"static_sparsity": static_sparsity}
    if bool(found.gates.isfinite().all()):
        # Nine digits are what a float32 needs to come back as it was.
        made["gates"] = [[float(f"{x:.9g}") for x in row] for row in found.gates.clamp(0, 1).tolist()]
    else:
        made["heads"] = retrieval_heads(found, static_sparsity).int().tolist()
    if found.kv_scales is not None:
        made["kv_scales"] = [[float(f"{x:.9g}") for x in row] for row in found.kv_scales.tolist()]
    return {**made, **options}


def save_heads(file: str | Path, found: HeadCalibration, static_sparsity: float) -> None:
    """Write gates, classes at `static_sparsity` and scales to one safetensors file."""
    tensors = {"gates": found.gates, "retrieval": retrieval_heads(found, static_sparsity).to(torch.uint8)}
    if found.kv_scales is not None:
        tensors["kv_scales"] = found.kv_scales
    numbers = {name: str(getattr(found, name)) for name in ("sink", "local", "tokens")}
    metadata = {"format": _FORMAT, "method": found.method, "static_sparsity": str(static_sparsity), **numbers}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)


def load_heads(file: str | Path) -> HeadCalibration:
    """Read what `save_heads` wrote; `file` may be the folder. Raises OSError, or ValueError for another file."""
    file = Path(file)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise OSError(f"no such file: {file}")
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{file} holds no head classes of hf-attn (format {metadata.get('format')!r})")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    numbers = {name: int(metadata[name]) for name in ("sink", "local", "tokens")}
    return HeadCalibration(tensors["gates"], tensors.get("kv_scales"), metadata["method"], **numbers)


def save_duo_heads(folder: str | Path, found: HeadCalibration) -> None:
    """Write DuoAttention's format, which `hf_attn.load_duo_heads` reads: gates in a table, sizes in config.json.

    Layers that were not measured are written as retrieval (1). Raises FileExistsError rather than overwrite.
    """
    folder = Path(folder)
    with new_folder(folder) as partial:
        rows = [[f"{x:.9g}" for x in row] for row in found.gates.nan_to_num(nan=1.0).tolist()]
        (partial / "full_attention_heads.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
        sizes = {"sink_size": found.sink, "recent_size": found.local}
        (partial / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside `folder` and in its place only when all went well; an interruption leaves nothing.

    Raises FileExistsError when `folder` exists and holds anything.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        # mkdtemp makes folders for one user alone.
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save_head_folder(
    folder: str | Path,
    found: HeadCalibration,
    config: Any,
    *,
    static_sparsity: float = 0.5,
    base_model: str | None = None,
    license: str = "other",
    options: dict[str, Any] | None = None,
    weights: tuple[Any, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Write a folder ready for the Hub: config.json with the block `hf_attn`, the heads file and a model card.

    Args:
        folder: must not exist, or be empty.
        config: the base model's.
        base_model: its Hub id for the card; None (or a path) leaves it out.
        license: of the base model, as the Hub spells it.
        options: more options of LServe for the config.
        weights: (model, tokenizer) to save as well; the folder is then a checkpoint of its own.
        metrics: for the card, "perplexity" and "perplexity dense".

    Raises FileExistsError for a folder that holds anything, ValueError for options that do not fit the model. An
    interruption leaves no folder behind.
    """
    block = {"mechanism": "lserve", **lserve_options(found, static_sparsity, **(options or {}))}
    parsed = parse_config(block)[1]
    text = config.get_text_config()
    parsed.check_layer_count(text.num_hidden_layers)
    with new_folder(Path(folder)) as partial:
        save_heads(partial / FILE, found, static_sparsity)
        if weights is None:
            config = copy.deepcopy(config)
            config.hf_attn = block
            # transformers writes where the model was loaded from; a folder of this machine means nothing elsewhere.
            config._name_or_path = hub_id(base_model) or ""
            config.save_pretrained(partial)
        else:
            _save_weights(partial, *weights, block)
        _card(partial / "README.md", found, static_sparsity, base_model, license, weights is not None, metrics or {})


def _save_weights(folder: Path, model: Any, tokenizer: Any, block: dict[str, Any]) -> None:
    before = copy.deepcopy(model.config.hf_attn)
    try:
        model.config.hf_attn = block
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        model.config.hf_attn = before


_METHODS = {
    "mass": "Each head's value is the mean attention weight that it puts outside the first and the recent tokens, "
    "measured with the dense model on text. Heads with the smallest values stream.",
    "gates": "Each head's value is a gate trained by distillation (DuoAttention, "
    "[arXiv 2410.10819](https://arxiv.org/abs/2410.10819)) on passkeys hidden in text. Heads with the smallest gates "
    "stream.",
    "duo": "Each head's value is a gate of a DuoAttention folder "
    "([arXiv 2410.10819](https://arxiv.org/abs/2410.10819)). Heads with the smallest gates stream.",
}


def _card(
    file: Path,
    found: HeadCalibration,
    static_sparsity: float,
    base_model: str | None,
    license: str,
    weights: bool,
    metrics: dict[str, float],
) -> None:
    from hf_attn.integrations.hub.cards import write_card

    repository = hub_id(base_model)
    retrieval = retrieval_heads(found, static_sparsity)
    kept = found.gates[retrieval & found.gates.isfinite()]
    data = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf-attn", "lserve"],
        "base_model": repository,
        "hf_attn": {"mechanism": "lserve"},
    }
    scales = found.kv_scales is not None
    write_card(
        file,
        "lserve_heads",
        data,
        title=f"LServe heads of {repository or 'a causal language model'}",
        base_text=f"[{repository}](https://huggingface.co/{repository})" if repository else "not on the Hub.",
        heads=retrieval.numel(),
        streaming=int((~retrieval).sum()),
        usage=_usage(repository, weights),
        value_name="attention mass" if found.method == "mass" else "gate",
        method=found.method,
        method_text=_METHODS[found.method],
        sink=found.sink,
        local=found.local,
        tokens=found.tokens or "not known",
        static_sparsity=static_sparsity,
        threshold=f"{float(kept.min()):.4g}" if kept.numel() else "none retrieves",
        scales="yes" if scales else "no",
        scales_file=", `kv_scales` fp32 `[layers, 2]` (keys, values)" if scales else "",
        weights_file="- `model.safetensors` and the tokenizer: the base model's, unchanged." if weights else "",
        metrics=_metrics(metrics),
    )


def _usage(repository: str | None, weights: bool) -> str:
    lines = ["import hf_attn"]
    if weights:
        return "\n".join(
            [*lines, "from transformers import AutoModelForCausalLM", "",
             'model = AutoModelForCausalLM.from_pretrained("this-repository")']
        )  # fmt: skip
    base = repository or "the-base-model"
    return "\n".join(
        [*lines, "from transformers import AutoConfig, AutoModelForCausalLM", "",
         'config = AutoConfig.from_pretrained("this-repository")',
         f'model = AutoModelForCausalLM.from_pretrained("{base}", config=config)']
    )  # fmt: skip


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"## Measured\n\n| | |\n|---|---|\n{rows}"
