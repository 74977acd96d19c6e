"""`hf-attn calibrate MECHANISM MODEL`: measure what a mechanism needs, and write a folder for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from transformers.utils import logging as hf_logging

import hf_attn
from hf_attn.analysis.head_classes import HeadCalibration
from hf_attn.analysis.head_files import (
    load_heads,
    retrieval_heads,
    save_duo_heads,
    save_head_folder,
)
from hf_attn.analysis.texts import read_texts, token_windows
from hf_attn.bench.head_classes import perplexity
from hf_attn.bench.models import SMOLLM2, load_language_model
from hf_attn.checks import refuse_existing
from hf_attn.cli.common import console, one_clear_line, parse_options, progress_line

calibrate = typer.Typer(no_args_is_help=True)


@calibrate.callback()
def _group() -> None:
    """Measure what a mechanism needs on real text or in real generations; write a folder for the Hub. No training.

    Example: `hf-attn calibrate lserve HuggingFaceTB/SmolLM2-135M-Instruct --output heads`
    """


@calibrate.command("lserve")
def lserve(
    model_name: str = typer.Argument(None, metavar="[MODEL]", help="Hub id, folder or .gguf; default SmolLM2-135M."),
    output: Path = typer.Option(..., "--output", help="New folder: config.json, lserve_heads.safetensors, README.md."),
    sparsity: float = typer.Option(0.5, min=0, max=1, help="Share of streaming KV heads over the whole model."),
    sink: int = typer.Option(64, min=0, help="First tokens a streaming head sees."),
    local: int = typer.Option(256, min=1, help="Recent tokens a streaming head sees."),
    tokens: int = typer.Option(8192, min=1, help="Tokens of text to read."),
    length: int = typer.Option(2048, min=1, help="Tokens of one row."),
    batch_size: int = typer.Option(1, min=1, help="Rows at a time."),
    text: list[Path] = typer.Option([], "--text", help="UTF-8 file; may be repeated. Default: Python's reference."),
    kv_scales: bool = typer.Option(False, "--kv-scales", help="Also measure the scales of a per-tensor int8 cache."),
    gates: Path = typer.Option(None, help="Take the gates of this folder (ours or DuoAttention's) instead."),
    evaluate: bool = typer.Option(False, "--evaluate", help="Measure perplexity on text that was not read before."),
    with_weights: bool = typer.Option(False, "--with-weights", help="Save model and tokenizer too."),
    duo: Path = typer.Option(None, help="Also write DuoAttention's format to this new folder."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE of lserve for the config; repeatable."),
    base_model: str = typer.Option(None, help="Hub id for the card, where MODEL is not one."),
    license: str = typer.Option(None, help="Licence of the base model, as the Hub spells it."),
) -> None:
    """Find out which KV heads look far back, and write a folder for the Hub.

    Example: `hf-attn calibrate lserve HuggingFaceTB/SmolLM2-135M-Instruct --output heads --sparsity 0.25`
    """
    with one_clear_line():
        options = {**_windows(sink, local), **parse_options(option)}
        hf_attn.spec("lserve", static_sparsity=sparsity, **options)
        refuse_existing(output)
        if duo is not None:
            refuse_existing(duo)
        if gates is not None and kv_scales:
            raise ValueError("--kv-scales needs a measurement, so it does not go together with --gates")
        texts = read_texts(text)
        hf_logging.disable_progress_bar()
        if gates is not None and not (evaluate or with_weights):
            model, tokenizer, config = None, None, _config(model_name)
        else:
            model, tokenizer = load_language_model(model_name)
            config = model.config
        if gates is not None:
            found = _read_gates(gates)
        else:
            with progress_line("calibrate") as progress:
                found = hf_attn.calibrate(
                    model,
                    "lserve",
                    tokenizer=tokenizer,
                    texts=texts,
                    sink=sink,
                    local=local,
                    tokens=tokens,
                    length=length,
                    batch_size=batch_size,
                    kv_scales=kv_scales,
                    progress=progress,
                )
        metrics = _evaluate(model, tokenizer, texts, found, sparsity, sink, local, length) if evaluate else {}
        save_head_folder(
            output,
            found,
            config,
            static_sparsity=sparsity,
            base_model=base_model or model_name or SMOLLM2,
            license=license or ("other" if model_name else "apache-2.0"),
            options=options,
            weights=(model, tokenizer) if with_weights else None,
            metrics=metrics,
        )
        if duo is not None:
            save_duo_heads(duo, found)
        _report(output, found, sparsity, metrics)


@calibrate.command("paro")
def paro(
    pipeline: str = typer.Argument(..., help="Hub id or folder of a diffusers pipeline."),
    output: Path = typer.Option(..., "--output", help="New folder for the plan."),
    prompt: list[str] = typer.Option([], "--prompt", help="A prompt of a generation; repeat it for more."),
    size: str = typer.Option(..., "--size", help="HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES: a plan fits this size only."),
    steps: int = typer.Option(30, min=1, help="Denoising steps."),
    density: float = typer.Option(0.3, min=0, max=1, help="Share of the attention blocks to keep."),
    block_size: int = typer.Option(64, min=1, help="Tokens per block."),
    row_sample: float = typer.Option(1.0, min=0, max=1, help="Share of the rows of each attention map to read."),
    checkpoint: Path = typer.Option(None, help="Folder of what was measured so far; default OUTPUT.part."),
    dtype: str = typer.Option("auto", help="bfloat16, float16 or float32; auto is bfloat16 on a GPU."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE: order_rule, scope, mask_groups, ..."),
    call: list[str] = typer.Option([], "--call", "-c", help="NAME=VALUE for the pipeline's call; repeatable."),
) -> None:
    """Find axis orders and block masks of PAROAttention from dense generations, and write a plan.

    A calibration that was killed goes on where it was when the same line is given again.

    Example: `hf-attn calibrate paro Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 480x832x81 --output wan-480p`
    """
    with one_clear_line():
        refuse_existing(output)
        import torch
        from diffusers import DiffusionPipeline

        arguments = {**_size(size), "num_inference_steps": steps, **parse_options(call)}
        if dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"--dtype must be auto, bfloat16, float16 or float32, got {dtype!r}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        name = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
        pipe = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=getattr(torch, name)).to(device)
        pipe.set_progress_bar_config(disable=True)
        prompts = prompt or ["A red fox runs through fresh snow, the camera follows."]
        work = checkpoint or output.with_name(output.name + ".part")
        with progress_line("calibrate") as progress:
            plan = hf_attn.calibrate(
                pipe,
                "paro",
                prompts=prompts,
                call=arguments,
                density=density,
                block_size=block_size,
                row_sample=row_sample,
                checkpoint=work,
                progress=progress,
                base_model=pipeline,
                **parse_options(option),
            )
        hf_attn.save_plan(plan, output)
        if checkpoint is None and work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    groups, layers, heads = plan.block_mask.shape[:3]
    moved = int((plan.order > 0).sum())
    console.print(f"{layers} layers x {heads} heads, {groups} mask sets; {moved} heads leave the order FHW")
    console.print(f"wrote {output}")


def _size(text: str) -> dict[str, int]:
    """Height, width and frames of "480x832x81"."""
    try:
        height, width, *frames = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"--size must be HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, got {text!r}") from None
    return {"height": height, "width": width, **({"num_frames": frames[0]} if frames else {})}


def _windows(sink: int, local: int) -> dict[str, Any]:
    """Windows of decoding as measured with, where they are whole pages of the default size."""
    page = hf_attn.LServeConfig().page_size
    return {"dec_sink": sink, "dec_local": local} if sink % page == 0 and local % page == 0 else {}


def _config(name: str | None) -> Any:
    """The config alone, without the weights where the format allows it."""
    if name is None or name.endswith(".gguf"):
        return load_language_model(name)[0].config
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


def _read_gates(folder: Path) -> HeadCalibration:
    """Gates of a folder of ours, or of DuoAttention."""
    if (folder / "full_attention_heads.tsv").is_file():
        heads = hf_attn.load_duo_heads(folder)
        return HeadCalibration(heads.alpha, None, "duo", heads.sink_size, heads.recent_size, 0)
    return load_heads(folder)


def _evaluate(model, tokenizer, texts, found, sparsity: float, sink: int, local: int, length: int) -> dict[str, float]:
    """Perplexity of two rows behind the text of the calibration, dense and with streaming heads."""
    read = -(-found.tokens // length) if found.method == "mass" else 0
    rows = token_windows(tokenizer, texts, length=length, count=read + 2)[read:]
    if not len(rows):
        raise ValueError(f"no text is left to evaluate on behind {found.tokens} tokens; pass more text")
    heads = retrieval_heads(found, sparsity).int().tolist()
    dense = perplexity(model, rows)
    sparse = perplexity(model, rows, heads=heads, ctx_sink=sink, ctx_local=local)
    return {"perplexity": sparse, "perplexity dense": dense, "ratio": sparse / dense}


def _report(output: Path, found: HeadCalibration, sparsity: float, metrics: dict[str, float]) -> None:
    retrieval = retrieval_heads(found, sparsity)
    streaming = (~retrieval).sum(1).tolist()
    console.print(f"{sum(streaming)} of {retrieval.numel()} KV heads stream; by layer: {' '.join(map(str, streaming))}")
    if metrics:
        console.print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    console.print(f"wrote {output}")
