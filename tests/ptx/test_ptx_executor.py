"""The PTX executor itself, on kernels of a few lines: what it computes, and that it refuses what a GPU would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx.arithmetic import UnknownInstruction
from tests.ptx.executor import DeviceAssert, Divergence, execute
from tests.ptx.memory import GlobalMemory, MemoryFault
from tests.ptx.parser import ParseError, parse

THREADS = 64
HEAD = """
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.extern .func __assertfail ( .param .b64 a, .param .b64 b ) .noreturn;
.global .align 1 .b8 message[3] = {110, 111, 33};
"""
# a thread's number is %r1, its place in the output %rd3
START = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r8, %ctaid.x;
    mad.lo.s32 %r9, %r8, 64, %r1;
    ld.param.b64 %rd1, [kernel_param_0];
    mad.wide.u32 %rd3, %r9, 4, %rd1;
"""
DONE = "\n    st.global.b32 [%rd3+0], %r2;\n    ret;\n"


def module(body: str) -> str:
    registers = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;"
    parameters = ".param .u64 .ptr .global .align 1 kernel_param_0,\n.param .f32 kernel_param_1\n"
    return f"{HEAD}.visible .entry kernel(\n{parameters})\n.reqntid {THREADS}\n{{\n{registers}\n{body}\n}}\n"


def run(body: str, *, ctas: int = 2, shared: int = 1024, size: int | None = None, factor: float = 0.0) -> Tensor:
    """What the threads write, one int32 each, when START and `body` are run."""
    result = torch.full((ctas * THREADS if size is None else size,), -1, dtype=torch.int32)
    memory = GlobalMemory()
    arguments = [memory.place(result), factor]
    execute(parse(module(START + body)), memory, grid=(ctas,), threads=THREADS, shared=shared, arguments=arguments)
    return result


def of_threads(body: str) -> list[int]:
    """%r2 of the threads of one CTA."""
    return run(body + DONE, ctas=1).tolist()


def of_one(body: str) -> int:
    return of_threads(body)[0]


# control flow


def test_diverged_threads_meet_again() -> None:
    # a loop of as many rounds as the thread's number, then a barrier for all
    body = """
        mov.b32 %r2, 0;
    $again:
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra $done;
        add.s32 %r2, %r2, 1;
        bra.uni $again;
    $done:
        bar.sync 0;
    """
    assert of_threads(body) == list(range(THREADS))


def test_every_cta_has_its_number() -> None:
    assert run("mov.u32 %r2, %ctaid.x;" + DONE, ctas=200).view(200, THREADS).tolist() == [
        [i] * THREADS for i in range(200)
    ]


def test_a_predicate_holds_back_the_threads_that_it_excludes() -> None:
    body = "mov.b32 %r2, 7; setp.lt.u32 %p1, %r1, 3; @!%p1 mov.b32 %r2, 8;"
    assert of_threads(body) == [7] * 3 + [8] * 61


def test_a_barrier_that_some_threads_miss() -> None:
    with pytest.raises(Divergence, match=r"kernel: some threads of a CTA do not come to a barrier, in bar\.sync 0"):
        run("setp.lt.u32 %p1, %r1, 32; @%p1 bra $over; bar.sync 0;\n$over:\n" + "mov.b32 %r2, 0;" + DONE)


def test_a_kernel_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.executor.MOST_STEPS", 1000)
    with pytest.raises(Divergence, match="kernel does not end"):
        run("$again:\n bra.uni $again;")
    with pytest.raises(Divergence, match="kernel: a thread goes past the last instruction"):
        run("add.s32 %r2, %r1, 1;")


def test_a_failed_assertion_tells_its_message() -> None:
    call = "mov.b64 %rd4, message; st.param.b64 [param0], %rd4; call.uni __assertfail, (param0);"
    with pytest.raises(DeviceAssert, match="no!"):
        run("{ .param .b64 param0;" + call + "} trap;")


# memory


