"""PyTorch's own way to skip padding: ``nn.TransformerEncoder`` on nested tensors, with a BERT's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planish.errors import NumericError
from planish.models.base import Batch

NESTED = "nn.TransformerEncoder-nested"

_FAST = "aten::_transformer_encoder_layer_fwd"


class NestedEncoder(torch.nn.Module):
    """A BERT from transformers as ``nn.TransformerEncoder`` behind its embeddings; the pooler is left out."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        config = bert.config
        layer = torch.nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.embeddings = bert.embeddings
        self.encoder = torch.nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
        for ours, theirs in zip(self.encoder.layers, bert.encoder.layer, strict=True):
            _copy_layer(ours, theirs)
        self.eval().requires_grad_(False)  # both are conditions of the fast path

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Token states [batch, seq, width], 0 at padding; ids and mask are [batch, seq], the valid tokens left."""
        return (self.encoder(self.embeddings(input_ids=input_ids), src_key_padding_mask=attention_mask == 0),)


def _copy_layer(ours: Any, theirs: Any) -> None:
    own, output = theirs.attention.self, theirs.attention.output
    pairs = {
        ours.self_attn.out_proj: output.dense,
        ours.norm1: output.LayerNorm,
        ours.linear1: theirs.intermediate.dense,
        ours.linear2: theirs.output.dense,
        ours.norm2: theirs.output.LayerNorm,
    }
    for module, source in pairs.items():
        module.load_state_dict(source.state_dict())
    with torch.no_grad():
        projections = (own.query, own.key, own.value)
        ours.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        ours.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))


class _FastLayers(TorchDispatchMode):
    """While active, counts the layers that run as one op on nested tensors."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count and run one op."""
        if func.name().split(".")[0] == _FAST and args[0].is_nested:
            self.count += 1
        return func(*args, **(kwargs or {}))


def build(bert: torch.nn.Module, batch: Batch) -> NestedEncoder:
    """The encoder with ``bert``'s weights. Call it in inference mode.

    Raises:
        NumericError: on ``batch`` not every layer takes the fast path, so that its time would mean nothing.
    """
    encoder = NestedEncoder(bert)
    with _FastLayers() as fast, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")  # a prototype: it is only measured here
        encoder(**batch)
    layers = len(encoder.encoder.layers)
    if fast.count != layers:
        raise NumericError(
            f"{fast.count} of {layers} layers of nn.TransformerEncoder ran on nested tensors",
            why="its fast path needs inference mode and a mask whose valid tokens stand left",
        )
    return encoder
