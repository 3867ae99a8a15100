"""Compile the GPU kernels for sm_90 on any machine, and print the resources of each as JSON.

A separate program, because Triton cannot compile in a process that interprets kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from colorfilter.scoring.kernels import triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HOPPER = GPUTarget("cuda", 90, 32)


def figures(
    kernel: Any, pointers: dict[str, str], constants: dict[str, int], **options: int
) -> dict[str, int]:
    """Registers a thread, shared bytes a program, instructions by kind."""
    names = kernel.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    multiples = [*pointers, *({"n_rows", "width"} & set(names))]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run(
                [CUOBJDUMP, option, binary.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return {
        "registers": int(registers[1]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\bSTL\b", code)),
        "tensor_core": len(re.findall(r"\bHGMMA\b", code)),
        "bulk_loads": len(re.findall(r"\bUTMALDG\b", code)),
    }


def split_log_sums(tile: kernels.Tile, dtype: str) -> dict[str, int]:
    pointers = {"hidden": f"*{dtype}", "head_weight": f"*{dtype}", "labels": "*i64"}
    pointers |= dict.fromkeys(["maxima", "sums", "label_logits"], "*fp32")
    constants = {
        "TILES": kernels.SPLIT_COLUMNS // tile.columns,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "INTERPRETED": False,
    }
    return figures(
        kernels.split_log_sums,
        pointers,
        constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def join() -> dict[str, int]:
    pointers = dict.fromkeys(["maxima", "sums", "label_logits", "nll"], "*fp32")
    pointers |= {"labels": "*i64", "n_labels": "*i32"}
    constants = {"IGNORED": kernels.IGNORED, "TOKENS": kernels.JOINED_TOKENS}
    return figures(kernels.join, pointers, constants)


if __name__ == "__main__":
    found = {"join": join(), "exact fp32": split_log_sums(kernels.EXACT, "fp32")}
    for name, tile in {"wide": kernels.WIDE, "narrow": kernels.NARROW}.items():
        for dtype in ("fp16", "bf16"):
            found[f"{name} {dtype}"] = split_log_sums(tile, dtype)
    sys.stdout.write(json.dumps(found))
