"""Converting a checkpoint on disk shard by shard: no model in memory, and an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.checks import refuse_existing
from hf_attn.integrations.transformers.loading import host_on_meta, renames_weights
from hf_attn.models.conversion import Conversion, base_config, get_conversion, load_host, materialise, new_config
from hf_attn.models.record import RECORD, patterns
from hf_attn.models.safetensors_copy import copy_tensors, read_header, write_tensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NEW = "model-new-weights.safetensors"
_PROGRESS = "hf_attn_progress.json"
# Of the base's other files: what a tokenizer and generation need. Its weights in other formats and its card stay.
_ALSO = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass
class Plan:
    """What a conversion will do; printable."""

    source: str
    name: str
    base_class: str
    new_class: str
    shards: int
    parameters: int
    bytes: int
    new_parameters: int
    new_weights: list[str]
    layers: int
    kept_layers: dict[int, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    streamed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        share = self.new_parameters / max(self.parameters, 1)
        lines = [
            f"{self.source}: {self.base_class} -> {self.new_class} ({self.name})",
            f"size: {self.parameters:,} parameters, {self.bytes / 1e9:.3f} GB in {self.shards} file(s)",
            f"new: {self.new_parameters:,} parameters ({share:.2%}): {', '.join(self.new_weights) or 'none'}",
        ]
        if self.kept_layers:
            kept = "; ".join(f"{layer} ({reason})" for layer, reason in self.kept_layers.items())
            lines.append(f"layers without new weights: {len(self.kept_layers)} of {self.layers}: {kept}")
        if self.dropped:
            lines.append(f"left out, the base's class has no such weights: {', '.join(self.dropped)}")
        if not self.streamed:
            lines.append("the host renames weights of this model when it loads them: converted in memory, not streamed")
        return "\n".join(lines)


class FolderConversion:
    """One conversion of a checkpoint with safetensors weights.

    Args:
        source: folder or Hub id.
        name: as for `hf_attn.convert`, as are `options`.
        dtype: of the result's floating-point weights; None keeps each one's.
        revision: of a Hub id.

    Raises OSError or ValueError for a base that cannot be converted: no safetensors (GGUF, pickle), quantised, of an
    unsupported architecture, incomplete or cut off.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        self.conversion: Conversion = get_conversion(name)
        self.source, self.dtype, self.options = os.fspath(source), dtype, options
        self.folder = _local(self.source, revision)
        self.base = base_config(os.fspath(self.folder))
        if isinstance(self.base, dict):
            raise ValueError(
                f"{source} is a model of diffusers ({self.base['_class_name']}), which is converted in memory: "
                f"hf_attn.convert({os.fspath(source)!r}, {name!r}).save_pretrained(folder)"
            )
        _refuse_quantised(self.base, self.source)
        self.model_class, self.host = self.conversion.kind(self.base, (self.base.architectures or [None])[0])
        self.files = _weight_files(self.folder)
        self.empty = host_on_meta(self.host, self.base)
        self.streamed = not renames_weights(self.empty)
        self.dropped: list[str] = []
        if self.streamed:
            self.dropped = _check_complete(self.empty, self.files, self.source)

    def plan(self) -> Plan:
        """What `run` would do; nothing is written, and no weight is read."""
        config, model = self._new_model(self.options)
        shapes = self.empty.state_dict()
        new = {key: value for key, value in model.state_dict().items() if key not in shapes}
        count = self.base.get_text_config().num_hidden_layers
        return Plan(
            source=self.source,
            name=self.conversion.name,
            base_class=self.host,
            new_class=self.model_class.__name__,
            shards=len(self.files),
            parameters=self.empty.num_parameters(),
            bytes=sum(file.stat().st_size for file in self.files),
            new_parameters=sum(value.numel() for value in new.values()),
            new_weights=patterns(new),
            layers=count,
            kept_layers=_kept_layers(config, new, count),
            dropped=self.dropped,
            streamed=self.streamed,
        )

    def run(self, output: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> Path:
        """Write the converted checkpoint to a folder that does not exist yet, or is empty.

        Until it is complete it is beside its place, as `<output>.partial`. There an interrupted run goes on: complete
        files are kept, a half-written one is written again.

        Args:
            progress: called with (files done, files in all).

        Raises FileExistsError for a folder that holds anything, ValueError for a partial folder of other inputs.
        """
        output = Path(output)
        refuse_existing(output)
        partial = output.absolute().with_name(output.name + ".partial")
        self._claim(partial, output)
        options = dict(self.options)
        weights: dict[str, Tensor] = {}
        if self.conversion.prepare is not None:
            options, weights = self.conversion.prepare(self._load_host, options)
        config, model = self._new_model(options)
        if not self.streamed:
            self._in_memory(partial, config, weights)
        else:
            self._stream(partial, config, model, weights, progress or (lambda done, total: None))
        for pattern in _ALSO:
            for file in sorted(self.folder.glob(pattern)):
                if not (partial / file.name).exists() and file.name not in (INDEX, "config.json"):
                    shutil.copyfile(file, partial / file.name)
        (partial / _PROGRESS).unlink()
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
        return output

    def _claim(self, partial: Path, output: Path) -> None:
        """The partial folder with a note of what goes into it; refuses that of another conversion."""
        note = {
            "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.files],
            "name": self.conversion.name,
            "options": json.loads(json.dumps(self.options, default=repr)),
            "dtype": str(self.dtype),
        }
        file = partial / _PROGRESS
        if partial.exists() and any(partial.iterdir()):
            found = json.loads(file.read_text()) if file.is_file() else None
            if found != note:
                raise ValueError(
                    f"{partial} is a half-written conversion of another base or with other options, or not ours; "
                    f"remove it, or choose another folder than {output}"
                )
            return
        partial.mkdir(parents=True, exist_ok=True)
        temporary = partial / (_PROGRESS + ".new")
        temporary.write_text(json.dumps(note))
        os.replace(temporary, file)

    def _new_model(self, options: dict[str, Any]) -> tuple[Any, nn.Module]:
        config = new_config(self.conversion, self.base, self.model_class, options, self.options, self.source)
        with torch.device("meta"):
            model = self.model_class(config)
        getattr(config, RECORD)["new_weights"] = patterns(model.state_dict().keys() - self.empty.state_dict().keys())
        return config, model

    def _load_host(self) -> nn.Module:
        return load_host(os.fspath(self.folder), self.host, {} if self.dtype is None else {"dtype": self.dtype})

    def _in_memory(self, partial: Path, config: Any, weights: dict[str, Tensor]) -> None:
        from hf_attn.models.conversion import around

        around(self._load_host(), self.model_class, config, weights, self.conversion.rewrite).save_pretrained(partial)

    def _stream(
        self, partial: Path, config: Any, model: nn.Module, weights: dict[str, Tensor], progress: Callable
    ) -> None:
        rewrite = self.conversion.rewrite
        change = None if rewrite is None else (lambda name, tensor: rewrite(config, name, tensor))
        place, dropped = {}, set(self.dropped)
        for done, file in enumerate(self.files):
            progress(done, len(self.files) + 1)
            names = [name for name in read_header(file)[0] if name not in dropped]
            shard = partial / _shard_name(file)
            if not shard.is_file():
                copy_tensors(file, shard, names, change, self.dtype)
            place.update(dict.fromkeys(names, shard.name))
        new = _new_weights(model, self.empty, weights, self.dtype or _dtype_of(self.files))
        if new:
            write_tensors(partial / NEW, new)
            place.update(dict.fromkeys(new, NEW))
        size = sum((partial / name).stat().st_size for name in set(place.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config.architectures = [self.model_class.__name__]
        config.dtype = self.dtype or self.base.dtype or _dtype_of(self.files)
        config._name_or_path = ""
        config.save_pretrained(partial)
        progress(len(self.files) + 1, len(self.files) + 1)


def _local(source: str, revision: str | None) -> Path:
    if source.endswith(".gguf"):
        raise ValueError(
            f"{source} is a GGUF file, whose weights are quantised blocks; load it dequantised (hf_attn.bench.models."
            "load_language_model shows how) and pass the model to hf_attn.convert, or take the safetensors checkpoint"
        )
    if Path(source).is_dir():
        return Path(source)
    if source[:1] in "./~" or source.count("/") > 1:
        raise OSError(f"no such folder: {source}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=[*_ALSO, "*.safetensors"]))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    other = sorted(file.name for pattern in ("*.gguf", "*.bin", "*.pth") for file in folder.glob(pattern))
    what = f"only {', '.join(other)}" if other else "no weights"
    raise ValueError(f"{folder} holds {what}: hf-attn converts safetensors; save the model with save_pretrained first")


def _refuse_quantised(base: Any, source: str) -> None:
    quantised = getattr(base, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(
            f"{source} is quantised ({method}), and its weights are not those the converted class has; convert the "
            "checkpoint it was made from, and quantise when loading: from_pretrained(..., quantization_config=...)"
        )


def _check_complete(empty: nn.Module, files: list[Path], source: str) -> list[str]:
    """Names of tensors that the host's class has no place for; ValueError for missing weights or other shapes."""
    found = {name: entry["shape"] for file in files for name, entry in read_header(file)[0].items()}
    shapes = {name: list(value.shape) for name, value in empty.state_dict().items()}
    tied = set(getattr(empty, "all_tied_weights_keys", None) or ())
    missing = sorted(name for name in shapes if name not in found and name not in tied)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(shapes)} weights of a {type(empty).__name__} ({missing[0]}, ...): "
            "is the checkpoint complete, and of this architecture?"
        )
    wrong = sorted(name for name in shapes if name in found and found[name] != shapes[name])
    if wrong:
        name = wrong[0]
        raise ValueError(f"{source}: {name} has shape {found[name]}, its config.json asks for {shapes[name]}")
    return sorted(found.keys() - shapes.keys())


def _shard_name(file: Path) -> str:
    return "model-base.safetensors" if file.name == SINGLE else file.name


def _dtype_of(files: list[Path]) -> torch.dtype:
    """Dtype of the largest floating-point weight of the first file."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    entries = [entry for entry in read_header(files[0])[0].values() if entry["dtype"] in kinds]
    largest = max(entries, key=lambda entry: torch.Size(entry["shape"]).numel(), default={"dtype": "F32"})
    return kinds[largest["dtype"]]


def _new_weights(
    model: nn.Module, empty: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Values of the weights that only the converted class has, in the CPU's memory; all others stay on meta."""
    from hf_attn.models.conversion import set_weights

    old = empty.state_dict().keys()
    names = [name for name in model.state_dict() if name not in old]
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        materialise(model, model.get_submodule(owner), "cpu", dtype)
    set_weights(model, weights)
    state = model.state_dict()
    return {name: state[name].detach() for name in names}


def _kept_layers(config: Any, new: dict[str, Tensor], count: int) -> dict[int, str]:
    """Layers that get no new weights, with what their attention is; none where no layer has any."""
    with_new = {int(part) for name in new for part in name.split(".") if part.isdecimal()}
    kinds = getattr(config, "layer_types", None) or ["left as it is"] * count
    return {i: kinds[i].replace("_", " ") for i in range(count) if with_new and i not in with_new}
