"""How a run is computed. None of these changes what it computes."""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda", "xpu", "mps"]
StepMode = Literal["eager", "compiled", "captured"]
DecoderChoice = Literal["auto", "dali", "dali-gpu", "torchvision"]
CacheChoice = Literal["auto", "device", "host", "disk", "none"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]
