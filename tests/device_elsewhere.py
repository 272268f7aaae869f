"""The device "elsewhere": values like the CPU's, manners like CUDA's, for finding faults where there is no GPU.

`register()` compiles device_elsewhere.cpp (ten seconds, once) and gives torch its private backend that name; a process
cannot take the name back. `tensor.to("elsewhere")` then is as strict as `tensor.to("cuda")`.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

NAME = "elsewhere"
_SOURCE = Path(__file__).with_name("device_elsewhere.cpp")


class _Module:
    """What `torch.elsewhere` is to its device as `torch.cuda` to its own."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def _generator() -> torch.Generator:
        return _default

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch._C._get_accelerator  # noqa: B018
