"""The ``planish::`` operators on integer codes: exact references of what integer kernels compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.formats import Format, Quantized, quantise_groups, quantise_rows


def _result_dtype(x: Tensor, input_scale: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where a program is run in fp64 to be verified."""
    return x.dtype if input_scale is None or x.dtype.is_floating_point else input_scale.dtype


@torch.library.custom_op("planish::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    format: str,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    equaliser: Tensor | None = None,
) -> Tensor:
    """A linear layer on integer codes of its weight and of its input, given or found row by row; fp32 [..., N].

    For each group g of input features: ``scale_g sum(code_x code_w) + minimum_g sum(code_x)``, the sums as integers;
    all that times the scale of the input's row (or each group by the row's scale for it), plus the bias, plus the
    products of the outliers in fp32. An outlier is an input feature that is 0 to the codes of x, so that it does not
    decide their scale (LLM.int8).

    Args:
        x: fp32 [..., K]; or its codes, int8, where ``input_scale`` is given.
        codes: of the weight, uint8 [N, K]; see ``planish.formats``, also for the next three.
        scales: [N, groups].
        minimums: [N, groups], of an asymmetric format.
        channels: [N], of a format with scales at two levels.
        bias: [N].
        input_scale: of all rows, fp32 [1]; None to find each row's own.
        format: its name, as in ``Format.parse``.
        outliers: input features that stay fp32, int64 [C]; for x in fp32.
        outlier_weight: their weights, fp32 [C, N].
        equaliser: what the other features are multiplied by before they become codes, fp32 [K]; for x in fp32.
    """
    form = Format.parse(format)
    weight = Quantized(form.weight, codes, scales, minimums, channels)
    group = weight.format.group or codes.shape[1]
    if x.dtype is torch.int8:
        assert input_scale is not None, "codes have the scale that they were made with"
        of_x, row_scales = x, input_scale
    else:
        inner = x if outliers is None else x.index_fill(-1, outliers, 0.0)
        inner = inner if equaliser is None else inner * equaliser
        if form.by_group:
            of_x, row_scales = quantise_groups(inner, group)
        else:
            of_x, row_scales = quantise_rows(inner, None if input_scale is None else float(input_scale))
    result = x.new_zeros((*x.shape[:-1], codes.shape[0]), dtype=torch.float64)
    parts = zip(of_x.split(group, -1), codes.split(group, -1), strict=True)
    for g, (a, w) in enumerate(parts):
        exact = a.double() @ w.double().T  # integers below 2^53
        part = weight.steps()[:, g].double() * exact
        part = part + weight.lowest()[:, g].double() * a.double().sum(-1, keepdim=True)
        result += part * row_scales[..., g, None].double() if form.by_group else part
    result = result if form.by_group else result * row_scales.double()
    if outliers is not None and outlier_weight is not None:
        result += x.index_select(-1, outliers).double() @ outlier_weight.double()
    return (result if bias is None else result + bias).to(_result_dtype(x, input_scale))


@quantized_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    format: str,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    equaliser: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=_result_dtype(x, input_scale))


@torch.library.custom_op("planish::quantized_convolution", mutates_args=())
def quantized_convolution(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    format: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution with the channels last on integer codes of its weight and input; fp32 [B, spatial..., N].

    It is ``quantized_linear`` of what each output position sees: its window's codes, in the order [window..., C].

    Args:
        x: codes, int8 [B, spatial..., C].
        codes: of the weight, uint8 [N, window * C / groups]; see ``planish.formats``, also for the next three.
        scales: [N, groups of the format].
        minimums: [N, groups of the format], of an asymmetric format.
        channels: [N], of a format with scales at two levels.
        bias: [N].
        input_scale: of x, fp32 [1].
        format: its name, as in ``Format.parse``.
        kernel: size of the window along each spatial axis.
        stride: likewise.
        padding: zeros before each spatial axis, then those after each.
        dilation: likewise.
        groups: of channels; 1, or as many as there are channels.
    """
    weight = Quantized(Format.parse(format).weight, codes, scales, minimums, channels)
    depth = x.shape[-1] // groups
    exact = weight.dequantise().double().view(-1, *kernel, depth).movedim(-1, 1)
    rank = len(kernel)
    sides = [p for axis in reversed(range(rank)) for p in (padding[axis], padding[rank + axis])]
    padded = torch.nn.functional.pad(x.double().movedim(-1, 1), sides)
    zero = [0] * rank
    y = torch.ops.aten.convolution.default(padded, exact, None, stride, zero, dilation, False, zero, groups)
    result = y.movedim(1, -1) * input_scale.double()
    return (result if bias is None else result + bias).to(input_scale.dtype).contiguous()


@quantized_convolution.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    format: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    rank, sizes = len(kernel), []
    for axis, size in enumerate(x.shape[1:-1]):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        sizes.append((size + padding[axis] + padding[rank + axis] - reach) // stride[axis] + 1)
    return x.new_empty((x.shape[0], *sizes, codes.shape[0]), dtype=input_scale.dtype)
