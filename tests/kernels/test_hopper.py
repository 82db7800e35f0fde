"""The kernels compile for Hopper, with its matrix instructions and its copy engine; no GPU is needed for that."""

import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dyntune.inference.kernels import compaction, gathering, grouped, joint, product

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on Hopper."""


def compiled(kernel, signature, constants, **options):
    """The kernel's PTX, and the bytes of shared memory that it takes; pointers are aligned as PyTorch's are."""
    types = signature | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    result = compile(
        ASTSource(
            kernel,
            signature={name: types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if types[name].startswith("*")},
        ),
        target=HOPPER,
        options=options,
    )
    assert result.asm["cubin"]
    return result.asm["ptx"], result.metadata.shared


def pointers(names, **others):
    return dict.fromkeys(names.split(), "*bf16") | others


@pytest.mark.parametrize("scatters", [False, True], ids=["activated", "scattered"])
@pytest.mark.parametrize("described", [True, False], ids=["described", "pointers"])
@pytest.mark.parametrize("config", [product._LARGE[0], product._SMALL[-1]], ids=["largest", "smallest"])
def test_product(config, described, scatters):
    meta = config.kwargs
    rows, columns, depth = meta["BLOCK_ROWS"], meta["BLOCK_COLUMNS"], meta["BLOCK_DEPTH"]
    signature = pointers("rows weight bias out", index="*i32", count="*i32", size="i32")
    if described:
        signature |= {"rows": f"tensordesc<bf16[{rows}, {depth}]>", "weight": f"tensordesc<bf16[{columns}, {depth}]>"}
    constants = {
        "COLUMNS": 384,
        "DEPTH": 192,
        "DESCRIBED": described,
        "SCATTERS": scatters,
        "ACTIVATION": "" if scatters else "gelu",
        "PRECISION": "tf32",
    }
    ptx, shared = compiled(
        product._product, signature, constants | meta, num_warps=config.num_warps, num_stages=config.num_stages
    )
    assert shared <= SHARED
    assert ("wgmma.mma_async" if rows >= 64 else "mma.sync") in ptx
    assert ("cp.async.bulk.tensor" in ptx) == described
    assert re.search(r"st\.global\.v4", ptx)


def test_joint():
    ptx, shared = compiled(
        joint._joint,
        pointers("x read_weight read_bias write out", values="*fp32", tokens="i32", width="i32", hidden="i32"),
        {"BLOCK_TOKENS": joint._TOKENS, "BLOCK_WIDTH": 128, "BLOCK_HIDDEN": joint._WIDEST, "PRECISION": "tf32"},
    )
    assert shared <= SHARED
    assert "mma.sync" in ptx


def test_compaction():
    sizes = dict.fromkeys(("tokens", "per_image", "prefix", "image_stride", "patch_stride"), "i32")
    compiled(compaction._compact, pointers("values", index="*i32", count="*i32") | sizes, {"BLOCK": compaction._BLOCK})


def test_gathered_norm():
    compiled(
        gathering._gather_norm,
        pointers("x weight bias out", index="*i32", count="*i32", width="i32", epsilon="fp32"),
        {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 1024},
    )


def test_around_the_grouped_product():
    compiled(
        grouped._activate,
        pointers("x bias", count="*i32", width="i32"),
        {"ACTIVATION": "gelu_tanh", "BLOCK": grouped._BLOCK},
    )
    compiled(
        grouped._scatter,
        pointers("out update bias", index="*i32", count="*i32", width="i32"),
        {"BLOCK": grouped._BLOCK},
    )
