"""The config of NAT checkpoints, whose model type transformers no longer has."""

from __future__ import annotations

from transformers import DinatConfig


class NatConfig(DinatConfig):
    """DinatConfig of a model without dilation: NAT is DiNAT with every dilation 1 (arXiv 2204.07143).

    `dilations` may be left out; any other value than ones is refused.
    """

    model_type = "nat"

    def __post_init__(self, **kwargs) -> None:
        ones = [[1] * depth for depth in self.depths]
        if self.dilations is not None and [list(stage) for stage in self.dilations] != ones:
            raise ValueError(f"a NAT model has no dilation, got dilations={self.dilations}; use DinatConfig for DiNAT")
        self.dilations: list[list[int]] = ones
        super().__post_init__(**kwargs)
