"""Three methods of PeftModel also tell us: after an adapter was saved, before and after one is loaded, before a push.

Installed when PEFT is imported in a process that has imported hf_attn. They act on adapters with `hf_attn.json`, and on
those whose weights the base lacks. Saving, and merging into 4-bit layers, read weights that `four_bit` makes readable.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_attn.integrations.peft.four_bit import unpack

_MARK = "_hf_attn_original"


def install(
    after_save: Callable[[Any, Path, str], None],
    before_load: Callable[[Any, str, dict], None],
    before_push: Callable[[Any, str, dict], None],
    after_load: Callable[[Any, str, list[str]], None],
) -> None:
    """Call `after_save(model, folder, adapter)`, `before_load(model, adapter's repository, options)`,
    `before_push(model, repository, options)` and `after_load(model, adapter's repository, weights the base lacks)`.

    Harmless when repeated, and without PEFT.
    """
    if importlib.util.find_spec("peft") is None:
        return
    from peft import PeftModel

    if hasattr(PeftModel.save_pretrained, _MARK):
        return
    save, load, push = PeftModel.save_pretrained, PeftModel.load_adapter, PeftModel.push_to_hub

    @functools.wraps(save)
    def save_pretrained(self, save_directory, *arguments, **options):
        unpack(self)
        result = save(self, save_directory, *arguments, **options)
        if options.get("is_main_process", True):
            for adapter in options.get("selected_adapters") or list(self.peft_config):
                after_save(self, adapter_folder(save_directory, adapter), adapter)
        return result

    @functools.wraps(load)
    def load_adapter(self, model_id, *arguments, **options):
        before_load(self, os.fspath(model_id), options)
        result = load(self, model_id, *arguments, **options)
        after_load(self, os.fspath(model_id), list(getattr(result, "unexpected_keys", ())))
        return result

    @functools.wraps(push)
    def push_to_hub(self, repo_id, *arguments, **options):
        before_push(self, repo_id, options)
        return push(self, repo_id, *arguments, **options)

    for wrapper, original in ((save_pretrained, save), (load_adapter, load), (push_to_hub, push)):
        setattr(wrapper, _MARK, original)
        setattr(PeftModel, wrapper.__name__, wrapper)
    layer = _four_bit_layer()
    for name in ("merge", "unmerge") if layer else ():
        setattr(layer, name, _unpacking(getattr(layer, name)))


def uninstall() -> None:
    """Take back `install`."""
    from peft import PeftModel

    for name in ("save_pretrained", "load_adapter", "push_to_hub"):
        original = getattr(getattr(PeftModel, name), _MARK, None)
        if original is not None:
            setattr(PeftModel, name, original)
    layer = _four_bit_layer()
    for name in ("merge", "unmerge") if layer else ():
        setattr(layer, name, getattr(getattr(layer, name), _MARK, getattr(layer, name)))


def _four_bit_layer() -> Any:
    """PEFT's LoRA layer around a 4-bit one; None without bitsandbytes."""
    from peft.tuners import lora

    return getattr(lora, "Linear4bit", None)


def _unpacking(method: Callable) -> Callable:
    @functools.wraps(method)
    def run(self, *arguments, **options):
        unpack(self.get_base_layer())
        return method(self, *arguments, **options)

    setattr(run, _MARK, method)
    return run


def adapter_folder(folder: str | os.PathLike, adapter: str) -> Path:
    """Where PEFT saves an adapter: the one called "default" in the folder itself, others below it."""
    return Path(folder) if adapter == "default" else Path(folder) / adapter
