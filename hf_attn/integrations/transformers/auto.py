"""Auto classes find our models without any of them being imported before it is asked for.

The public `register` methods take classes, so they would load every modelling file at `import hf_attn`. transformers
itself goes by names and modules; this file is the only one that writes into those private tables. A version that has
other tables gets the public calls instead.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@dataclass(frozen=True)
class Family:
    """One model type: the module that has its classes (looked up when needed) and their names.

    `heads` are further classes: pairs (Auto class, name), as in ("AutoModelForImageClassification", "MoHViTFor...").
    `image_processor` is the name of a transformers image processor with a PIL form, as in "ConvNextImageProcessor".
    """

    model_type: str
    module: str
    config: str
    model: str
    causal_lm: str | None = None
    heads: tuple[tuple[str, str], ...] = ()
    image_processor: str | None = None

    def classes(self) -> list[tuple[str, str]]:
        """Pairs (Auto class, name) of all model classes."""
        causal_lm = [("AutoModelForCausalLM", self.causal_lm)] if self.causal_lm else []
        return [("AutoModel", self.model), *causal_lm, *self.heads]


class _Lazy(ModuleType):
    """A module that is imported when one of its attributes is first asked for."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._target = target

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._target), name)


def register(family: Family) -> None:
    """Teach AutoConfig and the Auto classes of a family's models its model type; harmless when repeated."""
    if family.model_type in CONFIG_MAPPING:
        return
    mappings = [(getattr(modeling_auto, auto)._model_mapping, name) for auto, name in family.classes()]
    if not _has_name_tables(CONFIG_MAPPING, *(mapping for mapping, _ in mappings)):
        _register_classes(family)
        return
    module = _Lazy(family.module)
    CONFIG_MAPPING._mapping[family.model_type] = family.config
    CONFIG_MAPPING._modules[family.model_type] = module
    for mapping, name in mappings:
        mapping._config_mapping[family.model_type] = family.config
        mapping._reverse_config_mapping[family.config] = family.model_type
        mapping._model_mapping[family.model_type] = name
        mapping._modules[family.model_type] = module
    if family.image_processor is not None:
        _register_image_processor(family, module)


def _register_image_processor(family: Family, module: ModuleType) -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    # Names that our module lacks are looked up in transformers itself.
    processors = {"torchvision": family.image_processor, "pil": f"{family.image_processor}Pil"}
    IMAGE_PROCESSOR_MAPPING._config_mapping[family.model_type] = family.config
    IMAGE_PROCESSOR_MAPPING._reverse_config_mapping[family.config] = family.model_type
    IMAGE_PROCESSOR_MAPPING._model_mapping[family.model_type] = processors
    IMAGE_PROCESSOR_MAPPING._modules[family.model_type] = module


def _has_name_tables(configs: object, *mappings: object) -> bool:
    tables = ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules")
    return all(hasattr(configs, name) for name in ("_mapping", "_modules")) and all(
        hasattr(mapping, name) for mapping in mappings for name in tables
    )


def _register_classes(family: Family) -> None:
    module = importlib.import_module(family.module)
    config = getattr(module, family.config)
    AutoConfig.register(family.model_type, config)
    for auto, name in family.classes():
        getattr(modeling_auto, auto).register(config, getattr(module, name))
    if family.image_processor is not None:
        processors = {
            backend: getattr(transformers, family.image_processor + end)
            for backend, end in (("torchvision", ""), ("pil", "Pil"))
        }
        transformers.AutoImageProcessor.register(config, image_processor_classes=processors)
