"""Kernels that add, each with a sum to try it with."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

# Long enough that a stall shows where a kernel has many running sums: lanes of
# vector instructions times their unrolling, and threads.
_TERMS = 2**16
# Sums of as many stay within the range of float16.
TERM = 2.0**-3
# A window of as many has a sum that bfloat16 cannot make.
_WINDOW = 31

_Values = Callable[..., tf.Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel that adds, or multiplies, many numbers.

    Attributes:
        trial: runs it on values that a function of shape and value makes.
        inputs: positions of the inputs in its number format; None for all.
        output: what its definition calls its one output.
        from_inputs: with fewer inputs it is exact enough as it is.
    """

    trial: Callable[[_Values], tf.Tensor]
    inputs: tuple[int, ...] | None = (0,)
    output: str = "output"
    from_inputs: int = 0


def _reduction(operation: Callable) -> Kernel:
    def trial(values: _Values) -> tf.Tensor:
        # Each layout has a loop of its own.
        return tf.concat(
            [
                tf.reshape(operation(input=values(*shape), axis=axes), [-1])
                for shape, axes in (
                    ((_TERMS, 8), [0]),
                    ((8, _TERMS), [1]),
                    ((4, _TERMS // 4, 8), [1]),
                    ((_TERMS // 4, 4, 8), [0, 1]),
                    ((_TERMS // 8, 2, 8), [0, 2]),
                )
            ],
            axis=0,
        )

    return Kernel(trial)


def _segments(operation: Callable, **options) -> Kernel:
    return Kernel(
        lambda values: operation(
            data=values(_TERMS, 8), segment_ids=_zeros(), **options
        )
    )


def _sparse_segments(operation: Callable, **options) -> Kernel:
    return Kernel(
        lambda values: operation(
            data=values(_TERMS, 8),
            indices=tf.range(_TERMS),
            segment_ids=_zeros(),
            **options,
        )
    )


def _sparse_segment_gradients(operation: Callable) -> Kernel:
    return Kernel(
        lambda values: operation(
            grad=values(_TERMS, 8),
            indices=_zeros(),
            segment_ids=tf.range(_TERMS),
            output_dim0=1,
        )
    )


def _scatter(operation: Callable, into: str) -> Kernel:
    return Kernel(
        lambda values: operation(
            **{into: values(1, 8)},
            indices=_zeros()[:, None],
            updates=values(_TERMS, 8),
        ),
        (0, 2),
    )


def _running(operation: Callable, terms: int, value: float) -> Kernel:
    return Kernel(
        lambda values: operation(x=values(terms, 8, value=value), axis=0)[-1],
        output="out",
    )


def _zeros() -> tf.Tensor:
    return tf.zeros([_TERMS], tf.int32)


def _sparse_product(values: _Values) -> tf.Tensor:
    columns = tf.range(_TERMS, dtype=tf.int64)
    return tf.raw_ops.SparseTensorDenseMatMul(
        a_indices=tf.stack([tf.zeros_like(columns), columns], axis=1),
        a_values=values(_TERMS),
        a_shape=tf.constant([1, _TERMS], tf.int64),
        b=values(_TERMS, 8),
    )


def _max_pool_gradient(values: _Values) -> tf.Tensor:
    # One pixel is the largest of all windows around it.
    middle = tf.reshape(tf.one_hot(64 * 32 + 32, 64 * 64), [1, 64, 64, 1])
    images = values(1, 64, 64, 1) * tf.cast(middle, values(1).dtype)
    window = {"ksize": [1, _WINDOW, _WINDOW, 1], **_SAME}
    return tf.raw_ops.MaxPoolGrad(
        orig_input=images,
        orig_output=tf.raw_ops.MaxPool(input=images, **window),
        grad=values(1, 64, 64, 1),
        **window,
    )


_RAW = tf.raw_ops
_SAME = {"strides": [1] * 4, "padding": "SAME"}
_SAME_3D = {"strides": [1] * 5, "padding": "SAME"}

# What models are known to sum with, in forward passes and in gradients: of a
# broadcast (Sum), a bias (BiasAddGrad), a gather (UnsortedSegmentSum), and so
# on. Products are among them for the compilers that add theirs in 16 bits.
KERNELS: dict[str, Kernel] = {
    "Sum": _reduction(_RAW.Sum),
    "Mean": _reduction(_RAW.Mean),
    "EuclideanNorm": _reduction(_RAW.EuclideanNorm),
    "Prod": Kernel(
        lambda values: tf.concat(
            [
                _RAW.Prod(input=values(256, 8, value=129 / 128), axis=[0]),
                _RAW.Prod(input=values(8, 256, value=129 / 128), axis=[1]),
            ],
            axis=0,
        )
    ),
    "Cumsum": _running(_RAW.Cumsum, _TERMS, TERM),
    "Cumprod": _running(_RAW.Cumprod, 256, 129 / 128),
    "CumulativeLogsumexp": _running(_RAW.CumulativeLogsumexp, _TERMS, TERM),
    "AddN": Kernel(
        lambda values: _RAW.AddN(inputs=[values(8)] * 512),
        inputs=None,
        output="sum",
        # Each addend rounds once: as many stay below 2 % in bfloat16.
        from_inputs=8,
    ),
    "L2Loss": Kernel(lambda values: _RAW.L2Loss(t=values(_TERMS, 8))),
    "BiasAddGrad": Kernel(
        lambda values: tf.concat(
            [
                _RAW.BiasAddGrad(out_backprop=values(_TERMS, 8)),
                _RAW.BiasAddGrad(out_backprop=values(_TERMS // 8, 8, 8)),
            ],
            axis=0,
        )
    ),
    "SegmentSum": _segments(_RAW.SegmentSum),
    "SegmentMean": _segments(_RAW.SegmentMean),
    "SegmentSumV2": _segments(_RAW.SegmentSumV2, num_segments=1),
    "UnsortedSegmentSum": _segments(_RAW.UnsortedSegmentSum, num_segments=1),
    "SparseSegmentSum": _sparse_segments(_RAW.SparseSegmentSum),
    "SparseSegmentMean": _sparse_segments(_RAW.SparseSegmentMean),
    "SparseSegmentSqrtN": _sparse_segments(_RAW.SparseSegmentSqrtN),
    "SparseSegmentSumWithNumSegments": _sparse_segments(
        _RAW.SparseSegmentSumWithNumSegments, num_segments=1
    ),
    "SparseSegmentMeanWithNumSegments": _sparse_segments(
        _RAW.SparseSegmentMeanWithNumSegments, num_segments=1
    ),
    "SparseSegmentSqrtNWithNumSegments": _sparse_segments(
        _RAW.SparseSegmentSqrtNWithNumSegments, num_segments=1
    ),
    "SparseSegmentSumGrad": _sparse_segment_gradients(
        _RAW.SparseSegmentSumGrad
    ),
    "SparseSegmentMeanGrad": _sparse_segment_gradients(
        _RAW.SparseSegmentMeanGrad
    ),
    "SparseSegmentSqrtNGrad": _sparse_segment_gradients(
        _RAW.SparseSegmentSqrtNGrad
    ),
    "ScatterNd": Kernel(
        lambda values: _RAW.ScatterNd(
            indices=_zeros()[:, None], updates=values(_TERMS, 8), shape=[1, 8]
        ),
        (1,),
    ),
    "TensorScatterAdd": _scatter(_RAW.TensorScatterAdd, "tensor"),
    "TensorScatterSub": _scatter(_RAW.TensorScatterSub, "tensor"),
    "ScatterNdNonAliasingAdd": _scatter(_RAW.ScatterNdNonAliasingAdd, "input"),
    "SparseTensorDenseMatMul": Kernel(_sparse_product, (1, 3), "product"),
    "Softmax": Kernel(
        lambda values: _RAW.Softmax(logits=values(1, _TERMS)), output="softmax"
    ),
    "LogSoftmax": Kernel(
        lambda values: _RAW.LogSoftmax(logits=values(1, _TERMS)),
        output="logsoftmax",
    ),
    "AvgPool": Kernel(
        lambda values: _RAW.AvgPool(
            value=values(1, 64, 64, 4),
            ksize=[1, 64, 64, 1],
            strides=[1] * 4,
            padding="VALID",
        )
    ),
    "AvgPoolGrad": Kernel(
        lambda values: _RAW.AvgPoolGrad(
            orig_input_shape=[1, 64, 64, 2],
            grad=values(1, 34, 34, 2),
            ksize=[1, _WINDOW, _WINDOW, 1],
            strides=[1] * 4,
            padding="VALID",
        ),
        (1,),
    ),
    "AvgPool3D": Kernel(
        lambda values: _RAW.AvgPool3D(
            input=values(1, 16, 16, 16, 2),
            ksize=[1, 16, 16, 16, 1],
            strides=[1] * 5,
            padding="VALID",
        )
    ),
    "AvgPool3DGrad": Kernel(
        lambda values: _RAW.AvgPool3DGrad(
            orig_input_shape=[1, 24, 24, 24, 1],
            grad=values(1, 14, 14, 14, 1),
            ksize=[1, 11, 11, 11, 1],
            strides=[1] * 5,
            padding="VALID",
        ),
        (1,),
    ),
    "MaxPoolGrad": Kernel(_max_pool_gradient, (0, 1, 2)),
    "MatMul": Kernel(
        lambda values: _RAW.MatMul(a=values(3, _TERMS), b=values(_TERMS, 8)),
        (0, 1),
        "product",
    ),
    "BatchMatMulV2": Kernel(
        lambda values: _RAW.BatchMatMulV2(
            x=values(2, 3, _TERMS), y=values(2, _TERMS, 8)
        ),
        (0, 1),
    ),
    "Einsum": Kernel(
        lambda values: _RAW.Einsum(
            inputs=[values(4, _TERMS // 4, 8)] * 2, equation="abc,abd->cd"
        ),
        None,
    ),
    # Its own reductions, of what only one of its inputs has.
    "Einsum, a sum": Kernel(
        lambda values: _RAW.Einsum(
            inputs=[values(4, _TERMS // 4, 8)], equation="abc->c"
        ),
        None,
    ),
    "Conv2D": Kernel(
        lambda values: _RAW.Conv2D(
            input=values(1, 8, 8, 512), filter=values(5, 5, 512, 4), **_SAME
        ),
        (0, 1),
    ),
    "Conv2DBackpropInput": Kernel(
        lambda values: _RAW.Conv2DBackpropInput(
            input_sizes=[1, 8, 8, 4],
            filter=values(5, 5, 4, 512),
            out_backprop=values(1, 8, 8, 512),
            **_SAME,
        ),
        (1, 2),
    ),
    "Conv2DBackpropFilter": Kernel(
        lambda values: _RAW.Conv2DBackpropFilter(
            input=values(16, 64, 64, 4),
            filter_sizes=[3, 3, 4, 4],
            out_backprop=values(16, 64, 64, 4),
            **_SAME,
        ),
        (0, 2),
    ),
    "Conv3D": Kernel(
        lambda values: _RAW.Conv3D(
            input=values(1, 4, 4, 4, 256),
            filter=values(3, 3, 3, 256, 2),
            **_SAME_3D,
        ),
        (0, 1),
    ),
    "Conv3DBackpropInputV2": Kernel(
        lambda values: _RAW.Conv3DBackpropInputV2(
            input_sizes=[1, 4, 4, 4, 2],
            filter=values(3, 3, 3, 2, 256),
            out_backprop=values(1, 4, 4, 4, 256),
            **_SAME_3D,
        ),
        (1, 2),
    ),
    "Conv3DBackpropFilterV2": Kernel(
        lambda values: _RAW.Conv3DBackpropFilterV2(
            input=values(4, 16, 16, 16, 2),
            filter_sizes=[3, 3, 3, 2, 2],
            out_backprop=values(4, 16, 16, 16, 2),
            **_SAME_3D,
        ),
        (0, 2),
    ),
    "DepthwiseConv2dNative": Kernel(
        lambda values: _RAW.DepthwiseConv2dNative(
            input=values(1, 64, 64, 2),
            filter=values(_WINDOW, _WINDOW, 2, 1),
            **_SAME,
        ),
        (0, 1),
    ),
    "DepthwiseConv2dNativeBackpropInput": Kernel(
        lambda values: _RAW.DepthwiseConv2dNativeBackpropInput(
            input_sizes=[1, 64, 64, 2],
            filter=values(_WINDOW, _WINDOW, 2, 1),
            out_backprop=values(1, 64, 64, 2),
            **_SAME,
        ),
        (1, 2),
    ),
    "DepthwiseConv2dNativeBackpropFilter": Kernel(
        lambda values: _RAW.DepthwiseConv2dNativeBackpropFilter(
            input=values(16, 64, 64, 4),
            filter_sizes=[3, 3, 4, 1],
            out_backprop=values(16, 64, 64, 4),
            **_SAME,
        ),
        (0, 2),
    ),
    "Dilation2DBackpropFilter": Kernel(
        lambda values: _RAW.Dilation2DBackpropFilter(
            input=values(16, 64, 64, 4),
            filter=values(3, 3, 4),
            out_backprop=values(16, 64, 64, 4),
            rates=[1] * 4,
            **_SAME,
        ),
        (0, 1, 2),
        "filter_backprop",
    ),
}
