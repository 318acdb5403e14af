"""Autograd against finite differences: is the gradient that attacks follow the slope of what is computed?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .checking import Beside, check
from .subject import Subject


@check(
    18,
    "solver gradient",
    "median relative error > 1e-3, or adaptive steps",
    "this project",
    "Gradients are those of the computation, step by step.",
    "Autograd's gradient is not the slope of what is computed: look for detached parts, an adjoint, or adaptive steps.",
)
def solver_gradient(s: Subject) -> tuple[str, bool]:
    """Autograd against central differences in float64 on a fixed path, in 16 random directions at up to 8 images."""
    if s.adaptive:
        return "the solver chooses its steps", True
    if s.fixed is None:
        raise Beside("The model's noise is not torch's: it cannot be fixed from outside.")
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64, device="cpu").to(s.x.device)

    # Off the kinks that real images sit on: black borders tie in every max-pooling, and meet every clamp.
    try:
        x = s.x[: s.batch_size or 8][:8].double()
        x = (x + 0.01 * draw(*x.shape)).clamp(0.01, 0.99).requires_grad_()
        model = copy.deepcopy(s.fixed).double()
        with torch.enable_grad():
            out = model(x)
        exact = out.dtype == torch.float64
    except Exception:  # the module is not ours: whatever it raises, it does not compute in float64
        exact = False
    if not exact:
        raise Beside("The model does not compute in float64, where alone differences are exact enough.")
    mix = draw(*out.shape)  # a random combination of logits: a loss would saturate
    if not out.requires_grad:
        gradient = torch.zeros_like(x)
    else:
        gradient = torch.autograd.grad(out, x, mix, allow_unused=True, materialize_grads=True)[0]
    errors, h = [], 1e-5
    with torch.no_grad():
        for _ in range(16):
            v = draw(*x.shape)
            v = v / v.flatten(1).norm(dim=1)[:, None, None, None]
            slope = ((model(x + h * v) - model(x - h * v)) * mix).sum(1) / (2 * h)
            guess = (gradient * v).flatten(1).sum(1)
            size = torch.maximum(slope.abs(), guess.abs())
            # NaN is the slope of nothing.
            errors.append(((slope - guess).abs() / size.where(size > 0, torch.ones_like(size))).nan_to_num(1.0))
    error = float(torch.cat(errors).median())
    return f"median relative error {error:.1e}", error > 1e-3
