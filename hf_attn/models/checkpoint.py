"""What makes a checkpoint of ours load anywhere: the thin file that leads from `trust_remote_code` to this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from hf_attn.models import adapters
from hf_attn.models.host import HostConfig, HostModel
from hf_attn.models.record import RECORD

THIN_MODULE = "modeling_hf_attn"

# The first config of a family of ours is also the first moment at which an adapter of ours can exist.
adapters.install()


class CardOnPush(HostModel):
    """Mixin of our models: `push_to_hub` also gives the repository a filled card, unless it has one of its own."""

    def push_to_hub(self, repo_id: str, *arguments: Any, **options: Any) -> Any:
        """As in transformers, and the card. Pull requests and models that were not converted get none."""
        if getattr(self.config, RECORD, None) and not options.get("create_pr"):
            from hf_attn.models.pushing import push_card

            push_card(self.config.save_pretrained, repo_id, options)
        return super().push_to_hub(repo_id, *arguments, **options)


class ThinFileConfig(HostConfig):
    """Mixin of our configs: `save_pretrained` also writes `modeling_hf_attn.py` and names it in `auto_map`.

    The file holds three empty subclasses. Subclasses, not re-exports: transformers copies the source of whatever class
    it saves, and would copy this package into the checkpoint. With hf-attn imported the file is not used at all.
    """

    # Module that exports the classes, and {Auto class: name}; AutoConfig is the class itself.
    thin_module: ClassVar[str] = ""
    thin_classes: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> Any:
        """As in transformers, and the thin file."""
        folder = Path(save_directory)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{THIN_MODULE}.py").write_text(self.thin_file())
        names = {"AutoConfig": type(self).__name__, **self.thin_classes}
        self.auto_map = {auto: f"{THIN_MODULE}.{name}" for auto, name in names.items()}
        return super().save_pretrained(save_directory, *arguments, **options)

    def thin_file(self) -> str:
        """Source of `modeling_hf_attn.py`."""
        config = type(self).__name__
        names = [config, *self.thin_classes.values()]
        lines = [
            '"""Code of this checkpoint: the installed package hf-attn (pip install hf-attn)."""',
            "",
            f"import {self.thin_module} as _hf_attn",
            "",
            "",
            f"class {config}(_hf_attn.{config}):",
            "    pass",
        ]
        for name in names[1:]:
            lines += ["", "", f"class {name}(_hf_attn.{name}):", f"    config_class = {config}"]
        return "\n".join(lines) + "\n"
