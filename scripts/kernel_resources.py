"""Compiles the Triton kernels for several GPUs, without having one, and prints registers, spills and instructions.

    python scripts/kernel_resources.py [--json FILE]

The figures are static counts, not timings. For NVIDIA's GPUs they come from the machine code, for AMD's gfx942 from
the compiler's metadata. K is SIGReg's number of knots; `loop` counts the instructions in its innermost loop for each
(n, m). The operators on images are compiled for three views of 128 px, the halving convolution for 128 outputs in bf16.
For SIGReg on B tests of N samples and M slices (`--shape`), `executed` is how many instructions all warps issue, in
millions, on the GPU that stands for the architecture: each loop's instructions times its rounds.
"""

from __future__ import annotations

import argparse
import json
import math
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
    products_triton,
    random_mask,
    random_mask_triton,
    sigreg_deviations_triton,
    sigreg_launch,
    sigreg_triton,
)
from fastle.kernels.sigreg_knots import Knots  # noqa: E402

# architecture → (a GPU of it, its multiprocessors)
GPUS = {
    "sm_75": ("T4", 40),
    "sm_80": ("A100", 108),
    "sm_86": ("RTX A6000", 84),
    "sm_89": ("RTX 4090", 128),
    "sm_90": ("H100", 132),
    "sm_100": ("B200", 148),
    "sm_120": ("RTX 5090", 170),
    "gfx942": ("MI300X", 304),
}
TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in GPUS if name.startswith("sm_")} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
# what fp64 units do, which consumer GPUs have few of
FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# name → (kernel, compile-time arguments, options)
Kernels = dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]


def launch_of(architecture: str) -> sigreg_launch.Launch:
    number = architecture.removeprefix("sm_")
    return sigreg_launch.launch_for((int(number[:-1]), int(number[-1])) if number.isdigit() else None)


def sigreg_kernels(knots: int, launch: sigreg_launch.Launch) -> Kernels:
    """Every kernel that SIGReg launches for K knots."""
    grid = Knots(3.0, knots)
    groups = sigreg_launch.group_constants(grid)
    warps = {"num_warps": launch.warps, "enable_fp_fusion": True}
    kernels: Kernels = {}
    for weighted in (False, True):
        suffix = ", weighted" if weighted else ""
        shared = {"WEIGHTED": weighted}
        for i, constants in enumerate(groups):
            group = f" {i + 1} of {len(groups)}" if len(groups) > 1 else ""
            for whole in (False, True) if len(groups) == 1 else (False,):
                sums = shared | {"FUNCTIONS": grid.basis_size, "WHOLE": whole, "CHUNK": sigreg_launch.CHUNK}
                name = f"sums{group}{', one launch' if whole else ''}{suffix}"
                kernels[name] = sigreg_triton._sums_kernel, constants | sums, warps
            for statistic in (False, True):
                name = f"gradient{group}{'' if statistic else ' of deviations'}{suffix}"
                kernels[name] = sigreg_triton._gradient_kernel, constants | shared | {"STATISTIC": statistic}, warps
        finish = sigreg_launch.knot_constants(grid) | shared | {"FUNCTIONS": grid.basis_size}
        for splits in (sigreg_launch.SHARED_SPLITS, sigreg_launch.SHARED_SPLITS + 1):
            tile = sigreg_launch.finish_constants(splits, launch, grid)
            options = warps | {"num_warps": tile.pop("num_warps")}
            kernels[finish_name(splits) + suffix] = sigreg_deviations_triton.finish_kernel, finish | tile, options
    return kernels


def finish_name(splits: int) -> str:
    return "finish" if splits <= sigreg_launch.SHARED_SPLITS else "finish of many splits"


def product_kernels() -> Kernels:
    """The kernels of a product of fp32 matrices on tensor cores."""
    products = products_triton
    split = {"PARTS": products.PARTS, "BLOCK": products.BLOCK}
    kernels: Kernels = {"split": (products._split_kernel, split, {"num_warps": 4})}
    for rows in products.ROWS:
        for name, strides in (("", {"stride_m": 1}), (" with a transposed factor", {"stride_k": 1})):
            tile = {"BN": rows, "BM": products.BM, "BK": products.BK} | strides
            kernels[f"product, tiles of {rows} rows{name}"] = products._product_kernel, tile, products.OPTIONS
    return kernels


