"""SIGReg: its value, its gradient, its module, and its ranks."""

from __future__ import annotations

import copy
import io
import math
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.multiprocessing.spawn import spawn

from fastle.sigreg import SIGReg, draw_slices, sigreg
from tests import oracle


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def slices_of(dim: int, number: int, seed: int = 1) -> Tensor:
    return draw_slices(dim, number, Generator().manual_seed(seed)).double()


# value and gradient


def test_standard_normal_rows_score_about_1_05() -> None:
    # E (statistic) = Σ w_k (1 − φ_k²): the variance of the empirical characteristic function, times N
    step, expected = 3 / 16, 0.0
    for k in range(17):
        t = k * step
        weight = (step if k in (0, 16) else 2 * step) * math.exp(-t * t / 2)
        expected += weight * (1 - math.exp(-t * t))
    assert abs(expected - 1.05) < 0.01

    tests, n = 400, 2000
    z = torch.randn(tests, n, 2, generator=Generator().manual_seed(2))
    # every test on a slice of its own, so that all of them are independent
    slices = slices_of(2, tests).float()
    scores = torch.stack([sigreg(z[i], slices[:, i : i + 1]) for i in range(tests)])
    spread = float(scores.std()) / math.sqrt(tests)
    assert spread < 0.1
    assert abs(float(scores.mean()) - expected) < 4 * spread
    # and far from normal, it grows with N
    assert float(sigreg(z[0] + 1, slices)) > 100


@pytest.mark.parametrize("shape", [(6, 4), (1, 3), (33, 5)], ids=lambda s: "x".join(map(str, s)))
def test_value_and_gradient_equal_the_formulas(shape: tuple[int, int]) -> None:
    z, slices = made(*shape).requires_grad_(), slices_of(shape[1], 7)
    value = sigreg(z, slices)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value, oracle.sigreg(z, slices), rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, oracle.sigreg_gradient(z.detach(), slices), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("leading", [(3,), (2, 2)], ids=["3", "2x2"])
def test_leading_axes_are_averaged(leading: tuple[int, ...]) -> None:
    z, slices = made(*leading, 6, 4), slices_of(4, 5)
    tests = [oracle.sigreg(samples, slices) for samples in z.flatten(0, -3)]
    torch.testing.assert_close(sigreg(z, slices), torch.stack(tests).mean(), rtol=1e-11, atol=0)


def test_gradcheck() -> None:
    slices = slices_of(3, 4)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices), made(5, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices, knots=5, t_max=2.0), made(2, 4, 3).requires_grad_())


def test_options_reach_the_statistic() -> None:
    z, slices = made(6, 4), slices_of(4, 5)
    for t_max, knots in ((5.0, 17), (3.0, 10), (2.0, 33)):
        expected = oracle.sigreg_statistics(z, slices, t_max=t_max, knots=knots).mean()
        torch.testing.assert_close(sigreg(z, slices, t_max=t_max, knots=knots), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_autocast_keeps_fp32(dtype: torch.dtype) -> None:
    z, slices = made(64, 8).to(dtype).requires_grad_(), slices_of(8, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(z, slices)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    assert torch.equal(value, sigreg(z, slices))
    torch.testing.assert_close(value.double(), oracle.sigreg(z.detach().double(), slices.double()), rtol=1e-5, atol=0)


def test_zero_codes_and_zero_slices_give_no_nan() -> None:
    slices = slices_of(4, 5)
    slices[:, 1] = 0
    for z in (torch.zeros(6, 4), made(6, 4)):
        z.requires_grad_()
        value = sigreg(z, slices.to(z.dtype))
        (gradient,) = torch.autograd.grad(value, z)
        assert value.isfinite() and gradient.isfinite().all()


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="of nothing"):
        sigreg(torch.zeros(0, 4), slices_of(4, 5))


# slices


@pytest.mark.parametrize(("dim", "number"), [(1, 3), (2, 1), (16, 256), (512, 64)])
def test_slices_are_unit_columns(dim: int, number: int) -> None:
    slices = draw_slices(dim, number, Generator().manual_seed(0))
    assert slices.shape == (dim, number) and slices.dtype == torch.float32
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(number), rtol=1e-6, atol=0)


def test_slices_have_no_preferred_direction() -> None:
    slices = draw_slices(4, 20_000, Generator().manual_seed(0)).double()
    # each coordinate has mean 0 and variance 1/4, and no two are correlated
    assert float(slices.mean(1).abs().max()) < 5 * 0.5 / math.sqrt(20_000)
    torch.testing.assert_close(slices @ slices.T / 20_000, torch.eye(4).double() / 4, rtol=0, atol=0.01)


def test_slices_follow_their_generator() -> None:
    generator = Generator().manual_seed(3)
    first, second = draw_slices(4, 5, generator), draw_slices(4, 5, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_slices(4, 5, Generator().manual_seed(3)))


