"""How weights are moved: AdamW, or Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices.

Muon makes every direction of a matrix's step equally long. It is scaled as in arXiv:2502.16982, so that one learning
rate and one weight decay suit its matrices and AdamW's vectors and embeddings alike.
"""

from __future__ import annotations

from typing import Any

import torch

MOMENTUM = 0.95
ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: singular values come near 1 quickly, not to it exactly."""
LIKE_ADAM = 0.2
"""Root mean square of AdamW's usual steps."""


class Muon(torch.optim.AdamW):  # type: ignore[misc]  # torch is not followed by mypy
    """AdamW, and Muon in groups with `matrices` true. State of a matrix: `exp_avg` alone, its momentum."""

    def __init__(self, model: torch.nn.Module, rate: float, decay: float) -> None:
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for weight in model.parameters():
            (matrices if weight.ndim > 1 and id(weight) not in embedded else others).append(weight)
        super().__init__([{"params": others, "matrices": False}], lr=rate, weight_decay=decay)
        self.add_param_group({"params": matrices, "matrices": True})

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's would ask matrices for a count of steps

    def step(self, closure: None = None) -> None:
        """One step; it uses the matrices' gradients up."""
        moves = []
        for group in self.param_groups:
            for weight in group["params"] if group["matrices"] else ():
                if weight.grad is not None:
                    moves.append((weight, weight.grad, group["lr"], group["weight_decay"]))
                    weight.grad = None
        super().step(closure)
        with torch.no_grad():
            for move in moves:
                self._move(*move)

    def _move(self, weight: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        momentum = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        step = orthogonal(ahead.flatten(1)).view_as(weight)
        longest = max(weight.shape[0], weight.numel() // weight.shape[0])
        weight.mul_(1 - rate * decay).add_(step, alpha=-rate * LIKE_ADAM * longest**0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with singular values near 1, in bfloat16's precision; float32."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.t() if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.t() if tall else x).float()