@pytest.mark.parametrize(
    ("access", "says"),
    [
        ("st.global.b32 [%rd3+4], %r1;", "store of 4 bytes out of bounds at 0x[0-9a-f]+: byte 512 of a tensor of 512"),
        ("ld.global.b32 %r2, [%rd3+-4];", "load of 4 bytes out of bounds"),
        ("ld.global.b32 %r2, [%rd3+2];", "misaligned load of 4 bytes"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd3];", "misaligned load of 8 bytes"),
        ("mov.b64 %rd4, 64; st.global.b8 [%rd4], %rs1;", "in no tensor"),
        ("ld.shared.b32 %r2, [global_smem+1024];", "shared load of 4 bytes out of bounds"),
        ("mov.b32 %r3, -4; st.shared.b32 [%r3], %r1;", "shared store of 4 bytes out of bounds"),
        ("ld.shared::cta.b64 %rd4, [global_smem+4];", "misaligned shared load of 8 bytes"),
    ],
)
def test_an_access_out_of_place_names_kernel_address_and_instruction(access: str, says: str) -> None:
    with pytest.raises(MemoryFault, match=f"kernel: .*{says}") as caught:
        run(access + DONE)
    assert access.split(";")[-2].strip() in str(caught.value)


def test_an_access_that_is_held_back_is_not_checked() -> None:
    assert of_one("setp.lt.u32 %p1, %r1, 0; mov.b32 %r2, 5; @%p1 ld.global.b32 %r2, [%rd3+4000];") == 5


def test_tensors_are_apart() -> None:
    # two halves of one tensor, of which the kernel is given the first
    both, memory = torch.zeros(2 * THREADS, dtype=torch.int32), GlobalMemory()
    starts = [memory.place(half) for half in both.chunk(2)]
    assert memory.place(both[:THREADS]) == starts[0] != starts[1]
    with pytest.raises(MemoryFault, match="out of bounds"):
        execute(
            parse(module(START + "mov.b32 %r2, 1;" + DONE)),
            memory,
            grid=(2,),
            threads=THREADS,
            shared=0,
            arguments=starts[:1],
        )


def test_memory_that_nobody_wrote_is_nan() -> None:
    assert np.isnan(np.uint32(of_one("ld.shared.b32 %r2, [global_smem];") & 0xFFFFFFFF).view(np.float32))
    assert np.isnan(np.uint32(of_one("mov.b32 %r2, %r50;") & 0xFFFFFFFF).view(np.float32))


SWAP = """
    shl.b32 %r3, %r1, 2; xor.b32 %r4, %r3, {};
    st.shared.b32 [%r3], %r1; {} ld.shared.b32 %r2, [%r4]; {} st.shared.b32 [%r3], %r2;
"""


def test_warps_exchange_across_a_barrier() -> None:
    assert of_threads(SWAP.format(128, "bar.sync 0;", "bar.sync 0;")) == [i ^ 32 for i in range(THREADS)]


@pytest.mark.parametrize(
    ("barriers", "says"),
    [(("", "bar.sync 0;"), "what another warp stored"), (("bar.sync 0;", ""), "what another warp read")],
)
def test_a_missing_barrier(barriers: Sequence[str], says: str) -> None:
    with pytest.raises(MemoryFault, match=says):
        run(SWAP.format(128, *barriers) + DONE)
    # within a warp there is no need of one
    assert of_threads(SWAP.format(4, *barriers)) == [i ^ 1 for i in range(THREADS)]


@pytest.mark.parametrize(("width", "register"), [("b64", "%rd4"), ("b32", "%r4")])
def test_parameters_are_values_and_have_addresses(width: str, register: str) -> None:
    body = f"mov.{width} {register}, kernel_param_1; ld.param.b32 %r2, [{register}];" + DONE
    assert run(body, factor=1.5).view(torch.float32).tolist() == [1.5] * 128


# between threads


