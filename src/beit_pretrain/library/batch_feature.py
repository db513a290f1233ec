"""What an image processor returns: a dictionary whose entries are attributes too, and which moves to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BatchFeature(dict[str, Any]):
    """Tensors by name, for `model(**features)`; `features.pixel_values` is the entry of that name."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here; there are {', '.join(self) or 'no entries'}") from None

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Move all tensors, in lists too, to a device; `dtype` is for those of floating point alone.

        `to(dtype)` works as well. Changes these features and returns them. NumPy arrays stay as they are.
        Raises TypeError.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if not isinstance(device, torch.device | str | int | None):
            raise TypeError(f"tensors move to a device or a dtype, got {device!r}")

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(moved(item) for item in value)
            if not isinstance(value, Tensor):
                return value
            kind = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=kind, non_blocking=non_blocking)

        for name, value in self.items():
            self[name] = moved(value)
        return self
