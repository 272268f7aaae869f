"""The Triton kernels compiled to machine code, which needs no device: run by test_shared_triton.py."""

import inspect
import re

import pytest

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource
kernels = pytest.importorskip("fxsparse.nn.shared_triton_kernels")

TUNED = {"turn": kernels.TURN, "forward": kernels.FORWARD, "spread": kernels.SPREAD, "collect": kernels.COLLECT}
TUNED["weights"] = kernels.WEIGHTS
FLAGS = {"WIDE": False, "BIASED": True, "BLOCK_R": 64}
INDICES = ("columns", "readers", "starts")
VALUES = ("source", "target", "turned", "values", "bias", "output", "gradient", "spread", "found")
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that one block may have


def compiled(name: str, config, kind: str, precision: str, capability: int):
    """The kernel for tensors of one type whose sizes are multiples of 16."""
    body = TUNED[name].plain
    names = list(inspect.signature(body.fn).parameters)
    constants = {**config.kwargs, **FLAGS, "PRECISION": precision}
    constants = {each: constants[each] for each in names if each in constants}
    types = {each: "i32" for each in names}
    types |= {each: "*i32" if each in INDICES else f"*{kind}" for each in names if each in (*VALUES, *INDICES)}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, each in enumerate(names) if types[each] != "constexpr" and each not in ("k", "bucket", "gap")]
    source = ASTSource(
        fn=body,
        signature=types,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tiles(name: str) -> range:
    return range(len(TUNED[name].tuned.configs))


@pytest.mark.parametrize(("name", "tile"), [(name, tile) for name in TUNED for tile in tiles(name)])
def test_every_tile_compiles_for_tensor_cores_in_bfloat16(name: str, tile: int) -> None:
    made = compiled(name, TUNED[name].tuned.configs[tile], "bf16", "ieee", 90)
    assert made.metadata.shared <= SHARED_MEMORY[90] and made.asm["cubin"]
    if name in ("forward", "spread", "weights"):
        assert "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]
        assert "cp.async" in made.asm["ptx"]  # loads run ahead of products
    assert not re.search(r"\b(atom|red)\.", made.asm["ptx"])  # the order of sums is fixed


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize(
    ("kind", "precision", "capability"),
    [("fp16", "ieee", 90), ("fp32", "ieee", 90), ("fp32", "tf32", 90), ("bf16", "ieee", 80)],
)
def test_the_first_tile_compiles_for_other_types_and_devices(name, kind, precision, capability) -> None:
    made = compiled(name, TUNED[name].tuned.configs[0], kind, precision, capability)
    assert made.metadata.shared <= SHARED_MEMORY[capability] and made.asm["cubin"]
    if name in ("forward", "spread", "weights"):
        assert ("mma" in made.asm["ptx"]) == (kind != "fp32" or precision == "tf32")
