"""How a run is computed, and which logger hears of it: choices that are no settings, and may change from call to call.

They change what is computed by rounding at most, but for one: the decoder "dali-gpu" gives other pixels.
"""

from typing import Literal, get_args

from .options import Option

DeviceName = Literal["auto", "cpu", "cuda", "xpu", "mps"]
StepMode = Literal["eager", "compiled", "captured"]
DecoderChoice = Literal["auto", "dali", "dali-gpu", "torchvision"]
CacheChoice = Literal["auto", "device", "host", "disk", "none"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]

DEVICE = Option(
    name="device",
    choices=get_args(DeviceName),
    help="where to compute",
    default="a GPU if there is one",
    group="speed",
)
STEP = Option(
    name="step",
    choices=("auto", *get_args(StepMode)),
    help="compiled: by torch.compile; captured: that and the update as one CUDA graph",
    default="captured on one GPU, compiled on several, eager on a CPU",
    group="speed",
)
DECODER = Option(
    name="decoder",
    choices=get_args(DecoderChoice),
    help="what decodes image files: dali and torchvision give the same pixels, dali-gpu others",
    default="dali where it can be had",
    group="speed",
)
CACHE = Option(
    name="cache",
    choices=get_args(CacheChoice),
    help="where decoded images are kept, for later runs too; none decodes them in every epoch",
    default="the first of device, host and disk that has room",
    group="speed",
)
LOG = Option(
    name="log",
    optional=True,
    choices=get_args(LoggerName),
    help="a logger that gets metrics and grids too; if it fails, the run goes on",
    group="output",
)
