"""A made-up run for the report's tests; every number is chosen, none is measured."""

from __future__ import annotations

from typing import Any

LEVELS = (0.0, 0.2, 0.36, 0.488, 0.5904, 0.67232, 0.9)


def _round(number: int, sparsity: float, shift: float) -> dict[str, Any]:
    return {
        "round": number,
        "global_sparsity": sparsity,
        "active_params": round(1000 * (1 - sparsity)),
        "total_prunable_params": 1000,
        "per_layer_sparsity": {
            "fc1.weight": {"sparsity": sparsity, "total": 800},
            "output.weight": {"sparsity": sparsity / 2, "total": 200},
        },
        "seeds": [
            {"seed": s, "val_accuracy": 0.97 - shift - 0.01 * sparsity**4 + 0.002 * s, "val_loss": 0.1}
            for s in range(3)
        ],
    }


def _result(method: str, sparsity: float, shift: float, notes: list[str]) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "alive": round(1000 * (1 - sparsity)),
        "parameters": 1000,
        "macs_dense": 50_200,
        "macs_effective": round(50_200 * (1 - sparsity)),
        "seeds": [
            {
                "seed": s,
                "val_accuracy": 0.97 - shift + 0.002 * s,
                "test_accuracy": 0.96 - shift + 0.004 * s,
                "steps": 340,
                "ticket": f"{method}_{s}.ticket",
                "onnx": f"{method}_{s}.onnx",
                "onnx_bytes": 205_312,
                "latency_ms": 0.0121,
                "dense_latency_ms": 0.0120,
                "worst_difference": 1.2e-6,
            }
            for s in range(3)
        ],
        "notes": notes,
    }


def example_metrics() -> dict[str, Any]:
    """A complete run with two networks, as JSON values."""
    note = "a zero in a dense matrix is multiplied like any other number"
    cost = "took 340 training steps a seed"
    networks = [
        {
            "name": name,
            "title": title,
            "rounds": [_round(r, level, shift) for r, level in enumerate(LEVELS)],
            "results": [
                _result("dense", 0.0, shift, []),
                _result("IMP", 0.9, shift + 0.004, [note, cost]),
                _result("RigL", 0.9, shift + 0.007, [note, cost]),
            ],
        }
        for name, title, shift in (("lenet_300_100", "LeNet-300-100", 0.0), ("small_conv_net", "Small conv net", -0.01))
    ]
    return {
        "schema": "fxsparse.metrics/1",
        "title": "Winning tickets <on> digits",
        "data": {"name": "digits", "fingerprint": "ab" * 32},
        "settings": {"epochs per round": "20"},
        "environment": {"fxsparse": "0.1.0", "torch": "2.13.0"},
        "seconds": 160.0,
        "networks": networks,
    }
