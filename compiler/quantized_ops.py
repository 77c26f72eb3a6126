"""The ``planish::`` operators on integer codes: exact references of what integer kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.formats import Format, Quantized, quantise_rows


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
) -> Tensor:
    """A linear layer on integer codes of its weight and, row by row, of its input; fp32 [..., N].

    For each group g of input features: ``scale_g sum(code_x code_w) + minimum_g sum(code_x)``, the sums as integers;
    all that times the scale of the input's row, plus the bias, plus the products of the outliers in fp32. An outlier
    is an input feature that is 0 to the codes of x, so that it does not decide their scale (LLM.int8).

    Args:
        x: [..., K].
        codes: of the weight, uint8 [N, K]; see ``planish.formats``, also for the next three.
        scales: [N, groups].
        minimums: [N, groups], of an asymmetric format.
        channels: [N], of a format with scales at two levels.
        bias: [N].
        input_scale: of all rows, fp32 [1]; None to find each row's own.
        format: its name, as in ``Format.parse``.
        outliers: input features that stay fp32, int64 [C].
        outlier_weight: their weights, fp32 [C, N].
    """
    weight = Quantized(Format.parse(format).weight, codes, scales, minimums, channels)
    group = weight.format.group or codes.shape[1]
    inner = x if outliers is None else x.index_fill(-1, outliers, 0.0)
    of_x, row_scales = quantise_rows(inner, None if input_scale is None else float(input_scale))
    result = x.new_zeros((*x.shape[:-1], codes.shape[0]), dtype=torch.float64)
    parts = zip(of_x.split(group, -1), codes.split(group, -1), strict=True)
    for g, (a, w) in enumerate(parts):
        exact = a.double() @ w.double().T  # integers below 2^53
        result += weight.steps()[:, g].double() * exact
        result += weight.lowest()[:, g].double() * a.double().sum(-1, keepdim=True)
    result = result * row_scales.double()
    if outliers is not None and outlier_weight is not None:
        result += x.index_select(-1, outliers).double() @ outlier_weight.double()
    return (result if bias is None else result + bias).to(x.dtype)


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
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
