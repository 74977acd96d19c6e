"""OneFormer's masked decoder: one mask for all heads, weights only on request, checkpointed layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.oneformer import modeling_oneformer as host


class MendedCrossAttentionLayer(host.OneFormerTransformerDecoderCrossAttentionLayer):
    """Masked cross-attention with its residual and norm."""

    def forward(
        self,
        output: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[Q, B, width]` -> the same, and weights averaged over the heads `[B, Q, HW]` if asked for."""
        states = self.norm(output) if self.normalize_before else output
        found, weights = self.multihead_attn(
            query=self.with_pos_embed(states, query_pos),
            key=self.with_pos_embed(memory, pos),
            value=memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
            need_weights=output_attentions,
        )
        output = output + self.dropout(found)
        return output if self.normalize_before else self.norm(output), weights


class MendedSelfAttentionLayer(host.OneFormerTransformerDecoderSelfAttentionLayer):
    """Self-attention of the queries with its residual and norm."""

    def forward(
        self,
        output: Tensor,
        output_mask: Tensor | None = None,
        output_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[Q, B, width]` -> the same, and weights `[B, h, Q, Q]` if asked for."""
        states = self.norm(output) if self.normalize_before else output
        found, weights = self.self_attn(
            states, attention_mask=output_mask, position_embeddings=query_pos, output_attentions=output_attentions
        )
        output = output + self.dropout(found)
        return output if self.normalize_before else self.norm(output), weights


class MendedDecoderLayer(GradientCheckpointingLayer, host.OneFormerTransformerDecoderLayer):
    """Cross-attention to one level, self-attention, feed-forward."""

    def forward(
        self,
        output: Tensor,
        memory: Tensor,
        index: int | None = None,
        pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """`[Q, B, width]` -> (the same,) or (the same, self-attention weights, cross-attention weights)."""
        if attention_mask is not None:
            # A query whose mask is empty looks everywhere.
            attention_mask = attention_mask & ~attention_mask.all(-1, keepdim=True)
        output, cross = self.cross_attn(
            output,
            memory,
            memory_mask=attention_mask,
            pos=pos,
            query_pos=query_embeddings,
            output_attentions=output_attentions,
        )
        output, own = self.self_attn(output, query_pos=query_embeddings, output_attentions=output_attentions)
        output = self.ffn(output)
        return (output, own, cross) if output_attentions else (output,)


class MendedDecoder(host.OneFormerTransformerDecoder):
    """The host's decoder with a mask `[B, 1, Q, HW]` that is never repeated for the heads."""

    def forward(
        self,
        task_token: Tensor,
        multi_stage_features: list[Tensor],
        multi_stage_positional_embeddings: list[Tensor],
        mask_features: Tensor,
        query_features: Tensor,
        query_embeddings: Tensor,
        query_embedder: nn.Embedding,
        size_list: list[torch.Size],
        output_attentions: bool | None = None,
    ) -> host.OneFormerTransformerDecoderOutput:
        """Predictions before the first and after every layer; the last one is the model's."""
        if self.use_task_norm:
            task_token = self.decoder_norm(task_token)
        # The names are the other way round on purpose: image features are positions of a memory of positions.
        first = self.query_transformer(
            query_features,
            None,
            query_embedder.weight[:-1],
            self.query_input_projection(mask_features),
            task_token if self.use_task_norm else None,
        )[0].permute(1, 0, 2)
        queries = torch.cat([first, task_token], dim=0)

        output, predictions = queries, []
        attentions: tuple[tuple[Tensor, ...], ...] = ()
        for index, layer in enumerate((*self.layers, None)):
            level = index % self.num_feature_levels
            *prediction, mask = self.forward_prediction_heads(output, mask_features, size_list[level])
            predictions.append(prediction)
            if layer is None:
                break
            output, *weights = layer(
                output,
                multi_stage_features[level],
                pos=multi_stage_positional_embeddings[level],
                attention_mask=mask,
                query_embeddings=query_embeddings,
                output_attentions=bool(output_attentions),
            )
            attentions += (tuple(weights),)
        return host.OneFormerTransformerDecoderOutput(
            object_queries=output.permute(1, 0, 2),
            contrastive_logits=queries.permute(1, 0, 2),
            prediction_class=predictions[-1][0],
            prediction_masks=predictions[-1][1],
            auxiliary_predictions=self._get_aux_predictions(*zip(*predictions, strict=True))
            if self.use_auxiliary_loss
            else None,
            attentions=attentions if output_attentions else None,
        )

    def forward_prediction_heads(
        self, output: Tensor, mask_features: Tensor, attention_mask_target_size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits `[B, Q, C + 1]`, mask logits `[B, Q, H, W]`, and what the next layer may not see."""
        states = self.decoder_norm(output).transpose(0, 1)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(states), mask_features)
        with torch.no_grad():
            small = interpolate(masks, size=attention_mask_target_size, mode="bilinear", align_corners=False)
            blocked = (small.sigmoid() < 0.5).flatten(2).unsqueeze(1)
        return self.class_embed(states), masks, blocked


def register_projections(module: host.OneFormerTransformerModule) -> bool:
    """Let the input projections, which the host keeps in a plain list, be saved, moved and trained.

    The projections themselves stay the same modules. Returns whether anything had to be done.
    """
    before = module.input_projections
    if isinstance(before, nn.ModuleList):
        return False
    del module.input_projections
    module.input_projections = nn.ModuleList(before)
    return True


def unregister_projections(root: nn.Module) -> None:
    """Undo `register_projections` in all modules of `root`."""
    for module in root.modules():
        if isinstance(module, host.OneFormerTransformerModule):
            kept = list(module.input_projections)
            del module.input_projections
            module.input_projections = kept
