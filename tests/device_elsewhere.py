"""The device "elsewhere": the values of the CPU, the manners of CUDA, for finding faults where there is no GPU.

`register()` compiles device_elsewhere.cpp (ten seconds, once) and gives torch's private backend that name, which a
process cannot take back. From then on `tensor.to("elsewhere")` is as strict as `tensor.to("cuda")`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

NAME = "elsewhere"
SOURCE = Path(__file__).with_name("device_elsewhere.cpp")


class Module:
    """What `torch.cuda` is to its device: torch asks `torch.elsewhere` for these."""

    device = contextlib.nullcontext

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
    def synchronize(device: object = None) -> None: ...

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.ops.elsewhere.seed(seed % (1 << 63))

    manual_seed = manual_seed_all

    @staticmethod
    def get_rng_state_all() -> list[Tensor]:
        return [torch.ops.elsewhere.state()]

    @staticmethod
    def set_rng_state_all(states: list[Tensor]) -> None:
        torch.ops.elsewhere.set_state(states[0])

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        return torch.ops.elsewhere.state()

    @staticmethod
    def set_rng_state(state: Tensor, device: object = None) -> None:
        torch.ops.elsewhere.set_state(state)


def missing() -> str | None:
    """Why the device cannot be made here, or None."""
    return None if shutil.which("g++") else "this device is compiled by g++, which is not here"


def built() -> Path:
    """The library of this source and this torch; compiled once, beside the other temporary files."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fxsparse-{NAME}-{digest}.so"
    if not library.exists():
        from torch.utils.cpp_extension import include_paths, library_paths  # a second that few runs need

        new = library.with_suffix(f".{os.getpid()}")
        paths = [f"-I{folder}" for folder in include_paths()] + [f"-L{folder}" for folder in library_paths()]
        command = [
            "g++",
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            "-DAT_PER_OPERATOR_HEADERS",
            "-o",
            str(new),
            str(SOURCE),
        ]
        subprocess.run([*command, *paths, "-ltorch_cpu", "-lc10"], check=True, capture_output=True)
        new.replace(library)
    return library


def register() -> None:
    torch.ops.load_library(built())
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module(NAME, Module)
