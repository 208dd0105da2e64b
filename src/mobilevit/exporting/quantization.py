"""The parts of a model that int8 leaves in floating point, the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import Backbone, InvertedResidual
from mobilevit.models.mobilevitv2 import MobileViTv2Block


def float_modules(graph: nn.Module, keep_float: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the modules that stay in floating point, with all below them.

    These are the stem and the inverted residuals of the backbone: 6 % of its weights (XXS), most of the loss. With all
    in int8, 96.4 % of 864 flowers keep their class; with these in float 99.2 % (ONNX Runtime), and mean IoU on
    CamVid falls by 0.0005 instead of 0.008. They are no slower in float: much of an int8 depthwise convolution is
    conversion.

    In MobileViTv2, the layers that read the last norm of a block stay in float, too: the norm is of the whole map, so a
    few tokens far out make the steps of all others coarse. They have 4 % of the weights (width 0.5).

    Raises:
        MobileViTError: `keep_float` names a module that is not in the graph.
    """
    names, found = [], []
    for name, module in graph.named_modules():
        names.append(name)
        if isinstance(module, Backbone):
            found.append(f"{name}.stem")
        elif isinstance(module, InvertedResidual):
            found.append(name)
        elif isinstance(module, MobileViTv2Block):
            found.append(f"{name}.project_out")
    for name in keep_float:
        if name not in names:
            near = ", ".join(get_close_matches(name, names, n=3, cutoff=0.3)) or names[1]
            raise MobileViTError(f"`keep_float`: no module {name!r} in this model; such as {near}")
    return (*found, *keep_float)


def is_below(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these or part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
