"""TensorFlow's operations by what they do to numbers."""

# They hand on their first input alone, reshaped or cast.
RESHAPES = frozenset(
    {
        "Argument",
        "BroadcastTo",
        "Cast",
        "EnsureShape",
        "ExpandDims",
        "Identity",
        "Reshape",
        "Result",
        "Squeeze",
        "StopGradient",
        "Tile",
        "Transpose",
    }
)
# Operations that hand numbers on as they are, but for their dtype.
MOVES = frozenset(
    {
        "Argument",
        "BroadcastTo",
        "Cast",
        "ConcatV2",
        "EnsureShape",
        "ExpandDims",
        "GatherV2",
        "Identity",
        "IdentityN",
        "Pack",
        "Pad",
        "PadV2",
        "PreventGradient",
        "Reshape",
        "Result",
        "Select",
        "SelectV2",
        "Slice",
        "Split",
        "SplitV",
        "Squeeze",
        "StopGradient",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unpack",
    }
)
ARITHMETIC = frozenset(
    {"Add", "AddV2", "Maximum", "Minimum", "Mul", "Neg", "RealDiv", "Sub"}
)
PRODUCTS = frozenset(
    {
        "BatchMatMul",
        "BatchMatMulV2",
        "BatchMatMulV3",
        "Conv2D",
        "Conv3D",
        "DepthwiseConv2dNative",
        "Einsum",
        "MatMul",
    }
)