def test_shuffle() -> None:
    assert of_threads("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;") == [i ^ 5 for i in range(THREADS)]
    assert of_threads("shfl.sync.idx.b32 %r2, %r1, 5, 31, -1;") == [5] * 32 + [37] * 32
    for kind in ("bfly", "idx"):
        with pytest.raises(Divergence, match="not there"):
            run(f"setp.lt.u32 %p1, %r1, 3; @%p1 shfl.sync.{kind}.b32 %r2, %r1, 4, 31, -1;" + DONE)


def test_reduction_of_a_warp() -> None:
    assert of_threads("redux.sync.max.s32 %r2, %r1, -1;") == [31] * 32 + [63] * 32
    assert of_threads("redux.sync.min.u32 %r2, %r1, -1;") == [0] * 32 + [32] * 32
    with pytest.raises(Divergence, match="missing"):
        run("setp.lt.u32 %p1, %r1, 3; @%p1 redux.sync.max.s32 %r2, %r1, -1;" + DONE)


def test_matrices_through_shared_memory() -> None:
    # rows in the order of lanes; a lane's part of row r is at 4 · (lane % 4), so that what is stored is what is read
    body = """
        shl.b32 %r3, %r1, 4;
        shl.b32 %r4, %r1, 1;
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r3], {%r1, %r4};
        ld.shared.b32 %r5, [%r3];
        ldmatrix.sync.aligned.m8n8.x2.shared::cta.b16 {%r6, %r2}, [%r3];
        and.b32 %r7, %r1, 15;
        setp.lt.u32 %p1, %r7, 8;
        @%p1 mov.b32 %r2, %r5;
    """
    # row i % 8 of the first matrix begins with the register of lane 4 · i
    expected = [i // 32 * 32 + 4 * (i % 8) if i % 16 < 8 else 2 * i for i in range(THREADS)]
    found = of_threads(body)
    assert [f for i, f in enumerate(found) if i % 32 < 16] == [e for i, e in enumerate(expected) if i % 32 < 16]
    with pytest.raises(MemoryFault, match="aligned to 16"):
        run("shl.b32 %r3, %r1, 3; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r1};" + DONE)


@pytest.mark.parametrize(("store", "load"), [(".trans", ""), ("", ".trans")])
def test_a_matrix_may_be_transposed(store: str, load: str) -> None:
    # thread i has the numbers 2 · i and 2 · i + 1
    body = f"""
        shl.b32 %r3, %r1, 4;
        mad.lo.s32 %r4, %r1, 131074, 65536;
        stmatrix.sync.aligned.m8n8.x1{store}.shared.b16 [%r3], {{%r4}};
        ldmatrix.sync.aligned.m8n8.x1{load}.shared.b16 {{%r2}}, [%r3];
    """
    matrices = np.arange(2 * THREADS, dtype=np.int16).reshape(-1, 8, 8)
    expected = np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.int32).ravel()
    assert of_threads(body) == expected.tolist()


