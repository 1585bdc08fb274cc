"""Where weights go and what they are: a device that is there, a dtype that it computes in. Checked before loading."""

from collections.abc import Iterable

import torch

from errata.editor.errors import InvalidInputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What models are run in."""


def devices() -> tuple[str, ...]:
    """The devices of this machine, as they are named."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ("cpu",)
    return ("cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())))


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name; "cuda" is the first of its kind.

    Raises InvalidInputError (`device`) for a name that there is not and for a device that this machine does not have.
    """
    there = devices()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidInputError(f"{str(device)!r} is no device; use {_listed(there)}", field="device") from None
    if found.type == "cpu" and not found.index:
        return found
    # Its number alone: where there is one accelerator, all names are of its kind.
    if f"{found.type}:{found.index or 0}" not in there:
        raise InvalidInputError(f"this machine has no device {str(found)!r}; use {_listed(there)}", field="device")
    return found


def checked_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype, by itself or by name.

    Raises InvalidInputError (`dtype`) for one that models are not run in and for one that `device` does not compute in.
    """
    names = {str(d).removeprefix("torch."): d for d in DTYPES}
    said = str(dtype).removeprefix("torch.")
    found = names.get(said)
    if found is None:
        raise InvalidInputError(f"{said!r} is no dtype that a model is run in; use {_listed(names)}", field="dtype")
    if not _computes(found, device):
        others = [name for name, d in names.items() if _computes(d, device)] or ["another device"]
        raise InvalidInputError(f"{device} does not compute in {said}; use {_listed(others)}", field="dtype")
    return found


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype is torch.bfloat16 and device.type == "cuda":
        # Older GPUs multiply it all the same, many times slower than float32.
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((ones @ ones).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
