"""Checks a run directory from end to end, and says what can be saved of it. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastle.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    good_sections,
    load_checkpoint,
    read_run_config,
    way_out,
    write_run_config,
)
from fastle.config import ConfigError, RunConfig
from fastle.data.cache import check_cache
from fastle.data.header import check_png
from fastle.data.loading import Loading
from fastle.data.open import IN_MEMORY, cache_key
from fastle.errors import FastleError
from fastle.files import one_line, open_regular, read_json
from fastle.machine import format_bytes
from fastle.method.pretrained import check_model
from fastle.options import pair_text

from .report import check_metrics
from .trainer import Trainer


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check of a file found.

    Attributes:
        file: The file, in the run directory or wherever it lies.
        says: What it holds, or what is wrong with it and what follows.
        good: Whether it is what it should be.
    """

    file: Path
    says: str
    good: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What can be saved of a run.

    Attributes:
        findings: One for each file.
        config: What the run is, from config.json or from a checkpoint; None if neither says.
        newest: The newest checkpoint that the run can go on from.
    """

    findings: list[Finding]
    config: RunConfig | None
    newest: Checkpoint | None


def check_run(run: Path, loading: Loading) -> Verdict:
    """Checks the files of a run directory, its checkpoints, and the cache of its images.

    Raises:
        CheckpointError: There is neither a configuration nor a checkpoint.
    """
    files = checkpoints(run)
    if not files and not (run / "config.json").exists():
        raise CheckpointError(f"{run} is not a run: it has neither config.json nor checkpoints")
    loaded = [(path, _load(path)) for path in reversed(files)]
    config, finding = _check_config(run, [checkpoint for _, checkpoint in loaded if isinstance(checkpoint, Checkpoint)])
    findings = [finding]
    newest: Checkpoint | None = None
    for path, checkpoint in loaded:
        try:
            if isinstance(checkpoint, FastleError):
                raise checkpoint
            # checkpoints hold the configuration too
            known = config or RunConfig.from_dict(checkpoint.metadata.get("config", {}))
            if known.model.own is None:
                # before a trainer is made, which may take more memory than the file
                check_model(known, checkpoint)
            if not known.own():
                Trainer(known, torch.device("cpu")).check(checkpoint)
        except FastleError as error:
            if path.exists():
                findings.append(_damaged(path, error))
            continue
        config, newest = known, newest or checkpoint
        unknown = "; only Python can tell whether it fits what is your own" if known.own() else ""
        findings.append(Finding(path, f"step {checkpoint.step}, {format_bytes(path.stat().st_size)}{unknown}"))
    findings += [*_check_metrics(run / "metrics.jsonl"), *_check_pictures(run), *_check_json(run)]
    if config is not None:
        findings += _check_caches(config, loading)
    return Verdict(findings, config, newest)


def _load(path: Path) -> Checkpoint | FastleError:
    try:
        return load_checkpoint(path)
    except FastleError as error:
        return error


def _check_config(run: Path, known: list[Checkpoint]) -> tuple[RunConfig | None, Finding]:
    """The configuration, or None if config.json cannot be read or all checkpoints hold another."""
    path = run / "config.json"
    try:
        config = read_run_config(run)
        # checkpoints have checksums and config.json has none: if they differ, it is config.json that is wrong
        others = [
            config.differences(RunConfig.from_dict(checkpoint.metadata["config"]))
            for checkpoint in known
            if "config" in checkpoint.metadata
        ]
    except (CheckpointError, ConfigError) as error:
        return None, Finding(path, str(error).removeprefix(f"{path}").lstrip(": "), good=False)
    if others and all(others):
        return None, Finding(path, f"is of another run than its checkpoints ({', '.join(others[0])})", good=False)
    return config, Finding(path, f"{config.data.dataset}, {pair_text(config.model.size)} px")


def restore_config(run: Path, verdict: Verdict) -> Path:
    """Writes config.json as the newest good checkpoint knows it; a file that is there is kept as config.json.damaged.

    Raises:
        CheckpointError: config.json is good, or no checkpoint knows the configuration.
    """
    path = run / "config.json"
    if any(finding.file == path and finding.good for finding in verdict.findings):
        raise CheckpointError(f"{path} is good: there is nothing to restore")
    if verdict.newest is None or "config" not in verdict.newest.metadata:
        raise CheckpointError(f"{path} cannot be restored: no good checkpoint knows the configuration")
    if path.exists():
        path.replace(path.with_name("config.json.damaged"))
    return write_run_config(run, verdict.newest.metadata["config"])


def _damaged(path: Path, error: FastleError) -> Finding:
    says = str(error).removesuffix(way_out(path)).removeprefix(f"{path} ")
    sections = good_sections(path)
    if "model" in sections:
        says += "; its model is good, so that it can be evaluated if no other checkpoint is"
    return Finding(path, says, good=False)


def _check_metrics(path: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    try:
        rows, damaged = check_metrics(path)
    except CheckpointError as error:
        yield Finding(path, str(error).removeprefix(f"{path} "), good=False)
        return
    says = f"{len(rows):,} rows" + (f" to step {rows[-1]['step']}" if rows else "")
    if damaged:
        says += f", and {len(damaged)} lines that cannot be read, the first of them line {damaged[0]}"
    yield Finding(path, says, good=not damaged)


def _check_pictures(run: Path) -> Iterator[Finding]:
    for path in sorted([*(run / "grids").glob("*.png"), *run.glob("curves.png")]):
        try:
            with open_regular(path) as file:
                data = file.read()
            if not data.startswith(b"\x89PNG"):
                raise ValueError("it is no PNG")
            check_png(data)
        except (OSError, ValueError, IndexError) as error:
            yield Finding(path, one_line(error), good=False)


def _check_json(run: Path) -> Iterator[Finding]:
    for path in sorted(run.glob("eval-*.json")):
        try:
            read_json(path)
        except (OSError, ValueError) as error:
            yield Finding(path, f"{one_line(error)}; `fastle eval` writes it anew", good=False)


def _check_caches(config: RunConfig, loading: Loading) -> Iterator[Finding]:
    if config.data.dataset in IN_MEMORY or config.data.root is None:
        return
    for gpu in (False, True):
        path = cache_key(config.data, "train", gpu=gpu).path()
        if path.exists():
            images, fault = check_cache(path, loading)
            says = f"{images:,} images" if fault is None else f"{fault}; the next run builds it anew"
            yield Finding(path, says, good=fault is None)