# module


def test_module_is_the_function_on_fresh_slices() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6, knots=9, t_max=2.0, seed=3)
    generator = Generator().manual_seed(3)
    for _ in range(3):
        slices = draw_slices(4, 6, generator).double()
        expected = oracle.sigreg_statistics(z, slices, t_max=2.0, knots=9).mean()
        torch.testing.assert_close(module(z), expected, rtol=1e-6, atol=0)
    assert not list(module.parameters()) and not list(module.buffers())
    assert not torch.equal(module(z), module(z))


def test_state_dict_goes_on_with_the_same_slices() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6, seed=3)
    module(z)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    following = [module(z), module(z)]

    file.seek(0)
    resumed = SIGReg(num_slices=6, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    # saved again before its first call, it still knows
    again = SIGReg(num_slices=6, seed=98)
    again.load_state_dict(resumed.state_dict())
    for found in (resumed, again):
        assert [torch.equal(found(z), value) for value in following] == [True, True]


def test_loading_rewinds_a_module_that_has_gone_on() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6)
    module(z)
    state = copy.deepcopy(module.state_dict())
    value = module(z)
    assert not torch.equal(module(z), value)
    module.load_state_dict(state)
    assert torch.equal(module(z), value)


def test_a_module_that_was_never_called_loads_too() -> None:
    z = made(8, 4)
    module = SIGReg(num_slices=6, seed=3)
    module.load_state_dict(SIGReg(num_slices=6, seed=3).state_dict())
    assert torch.equal(module(z), SIGReg(num_slices=6, seed=3)(z))


def test_module_takes_nothing_from_the_global_generator() -> None:
    z = made(8, 4)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    value = SIGReg(num_slices=6)(z)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(SIGReg(num_slices=6)(z), value)


# ranks

WORLD = 2
# samples of each rank, behind the leading axes
PARTS = {"even": ((), (6, 6)), "uneven": ((), (3, 10)), "positions": ((4,), (5, 2))}


def samples_of(name: str) -> list[Tensor]:
    leading, sizes = PARTS[name]
    return list(made(*leading, sum(sizes), 4, seed=7).split(sizes, dim=-2))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def run_rank(rank: int, port: int, folder: Path) -> None:
    """What one of the processes computes, saved to `folder`."""
    address = f"tcp://127.0.0.1:{port}"
    # half an hour is the default: a rank that waits in vain should say so
    dist.init_process_group("gloo", address, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found: dict[str, Tensor] = {}
    for name in PARTS:
        z = samples_of(name)[rank].requires_grad_()
        value = sigreg(z, slices_of(4, 5))
        (found[f"{name}-gradient"],) = torch.autograd.grad(value, z)
        found[name] = value.detach()
    for name in ("even", "uneven"):
        model = nn.parallel.DistributedDataParallel(linear())
        sigreg(model(samples_of(name)[rank]), slices_of(3, 5)).backward()
        for parameter, tensor in model.module.named_parameters():
            assert tensor.grad is not None
            found[f"{name}-ddp-{parameter}"] = tensor.grad
    module = SIGReg(num_slices=5, seed=3)
    found["module"] = torch.stack([module(samples_of("uneven")[rank]) for _ in range(2)])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(run_rank, args=(port, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(PARTS))
def test_ranks_agree_with_one_process(ranks: list[dict[str, Tensor]], name: str) -> None:
    z = torch.cat(samples_of(name), dim=-2).requires_grad_()
    slices = slices_of(4, 5)
    tests = z if z.dim() == 3 else z[None]
    value = torch.stack([oracle.sigreg(samples, slices) for samples in tests]).mean()
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.equal(ranks[0][name], ranks[1][name])
    torch.testing.assert_close(ranks[0][name], value.detach(), rtol=1e-11, atol=0)
    # each rank's part comes world size times, which DistributedDataParallel's mean takes back
    found = torch.cat([rank[f"{name}-gradient"] for rank in ranks], dim=-2) / WORLD
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["even", "uneven"])
def test_distributed_data_parallel_has_the_gradient_of_one_process(ranks: list[dict[str, Tensor]], name: str) -> None:
    model = linear()
    oracle.sigreg(model(torch.cat(samples_of(name))), slices_of(3, 5)).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None
        for rank in ranks:
            torch.testing.assert_close(rank[f"{name}-ddp-{parameter}"], tensor.grad, rtol=1e-10, atol=1e-13)


def test_module_draws_the_same_slices_on_every_rank(ranks: list[dict[str, Tensor]]) -> None:
    module = SIGReg(num_slices=5, seed=3)
    z = torch.cat(samples_of("uneven"))
    expected = torch.stack([module(z) for _ in range(2)])
    for rank in ranks:
        torch.testing.assert_close(rank["module"], expected, rtol=1e-11, atol=0)
