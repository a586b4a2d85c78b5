"""The CUDA code that torch.compile generates for a training step, without a GPU: layouts, atomics, launches, bytes."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.forecast.count import Launch, launches
from bench.forecast.generate import Counted, StepVariant, count
from bench.forecast.report import totals
from bench.forecast.roofline import GPUS, step_costs

pytest.importorskip("triton", reason="triton has no wheels for this machine")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mocked device is Linux's")

# Triton launches and GB of a step with batch 128; 129 and 15.7 were counted with torch 2.14
CEILING = 130, 15.8
TORCH = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def step() -> Counted:
    """The step of CelebA by the default recipe, masked, latent 512, bf16. It takes a minute of a core."""
    return count(StepVariant(setting="celeba-masked-512-tuned"))


def test_codegen_adds_nothing_atomically(step: Counted) -> None:
    assert [launch.name for launch in step.launches if launch.atomics] == []


def test_codegen_convolutions_are_channels_last(step: Counted) -> None:
    assert sum(launch.kind == "convolution" for launch in step.launches) >= 20
    turned = sum(launch.contiguous_bytes for launch in step.launches)
    shapes = [(launch.name, launch.contiguous) for launch in step.launches if launch.contiguous]
    # a gradient of 16x16 pixels comes to a convolution's backward as a Linear wrote it. Inductor of torch 2.14 turns it
    # in a kernel of its own, that of 2.11 and 2.15 leaves it to cuDNN
    assert turned <= (0 if TORCH == "2.14" else 0.003 * totals(step)["bytes"]), shapes


def test_codegen_layouts_are_never_turned(step: Counted) -> None:
    assert [launch.name for launch in step.launches if launch.copies_layout] == []


def test_codegen_no_convolution_has_the_channels_of_an_image(step: Counted) -> None:
    narrow = [launch for launch in step.launches if launch.kind == "convolution" and 3 in launch.channels]
    assert [(launch.name, launch.channels) for launch in narrow] == []


def test_codegen_launches_and_bytes_stay_below_their_ceilings(step: Counted) -> None:
    counted, (most, gigabytes) = totals(step), CEILING
    assert 0.5 * most < counted["triton_launches"] <= most
    assert 0.5 * gigabytes < counted["triton_bytes"] / 1e9 <= gigabytes


def test_codegen_operations_are_those_of_the_method(step: Counted) -> None:
    # what PyTorch's counter counts of the eager step, on the CPU
    assert totals(step)["flop"] / 128 == pytest.approx(55.5e9, rel=0.01)


CODE = """
triton_poi_fused_a = async_compile.triton('triton_poi_fused_a', '''
    inductor_meta={'kernel_num_gb': 0.25}
    tl.atomic_add(out_ptr0 + (x0), tmp0, xmask, sem='relaxed')
''', device_str='cuda')
class Runner:
    def call(self, args):
        x, w = args
        assert_size_stride(x, (8, 32, 64, 64), (131072, 4096, 64, 1), 'input')
        with torch.cuda._DeviceGuard(0):
            assert_size_stride_grouped((w, bias), ((16, 32, 3, 3), (16, )), ((288, 1, 96, 32), (1, )), 'input')
            # Topologically Sorted Source Nodes: [conv], Original ATen: [aten.convolution]
            buf0 = extern_kernels.convolution(x, w, stride=(2, 2), padding=(1, 1), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, bias=None)
            assert_tensor_metadata(buf0, (8, 16, 32, 32), (16384, 1, 512, 16), torch.bfloat16, 'aten.convolution')
            buf1 = empty_strided_cuda((8, 32, 64, 64), (131072, 1, 2048, 32), torch.bfloat16)
            # Topologically Sorted Source Nodes: [turn], Original ATen: [aten.clone]
            raw_stream0 = get_raw_stream(0)
            triton_poi_fused_a.run(x, buf1, 1048576, stream=raw_stream0)
            assert_size_stride(y, (131072, 10), (10, 1), 'input')
            buf2 = empty_strided_cuda((8, 10), (10, 1), torch.bfloat16)
            extern_kernels.mm(reinterpret_tensor(buf1, (8, 131072), (131072, 1), 0), y, out=buf2)
            buf3 = torch.ops.aten.convolution_backward.default(buf0, x, w, [16], (2, 2), (1, 1), (1, 1), False, (0, 0), 1, [True, True, False])
"""  # noqa: E501


def read(code: str) -> list[Launch]:
    sizes = {"x": 2, "w": 2, "y": 2}
    return launches(code, "forward", phases={"conv": "encode", "turn": "decode"}, item_sizes=sizes)


def test_a_convolution_is_counted_with_its_layout() -> None:
    convolution = next(launch for launch in read(CODE) if launch.kind == "convolution")
    assert convolution.phase == "encode"
    assert convolution.flop == 2 * 8 * 32 * 32 * 16 * 32 * 9
    assert convolution.bytes == 2 * (8 * 32 * 64 * 64 + 16 * 32 * 9 + 8 * 16 * 32 * 32)
    # the result and the weight are channels-last, or small
    assert convolution.contiguous == ((8, 32, 64, 64),)


def test_atomics_and_turned_layouts_are_seen() -> None:
    code = CODE.replace("            extern_kernels.mm(", "            ignored(")
    (kernel,) = (launch for launch in read(code) if launch.kind == "triton")
    assert (kernel.phase, kernel.bytes, kernel.atomics, kernel.copies_layout) == ("decode", 250_000_000, 1, True)
    # what a Linear reads may lie as the Linear wants it
    (kernel,) = (launch for launch in read(CODE) if launch.kind == "triton")
    assert not kernel.copies_layout


def test_a_backward_convolution_is_two_launches() -> None:
    kinds = [launch.name for launch in read(CODE) if "gradient" in launch.name]
    assert kinds == ["convolution, gradient of its images", "convolution, gradient of its weight"]


def test_a_roofline_is_the_longer_of_bytes_and_operations() -> None:
    gpu = GPUS["H100"]
    few, many = (
        Launch(
            kind="convolution", name="c", phase="encode", direction="forward", bytes=10**9, flop=flop, channels=(8, 8)
        )
        for flop in (10**6, 10**13)
    )
    encode, *_, step = step_costs(Counted([few], 0), gpu)
    assert encode.bound == pytest.approx(1e9 / gpu.bandwidth) and step.forecast > step.bound
    assert gpu.bf16 is not None
    assert step_costs(Counted([many], 0), gpu)[0].bound == pytest.approx(1e13 / gpu.bf16)
