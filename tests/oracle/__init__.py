"""The method written out once more, naively and in float64: what fastle is held to.

Everything is a plain function of tensors and of a model's state dict. Convolutions are sums of shifted slices, bilinear
resizing gathers four neighbours, BatchNorm and its running statistics are written by hand, SIGReg keeps all its knots.
Nothing here calls fastle; its configuration and draws are read by their field names.
"""

from .model import State, decode, encode, encode_eval, judge
from .objectives import Step, cut_hole, detached, objective, update_ema
from .sigreg_formulas import (
    SIGRegOracle,
    cf_deviations,
    sigreg,
    sigreg_and_gradients,
    sigreg_eb_jepa,
    sigreg_gradient,
    sigreg_statistics,
)
from .transforms import keyed, permuted, views

__all__ = [
    "SIGRegOracle",
    "State",
    "Step",
    "cf_deviations",
    "cut_hole",
    "decode",
    "detached",
    "encode",
    "encode_eval",
    "judge",
    "keyed",
    "objective",
    "permuted",
    "sigreg",
    "sigreg_and_gradients",
    "sigreg_eb_jepa",
    "sigreg_gradient",
    "sigreg_statistics",
    "update_ema",
    "views",
]