# of each warp, one after the other: A [16, 16], B [16, 8] and C [16, 8], where a row of A or C has 32 bytes. %r3 is
# where they begin, %r4 a thread's lane, %rd4 and %rd5 where its first numbers of A and of C are by the PTX ISA
PIECES = """
    shr.u32 %r3, %r1, 5; mul.lo.s32 %r3, %r3, 1280; and.b32 %r4, %r1, 31;
    shr.u32 %r5, %r4, 2; mad.lo.s32 %r5, %r5, 32, %r3; and.b32 %r6, %r4, 3;
    mad.lo.s32 %r7, %r6, 4, %r5; cvt.u64.u32 %rd4, %r7; add.s64 %rd4, %rd4, %rd1;
    mad.lo.s32 %r7, %r6, 8, %r5; cvt.u64.u32 %rd5, %r7; add.s64 %rd5, %rd5, %rd1;
"""
# a B that is written column by column is read as A is
FROM_GLOBAL = """
    ld.global.b32 %r10, [%rd4]; ld.global.b32 %r11, [%rd4+256];
    ld.global.b32 %r12, [%rd4+16]; ld.global.b32 %r13, [%rd4+272];
    ld.global.b32 %r14, [%rd4+512]; ld.global.b32 %r15, [%rd4+528];
"""
# all of A and B, 24 bytes by each thread, to shared memory; then four matrices of 8 × 8 as quarters of A, two of B's
FROM_SHARED = """
    mad.lo.s32 %r7, %r4, 24, %r3; cvt.u64.u32 %rd6, %r7; add.s64 %rd6, %rd6, %rd1;
    ld.global.b64 %rd7, [%rd6]; ld.global.b64 %rd8, [%rd6+8]; ld.global.b64 %rd9, [%rd6+16];
    st.shared.b64 [%r7], %rd7; st.shared.b64 [%r7+8], %rd8; st.shared.b64 [%r7+16], %rd9;
    and.b32 %r5, %r4, 15; mad.lo.s32 %r6, %r5, 16, %r3; mad.lo.s32 %r5, %r5, 32, %r3;
    shr.u32 %r4, %r4, 4; mad.lo.s32 %r5, %r4, 16, %r5;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r6+512];
"""
PRODUCT = """
    ld.global.v2.b32 {{%r20, %r21}}, [%rd5+768]; ld.global.v2.b32 {{%r22, %r23}}, [%rd5+1024];
    mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32
        {{ %r20, %r21, %r22, %r23 }}, {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r20, %r21, %r22, %r23 }};
    st.global.v2.b32 [%rd5+768], {{%r20, %r21}}; st.global.v2.b32 [%rd5+1024], {{%r22, %r23}};
    ret;
"""


