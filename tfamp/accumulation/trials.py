"""Kernels that add, each with a sum to try it with."""

from collections.abc import Callable

import tensorflow as tf

from tfamp.accumulation.images import IMAGES
from tfamp.accumulation.trial import (
    FACTOR,
    TERM,
    TERMS,
    Kernel,
    Values,
    data_inputs,
)


def _reduction(operation: Callable) -> Kernel:
    def trial(values: Values) -> tf.Tensor:
        # Each layout has a loop of its own.
        return tf.concat(
            [
                tf.reshape(operation(input=values(*shape), axis=axes), [-1])
                for shape, axes in (
                    ((TERMS, 8), [0]),
                    ((8, TERMS), [1]),
                    ((4, TERMS // 4, 8), [1]),
                    ((TERMS // 4, 4, 8), [0, 1]),
                    ((TERMS // 8, 2, 8), [0, 2]),
                )
            ],
            axis=0,
        )

    return Kernel(trial)


def _segments(operation: Callable, **options) -> Kernel:
    return Kernel(
        lambda values: operation(
            data=values(TERMS, 8), segment_ids=_zeros(), **options
        )
    )


def _segment_products(operation: Callable, **options) -> Kernel:
    return Kernel(
        lambda values: operation(
            data=values(256, 8, value=FACTOR),
            segment_ids=tf.zeros([256], tf.int32),
            **options,
        )
    )


def _sparse_segments(operation: Callable, **options) -> Kernel:
    return Kernel(
        lambda values: operation(
            data=values(TERMS, 8),
            indices=tf.range(TERMS),
            segment_ids=_zeros(),
            **options,
        )
    )


def _sparse_segment_gradients(operation: Callable) -> Kernel:
    return Kernel(
        lambda values: operation(
            grad=values(TERMS, 8),
            indices=_zeros(),
            segment_ids=tf.range(TERMS),
            output_dim0=1,
        )
    )


def _scatter(operation: Callable, into: str) -> Kernel:
    return Kernel(
        lambda values: operation(
            **{into: values(1, 8)},
            indices=_zeros()[:, None],
            updates=values(TERMS, 8),
        ),
        (0, 2),
    )


def _running(operation: Callable, terms: int, value: float) -> Kernel:
    return Kernel(
        lambda values: operation(x=values(terms, 8, value=value), axis=0)[-1],
        output="out",
    )


def _zeros() -> tf.Tensor:
    return tf.zeros([TERMS], tf.int32)


def _sparse_product(values: Values) -> tf.Tensor:
    columns = tf.range(TERMS, dtype=tf.int64)
    return tf.raw_ops.SparseTensorDenseMatMul(
        a_indices=tf.stack([tf.zeros_like(columns), columns], axis=1),
        a_values=values(TERMS),
        a_shape=tf.constant([1, TERMS], tf.int64),
        b=values(TERMS, 8),
    )


_RAW = tf.raw_ops

# What models are known to sum with, in forward passes and in gradients: of a
# broadcast (Sum), a bias (BiasAddGrad), a gather (UnsortedSegmentSum), and so
# on. Products are among them for the compilers that add theirs in 16 bits.
SUMS: dict[str, Kernel] = {
    "Sum": _reduction(_RAW.Sum),
    "Mean": _reduction(_RAW.Mean),
    "EuclideanNorm": _reduction(_RAW.EuclideanNorm),
    "Prod": Kernel(
        lambda values: tf.concat(
            [
                _RAW.Prod(input=values(256, 8, value=FACTOR), axis=[0]),
                _RAW.Prod(input=values(8, 256, value=FACTOR), axis=[1]),
            ],
            axis=0,
        )
    ),
    "Cumsum": _running(_RAW.Cumsum, TERMS, TERM),
    "Cumprod": _running(_RAW.Cumprod, 256, FACTOR),
    "CumulativeLogsumexp": _running(_RAW.CumulativeLogsumexp, TERMS, TERM),
    "AddN": Kernel(
        lambda values: _RAW.AddN(inputs=[values(8)] * 512),
        inputs=None,
        output="sum",
        # Each addend rounds once: as many stay below 2 % in bfloat16.
        adds=lambda node: len(data_inputs(node)) >= 8,
    ),
    "L2Loss": Kernel(lambda values: _RAW.L2Loss(t=values(TERMS, 8))),
    "BiasAddGrad": Kernel(
        lambda values: tf.concat(
            [
                _RAW.BiasAddGrad(out_backprop=values(TERMS, 8)),
                _RAW.BiasAddGrad(out_backprop=values(TERMS // 8, 8, 8)),
            ],
            axis=0,
        )
    ),
    "SegmentSum": _segments(_RAW.SegmentSum),
    "SegmentMean": _segments(_RAW.SegmentMean),
    "SegmentSumV2": _segments(_RAW.SegmentSumV2, num_segments=1),
    "UnsortedSegmentSum": _segments(_RAW.UnsortedSegmentSum, num_segments=1),
    "SegmentProd": _segment_products(_RAW.SegmentProd),
    "UnsortedSegmentProd": _segment_products(
        _RAW.UnsortedSegmentProd, num_segments=1
    ),
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
            indices=_zeros()[:, None], updates=values(TERMS, 8), shape=[1, 8]
        ),
        (1,),
    ),
    "TensorScatterAdd": _scatter(_RAW.TensorScatterAdd, "tensor"),
    "TensorScatterSub": _scatter(_RAW.TensorScatterSub, "tensor"),
    "ScatterNdNonAliasingAdd": _scatter(_RAW.ScatterNdNonAliasingAdd, "input"),
    "SparseTensorDenseMatMul": Kernel(_sparse_product, (1, 3), "product"),
    "Softmax": Kernel(
        lambda values: _RAW.Softmax(logits=values(1, TERMS)), output="softmax"
    ),
    "LogSoftmax": Kernel(
        lambda values: _RAW.LogSoftmax(logits=values(1, TERMS)),
        output="logsoftmax",
    ),
    "MatMul": Kernel(
        lambda values: tf.concat(
            [
                _RAW.MatMul(a=values(3, TERMS), b=values(TERMS, 8)),
                # As `bias` asks for it.
                tf.reshape(
                    _RAW.MatMul(
                        a=values(TERMS, 8),
                        b=values(TERMS, 1, value=1.0),
                        transpose_a=True,
                    ),
                    [1, 8],
                ),
            ],
            axis=0,
        ),
        (0, 1),
        "product",
    ),
    "BatchMatMulV2": Kernel(
        lambda values: _RAW.BatchMatMulV2(
            x=values(2, 3, TERMS), y=values(2, TERMS, 8)
        ),
        (0, 1),
    ),
    "Einsum": Kernel(
        lambda values: _RAW.Einsum(
            inputs=[values(4, TERMS // 4, 8)] * 2, equation="abc,abd->cd"
        ),
        None,
    ),
    # Its own reductions, of what only one of its inputs has.
    "Einsum, a sum": Kernel(
        lambda values: _RAW.Einsum(
            inputs=[values(4, TERMS // 4, 8)], equation="abc->c"
        ),
        None,
    ),
}
KERNELS = SUMS | IMAGES