def sigreg_rounds(shape: tuple[int, int, int], architecture: str, knots: int) -> dict[str, tuple[int, list[float]]]:
    """For a forward and a backward pass: kernel → (warps of all programs, rounds of its loops from the outermost)."""
    batch, samples, slices = shape
    grid, launch = Knots(3.0, knots), launch_of(architecture)
    groups = sigreg_launch.group_constants(grid)
    wanted = launch.programs * GPUS[architecture][1]
    tiles = batch * math.ceil(slices / sigreg_launch.BM)
    least = sigreg_launch.least_rows(samples, tiles * len(groups), GPUS[architecture][1])
    _, splits = sigreg_launch.split_rows(samples, tiles * len(groups), wanted, least)
    _, gradient_splits = sigreg_launch.split_rows(samples, tiles, wanted, sigreg_launch.FEWEST_ROWS)
    chunk = sigreg_launch.CHUNK
    rounds: dict[str, tuple[int, list[float]]] = {}
    for i in range(len(groups)):
        group = f" {i + 1} of {len(groups)}" if len(groups) > 1 else ""
        whole = ", one launch" if splits == 1 and len(groups) == 1 else ""
        chunks = math.ceil(samples / chunk)
        rounds[f"sums{group}{whole}"] = tiles * splits * launch.warps, [chunks / splits, samples / chunks]
        rounds[f"gradient{group}"] = tiles * gradient_splits * launch.warps, [samples / gradient_splits]
    if splits > 1 or len(groups) > 1:
        tile = sigreg_launch.finish_constants(splits, launch, grid)
        warps = batch * math.ceil(slices / tile["BM"]) * tile["num_warps"]
        rounds[finish_name(splits)] = warps, [math.ceil(splits / (tile["AT_ONCE"] * tile["BS"]))]
    return rounds


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
    """The kernels of the halving convolution of images of 128 px with three channels, for 128 outputs, in bf16."""
    conv = halving_conv_triton
    # blocks and weights are channels-last
    tile, images = (conv.constants(16, 128, 64, most) | {"SK": 1} for most in (conv.MAX_BN, conv.IMAGES_BN))
    return {
        "halving_conv": (conv._conv_forward_kernel, tile, conv.OPTIONS),
        "halving_conv to images": (conv._images_kernel, images, conv.OPTIONS),
        "halving_conv to weight": (conv._weight_kernel, tile, conv.OPTIONS),
    }


OPERATORS = ["sigreg", "products", "views", "halving_conv"]
KINDS = (
    {"scale": "fp32", "gw_ptr": "*fp32", "product_ptr": "*fp32"}
    | dict.fromkeys(("top_ptr", "left_ptr", "heights_ptr", "widths_ptr", "seeds_ptr"), "*i64")
    | dict.fromkeys(("a_parts_ptr", "b_parts_ptr"), "*bf16")
)


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> Any:
    names = kernel.arg_names
    # in convolutions and products of parts
    half = "KP" in constants or "BK" in constants
    pointer = "*bf16" if half else "*fp32"
    signature = {
        name: "constexpr" if name in constants else KINDS.get(name, pointer if name.endswith("_ptr") else "i32")
        for name in names
    }
    # a launch specialises on sizes and pointers that are multiples of 16
    sizes = {"M", "H", "W", "OH", "OW"}
    if half:
        sizes |= {"N", "K", "SB", "SI", "SN", "SR", "SC", "stride_k", "stride_m"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name in sizes or name.endswith("_ptr"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def nvidia_resources(cubin: bytes, rounds: list[float] | None = None) -> dict[str, Any]:
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
    full_names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in instructions]
    names = [name.split(".")[0] for name in full_names]
    times = executions(instructions, rounds or [])
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spill_instructions": sum(name in ("STL", "LDL") for name in names),
        "atomics": sum(name.startswith(("ATOM", "RED")) and name != "REDUX" for name in names),
        "barriers": names.count("BAR"),
        "fp64_instructions": sum(name.startswith(FP64) or ".F64" in name for name in full_names),
        "shared_bytes": shared,
        "instructions": sum(name != "NOP" for name in names),
        "loop_instructions": innermost_loop(instructions),
        "executed_by_a_warp": sum(count for count, name in zip(times, names, strict=True) if name != "NOP"),
    }


def loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """The addresses of the first and last instruction of each loop: the target of a backward branch, and the branch."""
    spans = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    return spans


def innermost_loop(instructions: list[tuple[int, str]]) -> int:
    """Instructions in the longest loop that has no other in it."""
    spans = loops(instructions)
    innermost = [loop for loop in spans if not any(loop[0] <= a and b <= loop[1] for a, b in spans if (a, b) != loop)]
    return max((sum(start <= at <= end for at, _ in instructions) for start, end in innermost), default=0)


def executions(instructions: list[tuple[int, str]], rounds: list[float]) -> list[float]:
    """How often a warp executes each instruction; `rounds` are those of its loops, from the outermost, else 1."""
    spans = loops(instructions)
    depths = [sum(start <= at <= end for start, end in spans) for at, _ in instructions]
    if rounds and max(depths) > len(rounds):
        raise SystemExit(f"the kernel has loops {max(depths)} deep, and rounds are known of {len(rounds)}")
    return [math.prod(rounds[:depth]) for depth in depths]


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


def measure(
    kernels: Kernels, labels: dict[str, Any], architecture: str, rounds: dict[str, tuple[int, list[float]]]
) -> list[dict[str, Any]]:
    rows = []
    for name, (kernel, constants, options) in kernels.items():
        code = compiled(kernel, constants, options, TARGETS[architecture]).asm
        warps, loop_rounds = rounds.get(name, (0, []))
        usage = nvidia_resources(code["cubin"], loop_rounds) if "cubin" in code else amd_resources(code["amdgcn"])
        row: dict[str, Any] = labels | {"architecture": architecture, "kernel": name} | usage
        by_a_warp = row.pop("executed_by_a_warp", 0)
        if warps and by_a_warp:
            row["executed"] = round(warps * by_a_warp)
        if "LIVE" in constants and "BN" in constants and "loop_instructions" in usage:
            angles = constants["BN"] * constants["BM"] / (32 * options["num_warps"])
            row["loop_per_angle"] = usage["loop_instructions"] / angles
            row["loop_per_angle_and_knot"] = row["loop_per_angle"] / (labels["knots"] - 1)
        rows.append(row)
    return rows


def shape_of(text: str) -> tuple[int, int, int]:
    batch, samples, slices = map(int, text.split("x"))
    return batch, samples, slices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--knots", type=int, nargs="+", default=[17], metavar="K")
    parser.add_argument("--shape", type=shape_of, default=(256, 128, 256), metavar="BxNxM", help="default: 256x128x256")
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90", "gfx942"], choices=list(TARGETS))
    parser.add_argument("--operators", nargs="+", default=OPERATORS, choices=OPERATORS)
    options = parser.parse_args()
    rows = []
    for architecture in options.architectures:
        if "sigreg" in options.operators:
            for knots in options.knots:
                kernels = sigreg_kernels(knots, launch_of(architecture))
                rounds = sigreg_rounds(options.shape, architecture, knots)
                rows += measure(kernels, {"operator": "sigreg", "knots": knots}, architecture, rounds)
        if "views" in options.operators:
            for inner in (1, 3):
                rows += measure(view_kernels(inner), {"operator": "views"}, architecture, {})
        if "products" in options.operators and launch_of(architecture).tensor_cores:
            rows += measure(product_kernels(), {"operator": "products"}, architecture, {})
        if "halving_conv" in options.operators:
            rows += measure(convolution_kernels(), {"operator": "halving_conv"}, architecture, {})
    print(f"{'K':>4} target   {'kernel':54} registers spills  stack   code   loop a knot executed")
    for row in rows:
        print(
            f"{row.get('knots', ''):4} {row['architecture']:8} {row['kernel']:54} {row['registers']:9} "
            f"{row['spill_instructions']:6} {row['stack']:6} {row.get('instructions', ''):6} "
            f"{row.get('loop_per_angle', ''):6} {row.get('loop_per_angle_and_knot', ''):6.4} "
            f"{row['executed'] / 1e6 if 'executed' in row else '':8.5}"
        )
    if options.json:
        report = {"command": ["scripts/kernel_resources.py", *sys.argv[1:]], "triton": triton.__version__, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
