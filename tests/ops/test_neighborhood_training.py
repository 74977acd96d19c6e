"""Neighborhood attention learns: digits from windows alone; causal windows a token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_attn import ops
from hf_attn.natten import NeighborhoodAttention2D
from hf_attn.training.images import digits


class Block(nn.Module):
    """Attention of 3 x 3 windows and an MLP, both residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = NeighborhoodAttention2D(width, 4, kernel_size=3, rel_pos_bias=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Classifier(nn.Module):
    """Two blocks over single pixels of an 8 x 8 image; each position has its own offset."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.pixel, self.place = nn.Linear(1, width), nn.Parameter(0.02 * torch.randn(8, 8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(64 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.pixel(images.movedim(1, -1)) + self.place)
        return self.head(self.norm(x).flatten(1))


@pytest.mark.slow
def test_two_layers_learn_digits():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    train, held_out = digits("random", 0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for part in torch.randperm(len(train)).split(64):
            loss = nn.functional.cross_entropy(model(train.pixels[part]), train.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(held_out.pixels).argmax(-1) == held_out.labels).double().mean().item()
    assert accuracy >= 0.9, f"{accuracy:.1%}"


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_causal_row_needs_no_later_token(dilation):
    """What a token gets when it is the last one is what it gets within the whole sequence."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 19, 2, 8, dtype=torch.float64) for _ in range(3))
    window = {"kernel_size": 4, "dilation": dilation, "is_causal": True}
    whole = ops.neighborhood_attention(query, key, value, **window)
    for end in range(4 * dilation, 20):
        last = ops.neighborhood_attention(query[:, :end], key[:, :end], value[:, :end], **window)[:, -1]
        torch.testing.assert_close(last, whole[:, end - 1], rtol=0, atol=1e-12)
