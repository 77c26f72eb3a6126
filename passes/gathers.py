"""Rules of ``canonicalize``: a gather whose places are known from the shapes alone is a view."""

from __future__ import annotations

from typing import Any

from torch import fx

from planish.ops import argument, aten
from planish.passes.axes import result_axis
from planish.program import Program
from planish.rules import rule


@rule("gather of everything in order", aten.index.Tensor)
def gather_is_view(program: Program, node: fx.Node) -> fx.Node | None:
    """Indexing each axis with all its positions, on axes of their own, moves nothing.

    before: ``index(x, [unsqueeze(arange(batch), ...), unsqueeze(arange(seq), ...)])``, x [batch, seq], the index
            tensors [batch, 1, 1, 1] and [1, 1, 1, seq]
    after:  ``reshape(x, [batch, 1, 1, seq])``, of x permuted where the index tensors' axes are in another order
    """
    x, indices = node.args[:2]
    assert isinstance(x, fx.Node)
    own, shape = program.shape(x), program.shape(node)
    lead = len(shape) - (len(own) - len(indices))  # pyright: ignore
    axes = [_arange_axis(program, index, lead, own[a]) for a, index in enumerate(indices)]  # pyright: ignore
    places = [a for a in axes if a is not None]
    if len(places) < len(axes) or len(set(places)) < len(places):
        return None
    places += range(lead, len(shape))
    if any(s != 1 and a not in places for a, s in enumerate(shape)):
        return None
    graph = program.module.graph
    order = sorted(range(len(own)), key=places.__getitem__)
    sizes: list[int | fx.Node] = [1] * len(shape)
    for axis, place in enumerate(places):
        size = own[axis]
        sizes[place] = size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (x, axis))
    moved = x if order == list(range(len(own))) else graph.call_function(aten.permute.default, (x, order))
    return graph.call_function(aten.reshape.default, (moved, sizes))


def _arange_axis(program: Program, index: Any, rank: int, size: Any) -> int | None:
    """The axis, of ``rank`` when broadcast, along which an index tensor counts from 0 to ``size - 1``.

    None where it is anything else.
    """
    chain: list[fx.Node] = []
    while isinstance(index, fx.Node) and index.target in _SEEN_THROUGH:
        chain.append(index)
        index = index.args[0]
    if not isinstance(index, fx.Node) or not _counts_to(program, index, size):
        return None
    axis, last = 0, index
    for view in reversed(chain):
        axis, last = result_axis(program, view, axis), view
        if axis is None:
            return None
    return axis + rank - last.meta["val"].dim()


def _counts_to(program: Program, node: fx.Node, size: Any) -> bool:
    """Whether it is the integers from 0 below ``size``."""
    if node.target not in _ENDS or node.meta["val"].is_floating_point():
        return False
    at = _ENDS[node.target]
    starts_at_zero = at == 0 or node.args[0] == 0
    end, step = node.args[at], argument(node, 2, "step", 1)
    return starts_at_zero and step == 1 and not isinstance(end, float) and program.size(end) == size


_ENDS: dict[Any, int] = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}
"""Where each overload has its end."""

_SEEN_THROUGH = (aten.unsqueeze.default, aten.reshape.default, aten.expand.default)
"""Views of an index tensor that keep its order."""