@pytest.mark.parametrize(
    ("wait", "found"),
    [("", [-1, -1]), ("cp.async.wait_group 1;", [7, -1]), ("cp.async.wait_group 0;", [7, 0])],
    ids=["none", "one", "all"],
)
def test_a_copy_is_there_when_it_was_waited_for(wait: str, found: list[int]) -> None:
    # the second copies nothing, which is zeros
    body = f"""
        mov.b32 %r2, 7; st.global.b32 [%rd3], %r2; mul.lo.s32 %r3, %r1, 8; mov.b32 %r4, 4; mov.b32 %r5, 0;
        cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r4; cp.async.commit_group;
        cp.async.ca.shared.global [ %r3 + 4 ], [ %rd3 + 0 ], 0x4, %r5; cp.async.commit_group;
        {wait}
        ld.shared.b32 %r2, [%r3+PLACE];
    """
    assert [of_one(body.replace("PLACE", place)) for place in ("0", "4")] == found


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("shared", [False, True], ids=["global", "ldmatrix"])
def test_the_product_of_matrices(shared: bool, kind: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    # numbers of 8 bits, whose products and sums are exact in fp32
    a, b, c = (generator.integers(-99, 99, (2, 16, n)) / 8 for n in (16, 8, 8))
    pieces = torch.zeros(2, 1280, dtype=torch.uint8)
    pieces[:, :512].view(dtype)[:] = torch.from_numpy(a).flatten(1)
    pieces[:, 512:768].view(dtype)[:] = torch.from_numpy(b if shared else b.transpose(0, 2, 1)).flatten(1)
    pieces[:, 768:].view(torch.float32)[:] = torch.from_numpy(c).flatten(1)
    memory = GlobalMemory()
    body = START + PIECES + (FROM_SHARED if shared else FROM_GLOBAL) + PRODUCT.format(kind)
    execute(parse(module(body)), memory, grid=(1,), threads=THREADS, shared=2560, arguments=[memory.place(pieces)])
    assert np.array_equal(pieces[:, 768:].view(torch.float32).view(2, 16, 8), a @ b + c)


def test_a_product_needs_the_whole_warp() -> None:
    numbers = "{%r2, %r3, %r4, %r5}"
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {numbers}, {numbers}, {{%r2, %r3}}, {numbers};"
    with pytest.raises(Divergence, match="missing"):
        run(f"setp.lt.u32 %p1, %r1, 3; @%p1 {product}" + DONE)


# arithmetic: bits, as unsigned numbers


def f32(value: float) -> str:
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


def f64(value: float) -> str:
    return f"0d{int(np.float64(value).view(np.uint64)):016X}"


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


ARITHMETIC = [
    ("add.s32 %r2, 2147483647, 1;", -(2**31)),
    ("mul.lo.s32 %r2, 65537, 65537;", 131073),
    ("mul.hi.u32 %r2, -1, 3;", 2),
    ("mul.hi.s32 %r2, -1, 3;", -1),
    ("mad.lo.s32 %r2, 3, 4, -1;", 11),
    ("mul.wide.s32 %rd4, -2, 3; cvt.u32.u64 %r2, %rd4;", -6),
    ("mul.wide.u32 %rd4, -1, 2; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4;", 1),
    ("div.s32 %r2, -7, 2;", -3),
    ("rem.s32 %r2, -7, 2;", -1),
    ("div.u32 %r2, -2, 2;", 2**31 - 1),
    ("shr.s32 %r2, -8, 1;", -4),
    ("shr.u32 %r2, -8, 1;", 2**31 - 4),
    ("shr.s32 %r2, -8, 40;", -1),
    ("shl.b32 %r2, 1, 32;", 0),
    ("bfe.u32 %r2, 240, 4, 3;", 7),
    ("bfe.s32 %r2, 240, 4, 3;", -1),
    ("prmt.b32 %r2, 0x44332211, 0x88776655, 0x0504U;", 0x11661155),
    ("prmt.b32 %r2, 0x00000080, 0, 0x888F;", -256),
    ("min.s32 %r2, -1, 1;", -1),
    ("min.u32 %r2, -1, 1;", 1),
    ("not.b32 %r2, 0;", -1),
    ("setp.lt.s32 %p1, -1, 1; setp.lt.u32 %p2, -1, 1; and.pred %p3, %p1, %p2; selp.b32 %r2, 1, 2, %p3;", 2),
    ("setp.lt.s32 %p1, -1, 1; setp.lt.u32 %p2, -1, 1; xor.pred %p3, %p1, %p2; selp.b32 %r2, 1, 2, %p3;", 1),
    ("cvt.s64.s32 %rd4, -5; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4;", -1),
    ("cvt.u64.u32 %rd4, -5; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4;", 0),
    ("mov.b32 %r3, 0x12345678; mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r2, {%rs2, %rs1};", 0x56781234),
    ("mov.b64 %rd4, {1, 2}; mov.b64 {_, %r2}, %rd4;", 2),
    # 1 + 2⁻¹², squared and less 1 + 2⁻¹¹, is 2⁻²⁴: lost, were the product rounded
    (f"fma.rn.f32 %r2, {f32(1 + 2**-12)}, {f32(1 + 2**-12)}, {f32(-1 - 2**-11)};", bits(2**-24)),
    (f"mul.f32 %r2, {f32(1e-30)}, {f32(1e-10)};", bits(np.float32(1e-30) * np.float32(1e-10))),
    (f"mul.ftz.f32 %r2, {f32(1e-30)}, {f32(-1e-10)};", bits(-0.0)),
    (f"min.f32 %r2, {f32(np.nan)}, {f32(2)};", bits(2)),
    (f"max.f32 %r2, {f32(-1)}, {f32(2)};", bits(2)),
    (f"max.NaN.f32 %r3, {f32(np.nan)}, {f32(2)}; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r2, 1, 0, %p1;", 1),
    (f"min.NaN.xorsign.abs.f32 %r2, {f32(-3)}, {f32(2)};", bits(-2)),
    (f"copysign.f32 %r2, {f32(-3)}, {f32(2)};", bits(-2)),
    (f"div.full.f32 %r2, {f32(1)}, {f32(3)};", bits(1 / 3)),
    (f"ex2.approx.ftz.f32 %r2, {f32(-1)};", bits(0.5)),
    (f"setp.lt.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 %r2, 1, 0, %p1;", 0),
    (f"setp.ltu.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 %r2, 1, 0, %p1;", 1),
    (f"setp.ne.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 %r2, 1, 0, %p1;", 0),
    (f"cvt.rzi.s32.f32 %r2, {f32(-1.7)};", -1),
    (f"cvt.rzi.s32.f32 %r2, {f32(1e20)};", 2**31 - 1),
    (f"cvt.rzi.u32.f32 %r2, {f32(-5)};", 0),
    (f"cvt.rmi.ftz.f32.f32 %r2, {f32(-1.2)};", bits(-2)),
    ("cvt.rn.f32.s32 %r2, -3;", bits(-3)),
    (f"mov.b64 %rd4, {f64(1 / 3)}; cvt.rn.f32.f64 %r2, %rd4;", bits(1 / 3)),
    # to the even of two neighbours; 1 + 2⁻⁸ lies between 1 and 1 + 2⁻⁷
    (f"cvt.rn.bf16x2.f32 %r2, {f32(1 + 2**-8)}, {f32(1 + 3 * 2**-8)};", 0x3F803F82),
    (f"cvt.rn.f16x2.f32 %r2, {f32(1)}, {f32(-2)};", 0x3C00C000),
    (f"cvt.rn.bf16.f32 %rs1, {f32(1.5)}; sub.rn.f32.bf16 %r2, %rs1, {f32(0.25)};", bits(1.25)),
    (f"cvt.rn.f16.f32 %rs1, {f32(1.5)}; fma.rn.f32.f16 %r2, %rs1, %rs1, {f32(3)};", bits(5.25)),
    (f"cvt.rn.bf16.f32 %rs1, {f32(1.5)}; cvt.f32.bf16 %r2, %rs1;", bits(1.5)),
    (
        f"mov.b64 %rd4, {{{f32(1)}, {f32(2)}}}; fma.rn.f32x2 %rd5, %rd4, %rd4, %rd4; mov.b64 {{_, %r2}}, %rd5;",
        bits(6),
    ),
]


@pytest.mark.parametrize(("body", "expected"), ARITHMETIC, ids=[body for body, _ in ARITHMETIC])
def test_arithmetic(body: str, expected: int) -> None:
    assert of_one(body) == expected


# what is not had


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r2, %r1;",
        "add.sat.s32 %r2, %r1, 1;",
        "setp.lt.and.s32 %p1, %r1, 2, %p2;",
        "cvt.rni.s32.f32 %r2, %r1;",
        "ld.local.b32 %r2, [%rd3];",
        "ld.global.v4.b32 {%r2, %r3}, [%rd3];",
        "shfl.sync.down.b32 %r2, %r1, 1, 31, -1;",
        "shfl.sync.idx.b32 %r2, %r1, 1, 15, -1;",
        "redux.sync.xor.b32 %r2, %r1, -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b8 {%r2}, [%r1];",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r8}, {_, _, _, _};",
        "atom.global.add.f32 %r2, [%rd3], %r1;",
        "add.s64 %rd4, %r1, 1;",
        "mov.u32 %r2, nothing;",
        "cvta.shared.u64 %rd4, %rd3;",
        "call.uni printf, (param0);",
    ],
)
def test_an_unknown_instruction_is_named(instruction: str) -> None:
    with pytest.raises(UnknownInstruction) as caught:
        run(instruction + DONE)
    assert "kernel: " in str(caught.value) and instruction.rstrip(";") in str(caught.value)


@pytest.mark.parametrize(
    "statement", ["mov.u32 %r2, %laneid;", "ADD %r2;", ".reg .b64 %r<3>;", "ld.global.b32 %r2, [%rd3*2];"]
)
def test_a_statement_that_is_not_understood_is_shown(statement: str) -> None:
    with pytest.raises(ParseError, match="kernel: "):
        parse(module(statement))


def test_one_kernel_a_module() -> None:
    with pytest.raises(ParseError, match="not of 0"):
        parse(HEAD)
