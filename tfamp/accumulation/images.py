"""Kernels that add over pixels, each with a sum to try it with."""

import operator

import tensorflow as tf

from tfamp.accumulation.trial import Kernel, Values

# A window of as many has a sum that bfloat16 cannot make.
_WINDOW = 31
# As many pixels in a column: oneDNN never ends making a kernel, of a CPU's
# bfloat16 instructions, for a filter that is 15 or more wide.
_TALL = _WINDOW**2
# As many on either side have one that float16 cannot make.
_NEIGHBOURS = 2500

_RAW = tf.raw_ops
_SAME = {"strides": [1] * 4, "padding": "SAME"}
_SAME_3D = {"strides": [1] * 5, "padding": "SAME"}
_POOLING = {"ksize": [1, _WINDOW, _WINDOW, 1], **_SAME}
_POOLING_3D = {"ksize": [1, 9, 9, 9, 1], **_SAME_3D}
_UNIT = {"bias": 1.0, "alpha": 1.0, "beta": 0.5}


def _bright(values: Values) -> tf.Tensor:
    """Images with one pixel that is the largest of all windows around it."""
    middle = tf.reshape(tf.one_hot(64 * 32 + 32, 64 * 64), [1, 64, 64, 1])
    return values(1, 64, 64, 1) * tf.cast(middle, values(1).dtype)


def _pooled(values: Values) -> dict[str, tf.Tensor]:
    images = _bright(values)
    return {
        "orig_input": images,
        "orig_output": _RAW.MaxPool(input=images, **_POOLING),
    }


def _max_pool_3d_gradient(values: Values) -> tf.Tensor:
    middle = tf.reshape(tf.one_hot(2184, 16**3), [1, 16, 16, 16, 1])
    images = values(1, 16, 16, 16, 1) * tf.cast(middle, values(1).dtype)
    return _RAW.MaxPool3DGrad(
        orig_input=images,
        orig_output=_RAW.MaxPool3D(input=images, **_POOLING_3D),
        grad=values(1, 16, 16, 16, 1),
        **_POOLING_3D,
    )


def _overlap(node: tf.compat.v1.NodeDef) -> bool:
    """Whether a pixel may be in several windows of a pooling.

    Where it is not, as in most networks, its gradient is that of one window.
    """
    sizes, strides = (node.attr[name].list.i for name in ("ksize", "strides"))
    return any(map(operator.gt, sizes, strides))


IMAGES: dict[str, Kernel] = {
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
    "MaxPoolGrad": Kernel(
        lambda values: _RAW.MaxPoolGrad(
            grad=values(1, 64, 64, 1), **_pooled(values), **_POOLING
        ),
        (0, 1, 2),
        adds=_overlap,
    ),
    "MaxPoolGradV2": Kernel(
        lambda values: _RAW.MaxPoolGradV2(
            grad=values(1, 64, 64, 1), **_pooled(values), **_POOLING
        ),
        (0, 1, 2),
    ),
    "MaxPoolGradWithArgmax": Kernel(
        lambda values: _RAW.MaxPoolGradWithArgmax(
            input=values(1, 64, 64, 1),
            grad=values(1, 64, 64, 1),
            argmax=tf.zeros([1, 64, 64, 1], tf.int64),
            **_POOLING,
        ),
        (0, 1),
        adds=_overlap,
    ),
    "MaxPool3DGrad": Kernel(
        _max_pool_3d_gradient,
        (0, 1, 2),
        types=("T", "TInput"),
        adds=_overlap,
    ),
    "ResizeNearestNeighborGrad": Kernel(
        lambda values: _RAW.ResizeNearestNeighborGrad(
            grads=values(1, 64, 64, 2), size=[1, 1]
        )
    ),
    # What it takes is float32 already.
    "CropAndResizeGradImage": Kernel(
        lambda values: _RAW.CropAndResizeGradImage(
            grads=tf.cast(values(1, 64, 64, 1), tf.float32),
            boxes=[[0.0, 0.0, 1.0, 1.0]],
            box_ind=[0],
            image_size=[1, 1, 1, 1],
            T=values(1).dtype,
        ),
        (),
    ),
    "LRN": Kernel(
        lambda values: _RAW.LRN(
            input=values(1, 1, 1, 5001), depth_radius=_NEIGHBOURS, **_UNIT
        )
    ),
    "LRNGrad": Kernel(
        lambda values: _RAW.LRNGrad(
            input_grads=values(1, 1, 1, 5001),
            input_image=values(1, 1, 1, 5001),
            output_image=values(1, 1, 1, 5001),
            depth_radius=_NEIGHBOURS,
            **_UNIT,
        ),
        (0, 1, 2),
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
            input=values(1, _TALL, 1, 2),
            filter=values(_TALL, 1, 2, 1),
            **_SAME,
        ),
        (0, 1),
    ),
    "DepthwiseConv2dNativeBackpropInput": Kernel(
        lambda values: _RAW.DepthwiseConv2dNativeBackpropInput(
            input_sizes=[1, _TALL, 1, 2],
            filter=values(_TALL, 1, 2, 1),
            out_backprop=values(1, _TALL, 1, 2),
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
    "Dilation2DBackpropInput": Kernel(
        lambda values: _RAW.Dilation2DBackpropInput(
            input=_bright(values),
            filter=values(_WINDOW, _WINDOW, 1, value=0.0),
            out_backprop=values(1, 64, 64, 1),
            rates=[1] * 4,
            **_SAME,
        ),
        (0, 1, 2),
        "in_backprop",
    ),
}
