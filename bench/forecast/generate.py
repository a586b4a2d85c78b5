"""The code of a training step, generated for a mocked GPU from tensors without data, and counted.

Each variant of the step is generated in a process of its own, since the mock cannot be undone: `count(variant)` starts
it and reads what it counted, `python -m bench.forecast.generate VARIANT OUT` is that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from bench.forecast.count import Launch
from fastle.config import Precision, RunConfig
from fastle.errors import FastleError
from fastle.presets import make_config

ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).with_name("hooks.cpp")
SETTINGS: dict[str, dict[str, Any]] = {
    "celeba-masked-512": {"masked": True, "latent": 512, "recipe": "post"},
    # only AdamW's update is counted
    "celeba-masked-512-tuned": {"masked": True, "latent": 512, "optimizer": "adamw"},
    "celeba-spatial": {"recipe": "post"},
    "celeba-pixel": {"objective": "pixel", "recipe": "post"},
}
SideName = Literal["fastle", "plain"]


class CannotGenerate(FastleError):
    """The code of a step cannot be generated here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVariant:
    """A step whose code is generated: fastle's of a setting, or the plain one under torch.compile."""

    setting: str
    side: SideName = "fastle"
    precision: Precision = "bf16"
    batch: int = 128

    @property
    def config(self) -> RunConfig:
        return make_config(
            "celeba",
            data=ROOT,
            batch_size=self.batch,
            precision=self.precision,
            **SETTINGS[self.setting],
        )


@dataclass(frozen=True, slots=True)
class Counted:
    """What a step launches, its optimizer left out, and the number of its parameters."""

    launches: list[Launch]
    parameters: int


def count(variant: StepVariant) -> Counted:
    """Generates the code of a variant, about a minute, and counts it.

    Raises:
        CannotGenerate: torch has no Inductor for it here, or the step does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted.json"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        if torch.version.cuda is not None:
            environment["LD_PRELOAD"] = str(_hooks())
        command = [sys.executable, "-m", "bench.forecast.generate", json.dumps(asdict(variant)), str(out)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise CannotGenerate(f"the code of {variant.setting}, {variant.side}, cannot be generated: {last}")
        counted = json.loads(out.read_text(encoding="utf-8"))
    return Counted([Launch.from_dict(values) for values in counted["launches"]], counted["parameters"])


def _hooks() -> Path:
    """The library of hooks.cpp, compiled at the first need.

    Raises:
        CannotGenerate: Without a compiler.
    """
    key = hashlib.sha256(HOOKS.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fastle-hooks-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotGenerate("a C++ compiler is needed to mock a CUDA device: install g++, or name one in CXX")
    include = Path(torch.__file__).parent / "include"
    scratch = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(HOOKS), "-o", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotGenerate(f"{HOOKS} does not compile: {done.stderr.strip().splitlines()[0]}")
    scratch.replace(library)
    return library


class _Done(Exception):
    """The code is there; nothing is to be run."""


def _main(variant: StepVariant, out: Path) -> None:
    from bench.forecast.mock import mock_cuda

    mock_cuda()
    launches: list[Launch] = []
    _intercept(launches)
    parameters = _trace(variant)
    if {launch.direction for launch in launches} != {"forward", "backward"}:
        raise CannotGenerate("a graph forward and one backward were to be generated")
    out.write_text(json.dumps(asdict(Counted(launches, parameters))), encoding="utf-8")


def _intercept(launches: list[Launch]) -> None:
    """Makes Inductor count what it has written instead of running it."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering

    from bench.forecast import count as counting

    torch._inductor.config.force_disable_caches = True
    # writes its estimate of a kernel's bytes beside it
    torch._inductor.config.profile_bandwidth = True
    # it would compute constants, on the device
    torch._inductor.config.joint_graph_constant_folding = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch.autograd.set_multithreading_enabled(False)

    def compile_to_module(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        direction: counting.Pass = "backward" if graph.is_backward else "forward"
        nodes = list(cast(torch.fx.GraphModule, graph.module).graph.nodes)
        launches.extend(
            counting.launches(code.value, direction, phases=dict(_phases(nodes)), item_sizes=dict(_item_sizes(nodes)))
        )
        return _Module()

    GraphLowering.compile_to_module = compile_to_module  # type: ignore[assignment, method-assign]


class _Module:
    """What Inductor takes for its compiled code."""

    __file__ = "nowhere"
    value = ""

    @staticmethod
    def call(*_: object) -> None:
        raise _Done


def _phases(nodes: list[torch.fx.Node]) -> Iterator[tuple[str, str]]:
    """The phase of each name that the comments of generated code may give to a node."""
    for node in nodes:
        phase = node.meta.get("custom", {}).get("phase")
        if phase is None:
            continue
        yield node.name, phase
        for key in ("source_fn_stack", "fwd_source_fn_stack"):
            if node.meta.get(key):
                yield node.meta[key][-1][0], phase
        for source in node.meta.get("from_node", ()):
            yield source.name, phase


def _item_sizes(nodes: list[torch.fx.Node]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            yield node.name, value.dtype.itemsize


def _to_channels_last(model: torch.nn.Module) -> None:
    """What `model.to(memory_format=torch.channels_last)` does, which refuses tensors without data."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and value.ndim == 4:
                last = value.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = torch.nn.Parameter(last, requires_grad=value.requires_grad)


def _trace(variant: StepVariant) -> int:
    """Compiles the step of a variant on tensors without data; the number of its parameters."""
    from torch._subclasses import FakeTensorMode

    from fastle.method import objective as method
    from fastle.method.model import Autoencoder
    from fastle.method.transforms import Boxes
    from fastle.training import plain_step as plain

    def annotated(name: str) -> Any:
        return torch.fx.traceback.annotate({"phase": name})

    # a compiled graph does not see phases; its nodes may carry their names
    for module in (method, plain):
        setattr(module, "phase", annotated)  # noqa: B010, not exported
    config, device = variant.config, torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: torch.nn.Module
        objective: torch.nn.Module
        if variant.side == "plain":
            with device:
                model = peer = plain.PlainAutoencoder(config.model)
            _to_channels_last(peer)
            objective = judged = plain.PlainObjective(peer, config.objective)
            _to_channels_last(judged.judge)
        else:
            with device:
                model = ours = Autoencoder(config.model)
            _to_channels_last(ours)
            objective = method.make_objective(ours, config.objective)
        shape = (variant.batch, config.model.channels, *config.model.sides)
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        corner = torch.zeros(variant.batch, dtype=torch.int64, device=device)
        draws = method.Draws(
            slices=torch.empty(config.model.latent_shape[0], config.objective.slices, device=device),
            view=None if config.objective.transform is None else Boxes(corner, corner.clone()),
            hole=None if config.objective.hole_ratio is None else Boxes(corner.clone(), corner.clone()),
        )
        objective.compile(fullgraph=True, dynamic=False)
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=variant.precision == "bf16"):
                objective(images.contiguous(memory_format=torch.channels_last), draws)
        except _Done:
            return sum(parameter.numel() for parameter in model.parameters())
    raise CannotGenerate("the step ran, though it should only have been compiled")


if __name__ == "__main__":
    _main(StepVariant(**json.loads(sys.argv[1])), Path(sys.argv[2]))
