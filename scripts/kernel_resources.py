"""Compiles the Triton kernels for several GPUs, without having one, and prints registers, spills and instructions.

    python scripts/kernel_resources.py [--json FILE]

The figures are static counts, not timings. For NVIDIA's sm_80 and sm_90 they come from the machine code, for AMD's
gfx942 from the compiler's metadata. K is SIGReg's number of knots; `loop` counts the instructions in its loop over
samples for each (n, m). The operators on images are compiled for three views of 128 px, the halving
convolution for 128 outputs in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# the interpreter would replace the kernels by functions that cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
# every launch sets enable_fp_fusion, so a change of its default does not matter
warnings.filterwarnings("ignore", message=".*FP_FUSION.*")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastle.kernels import (  # noqa: E402
    crop_resize_triton,
    halving_conv_triton,
    mask_fill_triton,
    random_mask,
    random_mask_triton,
    sigreg_triton,
)
from fastle.kernels.sigreg_knots import Knots  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# name → (kernel, compile-time arguments, options)
Kernels = dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]


def sigreg_kernels(knots: int) -> Kernels:
    """Every kernel that SIGReg launches for K knots."""
    grid = Knots(3.0, knots)
    _, groups = sigreg_triton.group_blocks(grid)
    finish_tile = {"BS": sigreg_triton.FINISH_BS, "BM": sigreg_triton.FINISH_BM}
    warps = {"num_warps": sigreg_triton.WARPS, "enable_fp_fusion": True}
    kernels: Kernels = {}
    for weighted in (False, True):
        suffix = ", weighted" if weighted else ""
        options = sigreg_triton.program_constants(grid, weighted=weighted)
        for whole in (False, True) if groups == 1 else (False,):
            name = f"sums{', one launch' if whole else ''}{suffix}"
            kernels[name] = sigreg_triton._sums_kernel, options | {"WHOLE": whole}, warps
        kernels[f"finish{suffix}"] = (
            sigreg_triton._finish_kernel,
            {"REACH": grid.reach, "WEIGHTED": weighted} | finish_tile,
            {"num_warps": sigreg_triton.FINISH_WARPS, "enable_fp_fusion": True},
        )
        for statistic in (False, True):
            name = f"gradient{'' if statistic else ' of deviations'}{suffix}"
            gradient = {"STATISTIC": statistic, "ADD": groups > 1}
            kernels[name] = sigreg_triton._gradient_kernel, options | gradient, warps
    return kernels


def view_kernels(inner: int) -> Kernels:
    """The kernels that the operators on images launch for three views of 128 px with `inner` interleaved channels."""
    layout = ", channels-last" if inner > 1 else ""
    views = {"INNER": inner, "VIEWS": 3}
    crop, fill, mask = crop_resize_triton, mask_fill_triton, random_mask_triton
    kernels: Kernels = {}
    for varies in (False, True):
        boxes = views | {"VARIES_H": varies, "VARIES_W": varies, "BE": crop.MAX_COLUMNS}
        name = f"{', boxes of any size' if varies else ''}{layout}"
        rows = {"SCALED": False, "BI": crop.TILE // crop.MAX_COLUMNS}
        kernels[f"crop_resize{name}"] = crop._forward_kernel, boxes | rows, crop.OPTIONS
        pixels = {"PIXELS": crop.PIXELS, "ZERO_ROWS": crop.ZERO_ROWS}
        kernels[f"crop_resize gradient{name}"] = crop._backward_kernel, boxes | pixels, crop.OPTIONS
    channels = 1 if inner == 1 else 4
    for held, values in ((True, fill.MAX_HELD), (False, fill.BLOCK)):
        for adjoint in (False, True):
            name = f"mask_fill{' gradient' if adjoint else ''}{'' if held else ', large'}{layout}"
            constants = views | {"ADJOINT": adjoint, "HELD": held, "BP": values // channels, "BI": channels}
            warps = {"num_warps": fill.num_warps(values), "enable_fp_fusion": True}
            kernels[name] = fill._fill_kernel, constants, warps
    for patch in (1, 4, 0):
        bits = {"LOW_BITS": 7, "HIGH_BITS": 7, "ROUNDS": random_mask.ROUNDS}
        constants = {"PATCH": patch, "VIEWS": 3, "BP": mask.BP, "BI": channels} | bits
        name = f"mask {f'patches of {patch}' if patch else 'channels'}{layout}"
        kernels[name] = mask._mask_kernel, constants, {"num_warps": mask.WARPS, "enable_fp_fusion": True}
    return kernels


def convolution_kernels() -> Kernels:
    """The kernels of the halving convolution of images with three channels, for 128 outputs, in bf16."""
    conv = halving_conv_triton
    tile, images = conv.constants(16, 128), conv.constants(16, 128, conv.IMAGES_BN)
    return {
        "halving_conv": (conv._forward_kernel, tile, conv.OPTIONS),
        "halving_conv to images": (conv._images_kernel, images | {"ROWS": conv.ROWS}, conv.IMAGES_OPTIONS),
        "halving_conv to weight": (conv._weight_kernel, tile, conv.OPTIONS),
    }


KINDS = {"step": "fp32", "scale": "fp32", "deviations_ptr": "*fp64", "gw_ptr": "*fp32"} | dict.fromkeys(
    ("top_ptr", "left_ptr", "heights_ptr", "widths_ptr", "seeds_ptr"), "*i64"
)


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> Any:
    names = kernel.arg_names
    kinds = KINDS | ({"gradient_ptr": "*fp64"} if constants.get("STATISTIC") is False else {})
    convolution = "KP" in constants
    pointer = "*bf16" if convolution else "*fp32"
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, pointer if name.endswith("_ptr") else "i32")
        for name in names
    }
    # a launch specialises on sizes and pointers that are multiples of 16
    sizes = ("M", "H", "W", "OH", "OW", *(("N", "K", "SB", "SI", "SN") if convolution else ()))
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in sizes or name.endswith("_ptr")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert match is not None, usage
    registers, stack, shared, local = map(int, match.groups())
    instructions = [
        (int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", code)
    ]
    names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for _, text in instructions]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spill_instructions": sum(name in ("STL", "LDL") for name in names),
        "atomics": sum(name.startswith(("ATOM", "RED")) and name != "REDUX" for name in names),
        "shared_bytes": shared,
        "instructions": sum(name != "NOP" for name in names),
        "loop_instructions": longest_loop(instructions),
    }


def longest_loop(instructions: list[tuple[int, str]]) -> int:
    """Instructions in the body of the longest loop, from the target of a backward branch to the branch."""
    longest = 0
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            start = int(branch[1], 16)
            longest = max(longest, sum(start <= other <= address for other, _ in instructions))
    return longest


def amd_resources(assembly: str) -> dict[str, int]:
    def note(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match is not None, name
        return int(match[1])

    return {
        "registers": note("vgpr_count"),
        "stack": note("private_segment_fixed_size"),
        "local": 0,
        # a scalar register spills into lanes of a vector register, not into memory. if those run out, it takes stack
        "spill_instructions": note("vgpr_spill_count"),
        "scalar_spills": note("sgpr_spill_count"),
        "shared_bytes": note("group_segment_fixed_size"),
    }


def measure(kernels: Kernels, labels: dict[str, Any], architectures: list[str]) -> list[dict[str, Any]]:
    rows = []
    for architecture in architectures:
        target = TARGETS[architecture]
        for name, (kernel, constants, options) in kernels.items():
            code = compiled(kernel, constants, options, target).asm
            usage = nvidia_resources(code["cubin"]) if "cubin" in code else amd_resources(code["amdgcn"])
            row: dict[str, Any] = labels | {"architecture": architecture, "kernel": name} | usage
            if "BM" in constants and "loop_instructions" in usage:
                angles = constants["BN"] * constants["BM"] / (32 * options["num_warps"])
                row["loop_per_angle"] = usage["loop_instructions"] / angles
                row["loop_per_angle_and_knot"] = row["loop_per_angle"] / (labels["knots"] - 1)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--knots", type=int, nargs="+", default=[17], metavar="K")
    parser.add_argument("--architectures", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    rows = []
    for knots in options.knots:
        rows += measure(sigreg_kernels(knots), {"operator": "sigreg", "knots": knots}, options.architectures)
    for inner in (1, 3):
        rows += measure(view_kernels(inner), {"operator": "views"}, options.architectures)
    rows += measure(convolution_kernels(), {"operator": "halving_conv"}, options.architectures)
    print(f"{'K':>4} target   {'kernel':54} registers spills  stack   code   loop a knot")
    for row in rows:
        print(
            f"{row.get('knots', ''):4} {row['architecture']:8} {row['kernel']:54} {row['registers']:9} "
            f"{row['spill_instructions']:6} {row['stack']:6} {row.get('instructions', ''):6} "
            f"{row.get('loop_per_angle', ''):6} {row.get('loop_per_angle_and_knot', ''):6.4}"
        )
    if options.json:
        report = {"command": ["scripts/kernel_resources.py", *sys.argv[1:]], "triton": triton.__version__, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
