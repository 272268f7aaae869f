"""A small list of models that behave, and of ones that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODELS = """
import ctypes, os, signal, sys, time
import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return {"logits": self.head(self.body(x).mean((2, 3)))}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.bare = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, *rest, **options):
        x = self.inner(x)
        if float(x.sum()) > 1e6:
            return x
        return x @ self.bare


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.step = 0

    def forward(self, x):
        return self.layer(x) + torch.tensor([float(time.perf_counter_ns() % 997) * 1e-6])


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


class DiesInBfloat16(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        if x.dtype is torch.bfloat16:
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.layer(x)


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        raise ValueError("no forward today")


def crash():
    ctypes.string_at(0)


def noisy():
    for _ in range(200):
        print("x" * 10_000)
        print("y" * 10_000, file=sys.stderr)
    return mlp()
"""

X4 = "args=(torch.randn(B,4),); kwargs={}"
X6 = "args=(torch.randn(B,6),); kwargs={}"


def entry(name: str, ctor: str, inputs: str = X4, **more: Any) -> dict[str, Any]:
    return {"name": name, "lib": "own", "family": "tiny", "ctor": f"import tiny; {ctor}", "inputs": inputs, **more}


GOOD = [
    entry("good/mlp", "m=tiny.noisy()", X6),
    entry("good/conv", "m=tiny.Conv()", "args=(torch.randn(B,2,5,5),); kwargs={}"),
    entry("good/tied", "m=tiny.Tied()", "args=(torch.randint(0,12,(B,5)),); kwargs={}"),
    entry("good/branching", "m=tiny.Branching()"),
]
BAD = [
    entry("bad/random", "m=tiny.Random()"),
    entry("bad/nothing_to_mask", "m=tiny.Norms()"),
    entry("bad/dies_in_bfloat16", "m=tiny.DiesInBfloat16()"),
    entry("bad/segfault", "tiny.crash()"),
    entry("bad/exits", "import sys; sys.exit(3)"),
    entry("bad/forward", "m=tiny.Raises()"),
]


def write_zoo(folder: Path, entries: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(MODELS)
    (folder / "zoo.json").write_text(json.dumps({"torch": "2.13.0", "batch": 2, "seed": "0, 1", "entries": entries}))
    return folder
