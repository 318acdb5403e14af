"""Which precision makes gradients quicker here: tried, not assumed."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bfloat16 import computes_in_bfloat16
from ..models.inspection import as_called
from ..names import PRECISIONS
from ..validation import ItoError, check_images, check_labels, recordable
from .objectives import OBJECTIVES
from .panels import Panels
from .targets import Ascent, as_target

_IMAGES, _PATHS, _TURNS = 32, 8, 3
_LEAST_COSINE = 0.9  # of the median image; 0.97 to 0.99 was measured where bfloat16 computes what it should


class PrecisionTrial(NamedTuple):
    """What a trial of both precisions has shown.

    Attributes:
        precision: the one to take.
        why: in a sentence.
    """

    precision: str
    why: str


def try_precisions(model: nn.Module, x: Tensor, y: Tensor) -> PrecisionTrial:
    """Take a few gradients in float32 and in bfloat16, by turns, and see which precision to attack in.

    bfloat16 is to be taken where its gradients point where float32's do, and are ready sooner. It is not tried where a
    processor would only imitate it. The answer depends on
    the processor and on what else it does: name the precision where a figure is to be made again.

    Args:
        model: what `Attack.run` takes.
        x, y: images ``(N, C, H, W)`` in [0, 1] and labels ``(N,)``; the first 32 are used.

    Raises:
        ItoError: images, labels or a model that cannot be attacked.
    """
    check_images(x)
    if not computes_in_bfloat16(x.device):
        return PrecisionTrial("float32", "This processor has no instructions for bfloat16.")
    with torch.inference_mode(False), as_called(model):
        x, y = recordable(x.detach())[:_IMAGES], recordable(check_labels(y, len(x)))[:_IMAGES]
        target, rows = as_target(model, x), torch.arange(len(x), device=x.device)
        seconds, last = dict.fromkeys(PRECISIONS, float("inf")), dict[str, Ascent]()
        try:
            every = {p: Panels(target, y, 0, rows, _PATHS, _PATHS, 1, p) for p in PRECISIONS}
            for _ in range(_TURNS):
                for precision, panels in every.items():
                    begun = time.perf_counter()
                    last[precision] = panels.ascend(OBJECTIVES["mean-loss"], x, rows, 0)
                    if x.device.type == "cuda":
                        torch.cuda.synchronize(x.device)
                    seconds[precision] = min(seconds[precision], time.perf_counter() - begun)
        except (ItoError, RuntimeError) as error:  # a module's own code may not bear bfloat16
            return PrecisionTrial("float32", f"Gradients in bfloat16 cannot be taken: {str(error).splitlines()[0]}")
    first, second = (last[precision].gradient.flatten(1) for precision in PRECISIONS)
    cosine = float(F.cosine_similarity(first.cpu().double(), second.cpu().double()).median())  # MPS has no float64
    ratio = seconds["bfloat16"] / seconds["float32"]
    figures = f"{ratio:.2f} of float32's time, cosine {cosine:.3f} with its gradients"
    if not cosine >= _LEAST_COSINE:
        return PrecisionTrial("float32", f"bfloat16 points elsewhere: {figures}.")
    if ratio >= 1:
        return PrecisionTrial("float32", f"bfloat16 is no quicker here: {figures}.")
    return PrecisionTrial("bfloat16", f"bfloat16 takes {figures}.")
