"""SIGReg on several ranks."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from fastle.method.sigreg import SIGReg, sigreg, two_sample_sigreg
from tests import oracle
from tests.method.sigreg_cases import CONVENTIONS, every_convention, exact, made, slices_of, weights_of

WORLD = 2
# samples of each rank, behind the leading axes
PARTS = {"even": ((), (6, 6)), "uneven": ((), (3, 10)), "positions": ((4,), (5, 2))}
WEIGHTED = {"plain": False, "weighted": True}


def samples_of(name: str) -> list[Tensor]:
    leading, sizes = PARTS[name]
    return list(made(*leading, sum(sizes), 4, seed=7).split(sizes, dim=-2))


def weights_by_rank(name: str) -> list[Tensor]:
    """A weight for each sample. With positions, the second rank has only zeros at the first of them."""
    leading, sizes = PARTS[name]
    weights = weights_of(*leading, sum(sizes))
    if leading:
        weights[0, sizes[0] :] = 0
    return list(weights.split(sizes, dim=-1))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def run_rank(rank: int, folder: Path) -> None:
    """Computes losses and gradients in one process and saves them to `folder`."""
    # a module may be made before the process group
    module = SIGReg(num_slices=5, seed=3)
    # ranks meet at a file, since a port that was free may be taken. the default is half an hour: a rank that waits in
    # vain should fail sooner
    meeting, patience = (folder / "meeting").as_uri(), timedelta(seconds=600)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=WORLD, timeout=patience)
    results: dict[str, Tensor] = {}

    def keep(name: str, z: Tensor, **options: Any) -> None:
        value = sigreg(z.requires_grad_(), slices_of(4, 5), **options)
        (results[f"{name}-gradient"],) = torch.autograd.grad(value, z)
        results[name] = value.detach()

    for name in PARTS:
        keep(name, samples_of(name)[rank])
        for convention in CONVENTIONS:
            keep(f"{name}-{convention}-plain", samples_of(name)[rank], convention=convention)
            z, weights = samples_of(name)[rank], weights_by_rank(name)[rank]
            z[weights == 0] = math.nan
            keep(f"{name}-{convention}-weighted", z, weights=weights, convention=convention)
    x, y = (samples_of(name)[rank].requires_grad_() for name in ("uneven", "even"))
    results["two-sample"] = two_sample_sigreg(x, y, slices_of(4, 5))
    (results["two-sample-gradient"],) = torch.autograd.grad(results["two-sample"], x)
    # a rank whose samples all have weight 0
    mask = torch.full((6,), rank == 0)
    for convention in CONVENTIONS:
        keep(f"masked-{convention}", samples_of("even")[rank], weights=mask, convention=convention)
    for name in ("even", "uneven"):
        model = nn.parallel.DistributedDataParallel(linear())
        sigreg(model(samples_of(name)[rank]), slices_of(3, 5)).backward()
        for parameter, tensor in model.module.named_parameters():
            assert tensor.grad is not None
            results[f"{name}-ddp-{parameter}"] = tensor.grad
    results["module"] = torch.stack([module(samples_of("uneven")[rank]) for _ in range(2)])
    results["module-minimal"] = SIGReg(num_slices=5, convention="minimal", seed=3)(samples_of("uneven")[rank])
    torch.save({name: value.detach() for name, value in results.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, args=(folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def check_ranks(ranks: list[dict[str, Tensor]], name: str, value: Tensor, gradient: Tensor) -> None:
    """Hold every rank to the loss and gradient of the concatenated batch."""
    assert torch.equal(ranks[0][name], ranks[1][name])
    torch.testing.assert_close(ranks[0][name], value, rtol=1e-10, atol=0)
    # each rank's part comes multiplied by the world size, which DistributedDataParallel's mean divides out
    gathered = torch.cat([rank[f"{name}-gradient"] for rank in ranks], dim=-2) / WORLD
    torch.testing.assert_close(gathered, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", list(PARTS))
def test_ranks_agree_with_one_process(ranks: list[dict[str, Tensor]], name: str) -> None:
    check_ranks(ranks, name, *exact("lejepa", torch.cat(samples_of(name), dim=-2), slices_of(4, 5)))


def test_two_samples_are_those_of_all_ranks(ranks: list[dict[str, Tensor]]) -> None:
    x, y = (torch.cat(samples_of(name)) for name in ("uneven", "even"))
    value = two_sample_sigreg(x.requires_grad_(), y, slices_of(4, 5))
    check_ranks(ranks, "two-sample", value.detach(), *torch.autograd.grad(value, x))


@pytest.mark.parametrize("kind", list(WEIGHTED))
@pytest.mark.parametrize("convention", ["lejepa", "lightly", "eb_jepa"])
@pytest.mark.parametrize("name", list(PARTS))
def test_ranks_make_one_batch(ranks: list[dict[str, Tensor]], name: str, convention: Any, kind: str) -> None:
    z = torch.cat(samples_of(name), dim=-2)
    weights = torch.cat(weights_by_rank(name), dim=-1) if WEIGHTED[kind] else None
    check_ranks(ranks, f"{name}-{convention}-{kind}", *exact(convention, z, slices_of(4, 5), weights))


@pytest.mark.parametrize("kind", list(WEIGHTED))
@pytest.mark.parametrize("convention", ["leautoencoder", "minimal"])
@pytest.mark.parametrize("name", list(PARTS))
def test_ranks_keep_to_themselves(ranks: list[dict[str, Tensor]], name: str, convention: Any, kind: str) -> None:
    for rank, results in enumerate(ranks):
        weights = weights_by_rank(name)[rank] if WEIGHTED[kind] else None
        value, gradient = exact(convention, samples_of(name)[rank], slices_of(4, 5), weights)
        torch.testing.assert_close(results[f"{name}-{convention}-{kind}"], value, rtol=1e-10, atol=0)
        torch.testing.assert_close(results[f"{name}-{convention}-{kind}-gradient"], gradient, rtol=1e-10, atol=1e-13)


@every_convention
def test_a_rank_without_weight_adds_nothing(ranks: list[dict[str, Tensor]], convention: Any) -> None:
    own = convention in ("leautoencoder", "minimal")
    value, gradient = exact(convention, samples_of("even")[0], slices_of(4, 5))
    expected = [value, torch.zeros_like(value)] if own else [value, value]
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results[f"masked-{convention}"], expected[rank], rtol=1e-10, atol=0)
    own_gradient = ranks[0][f"masked-{convention}-gradient"] / (1 if own else WORLD)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-10, atol=1e-13)
    assert not ranks[1][f"masked-{convention}-gradient"].any()


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
    for rank, own in zip(ranks, samples_of("uneven"), strict=True):
        expected = SIGReg(num_slices=5, seed=3)(own)
        torch.testing.assert_close(rank["module-minimal"], expected, rtol=1e-11, atol=0)
