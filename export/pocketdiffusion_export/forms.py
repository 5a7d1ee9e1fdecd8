"""The form in which torch modules are traced, chosen by what engines run fastest and in the least memory.

Attention of UNets and autoencoders becomes one node, onnxruntime's MultiHeadAttention, which OpenVINO reads as well
(from 2026.3 on). It never holds all scores: at 4,096 positions, 8 heads and 2 images onnxruntime took 31 MB for it and
1,066 MB for MatMul-Softmax-MatMul, in less time; OpenVINO took the same time and memory for both. Text encoders are
short and masked: theirs stays MatMul-Softmax-MatMul, with heads split by a constant Reshape (a zero copies a
dimension, so no Shape nodes appear).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pocketdiffusion_export.errors import ExportError


class _SplitHeads(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """[batch, length, heads * size] -> [batch, heads, length, size], or [batch, heads, size, length] for keys."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, heads: int, keys: bool) -> torch.Tensor:
        return (
            x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1) if keys else x.unflatten(-1, (heads, -1)).transpose(1, 2)
        )

    @staticmethod
    def symbolic(g: Any, x: Any, heads: int, keys: bool) -> Any:
        shape = g.op("Constant", value_t=torch.tensor([0, 0, heads, -1]))
        return g.op("Transpose", g.op("Reshape", x, shape), perm_i=[0, 2, 3, 1] if keys else [0, 2, 1, 3])


class _MergeHeads(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """[batch, heads, length, size] -> [batch, length, heads * size]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        shape = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        return g.op("Reshape", g.op("Transpose", x, perm_i=[0, 2, 1, 3]), shape)


class _Fused(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """Multi-head attention of [batch, length, heads * size] tensors as one node."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return mixed.transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, v: Any, heads: int, scale: float) -> Any:
        mixed = g.op("com.microsoft::MultiHeadAttention", q, k, v, num_heads_i=heads, scale_f=scale)
        return mixed.setType(q.type())


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> Any:
    """Multi-head attention of [batch, length, heads * size] tensors; `q` is scaled already."""
    return _Fused.apply(q, k, v, heads, 1.0)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor) -> Any:
    """Multi-head attention of [batch, length, heads * size] tensors; `q` is scaled already, `mask` is added."""
    scores = _SplitHeads.apply(q, heads, False) @ _SplitHeads.apply(k, heads, True)
    return _MergeHeads.apply((scores + mask).softmax(-1) @ _SplitHeads.apply(v, heads, False))


class _DiffusersProcessor:
    """An attention processor of Diffusers for self- and cross-attention without masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        _check_plain(attn, attention_mask)
        x, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        x = _Fused.apply(attn.to_q(x), attn.to_k(context), attn.to_v(context), attn.heads, attn.scale)
        x = attn.to_out[0](x)
        if len(shape) == 4:
            x = x.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


def _check_plain(attn: Any, mask: object) -> None:
    unsupported = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    found = [name for name in unsupported if getattr(attn, name, None) is not None]
    if found or mask is not None:
        what = ", ".join(found) or "a mask"
        raise ExportError(f"attention with {what} can't be exported; only plain self- and cross-attention is known")


@contextmanager
def fused_attention(model: Any) -> Iterator[None]:
    """Give a Diffusers model the attention above, and its own back at the end."""
    before = getattr(model, "attn_processors", None)  # models that never hold attention lack it
    if not before:
        yield
        return
    model.set_attn_processor(_DiffusersProcessor())
    try:
        yield
    finally:
        model.set_attn_processor(before)
