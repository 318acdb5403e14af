"""Whether a device has instructions for bfloat16, or only imitates it."""

from __future__ import annotations

import warnings

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, as far as this version of torch can tell."""
    if device.type == "cuda":  # NVIDIA's since Ampere
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
    older = (getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(has is True for name, has in capabilities.items() if "bf16" in name) or any(older)


def warn_of_imitation(device: torch.device) -> None:
    """Warn where bfloat16 is asked for and a CPU or an older GPU can only imitate it."""
    if device.type in ("cpu", "cuda") and not computes_in_bfloat16(device):
        warnings.warn(
            "This processor has no instructions for bfloat16: what is computed in it can take ten times as long as in "
            "float32. With precision auto attacks, with precision native trainings take it only where it is there.",
            stacklevel=3,
        )
