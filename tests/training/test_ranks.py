"""What ranks tell each other: they fail together, with one line, and notice when one of them is gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastle.errors import DataError, FastleError, SaidByAnother
from fastle.training import ranks as module
from fastle.training.ranks import Agreement, LostRank, Ranks, says_rank_is_gone, versions

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
    # a thread that would have ended its process ends by an error
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
WORLD = 3


@pytest.fixture(scope="module")
def tcp_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]


@pytest.fixture
def store(tcp_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store in which the ranks of a test meet, each in a thread of this process."""
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: tcp_store)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that would have ended their process. They end instead, by an error."""
    names: list[str] = []

    def leave(status: int) -> None:
        names.append(threading.current_thread().name)
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    return names


def run(call: Callable[[Ranks], Any], world_size: int = WORLD) -> list[Any]:
    """What each rank returns, or raises."""
    results: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        try:
            with Ranks(rank, world_size, lambda: "step 7 is saved") as ranks:
                results[rank] = call(ranks)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.usefixtures("store", "left")
def test_ranks_gather_again_and_again() -> None:
    assert run(lambda ranks: [ranks.gather(ranks.rank), ranks.gather({"of": ranks.rank})]) == 3 * [
        [[0, 1, 2], [{"of": 0}, {"of": 1}, {"of": 2}]]
    ]
    assert Ranks(0, 1, str).gather("alone") == ["alone"]


@pytest.mark.usefixtures("store", "left")
@pytest.mark.parametrize(("failing", "words"), [((0, 2), "photo 0 is bad"), ((2,), "rank 2: photo 2 is bad")])
def test_what_fails_on_one_rank_is_said_by_the_first(failing: tuple[int, ...], words: str) -> None:
    def open_images(rank: int) -> int:
        if rank in failing:
            raise DataError(f"photo {rank} is bad")
        return rank

    first, *others = run(lambda ranks: ranks.together(lambda: open_images(ranks.rank)))
    assert isinstance(first, FastleError) and str(first) == words
    assert all(isinstance(other, SaidByAnother) and str(other) == "" for other in others)
    assert isinstance(first, DataError) == (0 in failing)


@pytest.mark.usefixtures("store", "left")
def test_ranks_that_see_other_images_say_so_once() -> None:
    def compare(other: dict[str, Any], ranks: Ranks) -> None:
        ranks.compare({"images": 26, "versions": "1"} | (other if ranks.rank == 1 else {}))

    assert run(lambda ranks: compare({}, ranks)) == [None, None, None]
    first, *others = run(lambda ranks: compare({"images": 27}, ranks))
    assert str(first).startswith("ranks 0 and 1 differ in images (26 and 27): start all")
    assert all(isinstance(other, SaidByAnother) for other in others)
    first, *_ = run(lambda ranks: compare({"versions": "2", "--lr": 0.1}, ranks))
    assert "versions (1 and 2), --lr (None and 0.1)" in str(first)


@pytest.mark.usefixtures("store")
def test_a_rank_without_a_sign_of_life_is_lost(
    left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "LOST", 0.4)
    watch = Ranks._watch
    # rank 1 is frozen
    monkeypatch.setattr(Ranks, "_watch", lambda self: watch(self) if self.rank != 1 else None)

    def work(ranks: Ranks) -> None:
        # as a collective that never returns
        deadline = time.monotonic() + 10
        while len(left) < WORLD - 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    run(work)
    assert left == ["ranks", "ranks"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "error: rank 1 has given no sign of life for 0 s; step 7 is saved: run the same command again" in said


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("error", [None, FastleError("the loss is not finite")], ids=["done", "failed"])
def test_a_rank_that_has_ended_is_not_lost_unless_it_failed(
    left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: FastleError | None
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "LOST", 0.3)

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            if error is not None:
                raise error
            return
        time.sleep(0.7)

    results = run(work)
    # its command says why
    assert capsys.readouterr().err == "" and results[1] is error
    assert left == ([] if error is None else ["ranks", "ranks"])


@pytest.mark.usefixtures("store", "left")
def test_the_loss_of_a_rank_is_said_once() -> None:
    def work(ranks: Ranks) -> None:
        raise dist.DistBackendError("Connection closed by peer")

    results = run(work)
    assert sorted(type(result).__name__ for result in results) == ["LostRank", "SaidByAnother", "SaidByAnother"]
    (said,) = (result for result in results if isinstance(result, LostRank))
    assert str(said) == "another rank is gone; step 7 is saved: run the same command again to go on"


def test_the_loss_of_the_rank_that_holds_the_store_is_noticed(
    monkeypatch: pytest.MonkeyPatch, left: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    patience = timedelta(seconds=600)
    held = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=patience)  # type: ignore[attr-defined]
    seen = dist.TCPStore("127.0.0.1", held.port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: seen)
    monkeypatch.setattr(module, "BEAT", 0.05)
    ranks = Ranks(1, 2, lambda: "step 7 is saved")
    contextlib.ExitStack().enter_context(ranks)
    del held
    end = time.monotonic() + 120
    while not left and time.monotonic() < end:
        time.sleep(0.05)
    assert left == ["ranks"]
    assert "error: the store in which the ranks meet is gone; step 7 is saved" in capsys.readouterr().err


def test_errors_that_say_that_a_rank_is_gone() -> None:
    gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345"
    assert says_rank_is_gone(RuntimeError(gone)) and says_rank_is_gone(dist.DistBackendError("timeout"))
    assert not says_rank_is_gone(RuntimeError("shape mismatch"))
    assert f"torch {torch.__version__.partition('+')[0]}" in versions() and "Python 3." in versions()


def test_ranks_agree_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []

    def all_reduce(both: torch.Tensor, operation: Any) -> None:
        assert operation == dist.ReduceOp.MAX
        sent.append(both.tolist())
        # the other rank is asked to stop from the third time on, and is slower
        both.copy_(torch.maximum(both, torch.tensor([143 if len(sent) > 2 else 0, 250])))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    agreed = Agreement(torch.device("cpu"), 2)
    results = [agreed(0, None), *(agreed(1, 0.1) for _ in range(8))]
    # at first nobody knows how long a step takes; then every fourth step of a quarter of a second
    assert results == [0, 1, 0, 0, 0, 143, 0, 0, 0] and sent == [[0, 1000], [1, 100], [1, 100]]
    alone = Agreement(torch.device("cpu"), 1)
    assert [alone(3, None), alone(0, 1.0)] == [3, 0] and len(sent) == 3
