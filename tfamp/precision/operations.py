"""The table: which operations compute in float32, which in 16 bits, and why.

Names are those of `keras.ops`. Functions of `tf`, `tf.math`, `tf.nn`,
`tf.linalg`, `tf.image`, `tf.signal` and `tf.sparse` and the operators of
tensors follow the row of the `keras.ops` function that they are; a row of `tf`
names of its own says so.

What stands in no row computes in the dtype of its operands: in float32 as
soon as one of them is.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from tfamp.errors import InputError


@dataclasses.dataclass(frozen=True)
class Row:
    """Operations that compute in float32 for one reason."""

    reason: str
    names: tuple[str, ...]


def _row(reason: str, names: str) -> Row:
    return Row(reason, tuple(names.split()))


FLOAT32 = (
    _row(
        "exponentials overflow float16 from 11.1 on, and turn a rounding of"
        " the exponent into a relative error of the result",
        "exp exp2 expm1 sinh cosh logaddexp logaddexp2 softplus celu ldexp i0"
        " bessel_i0 bessel_i0e bessel_i1 bessel_i1e",
    ),
    _row(
        "made of powers and exponentials, here or in their gradient, which"
        " other libraries' kernels compute in float32 inside",
        "gelu erf erfc erfcinv squareplus",
    ),
    _row(
        "logarithms of small numbers, which 16 bits flush to 0 or round",
        "log log10 log1p log2 logdet slogdet lgamma digamma log_sigmoid xlogy"
        " xlog1py lbeta",
    ),
    _row(
        "powers and squares overflow float16 from 256 on, and underflow below"
        " 0.0002",
        "power square squared_difference polyval",
    ),
    _row(
        "roots and reciprocals of sums of squares and of small numbers",
        "sqrt rsqrt reciprocal reciprocal_no_nan cbrt hypot",
    ),
    _row(
        "a quotient by a small number overflows, and one by an epsilon that"
        " 16 bits flush to 0 is infinite; a constant that 16 bits hold divides"
        " in 16 bits",
        "divide true_divide divide_no_nan xdivy rgb_to_hsv",
    ),
    _row(
        "softmax saturates in 16 bits, and its gradient is then exactly 0",
        "softmax log_softmax logsumexp sparsemax sparse_softmax sparse_plus",
    ),
    _row(
        "norms are roots of sums of squares",
        "norm normalize l2_normalize batch_normalization layer_normalization"
        " layer_norm rms_normalization group_normalization moments"
        " weighted_moments sufficient_statistics normalize_moments lp_pool psnr"
        " lrn local_response_normalization cdist clip_by_norm"
        " clip_by_global_norm global_norm",
    ),
    _row(
        "variances are differences of sums of squares",
        "var variance std corrcoef cov histogram",
    ),
    _row(
        "sums stop growing at 256 in bfloat16 and 2048 in float16, products"
        " overflow",
        "sum mean average prod nansum nanmean nanstd nanvar nanprod trace"
        " euclidean_norm trapezoid add_n accumulate_n l2_loss ssim"
        " ssim_multiscale total_variation",
    ),
    _row(
        "running sums and products, as sums",
        "cumsum cumprod cumulative_logsumexp nancumsum nancumprod"
        " cumulative_trapezoid",
    ),
    _row(
        "sums over segments, edges and duplicate indices, as sums",
        "segment_sum segment_mean segment_prod unsorted_segment_sum"
        " unsorted_segment_mean unsorted_segment_prod"
        " unsorted_segment_sqrt_n scatter scatter_nd bincount"
        " tensor_scatter_nd_add",
    ),
    _row(
        "numbers that are rounded equal their neighbours",
        "equal not_equal",
    ),
    _row(
        "angles beyond one turn have a rounding larger than a turn",
        "sin cos tan sinc angle",
    ),
    _row(
        "inverse functions that are steep at the ends of their range, or"
        " divide by a square in their gradient",
        "acos arccos asin arcsin acosh arccosh atanh arctanh erfinv logit"
        " ndtri atan arctan atan2 arctan2 asinh arcsinh",
    ),
    _row(
        "losses",
        "binary_crossentropy categorical_crossentropy"
        " sparse_categorical_crossentropy ctc_loss kl_divergence"
        " softmax_cross_entropy_with_logits"
        " sparse_softmax_cross_entropy_with_logits"
        " sigmoid_cross_entropy_with_logits"
        " weighted_cross_entropy_with_logits log_poisson_loss nce_loss"
        " sampled_softmax_loss compute_average_loss",
    ),
    _row(
        "decompositions and solutions, which have no kernel in 16 bits",
        "cholesky cholesky_inverse det eig eigh inv lstsq lu_factor pinv qr"
        " solve solve_triangular svd expm logm sqrtm jvp fft fft2 ifft2 rfft"
        " irfft stft istft",
    ),
)

# Those that multiply no matrices follow another row: an outer product, which
# adds up nothing, that of a multiplication, a product of vectors that of a
# sum. See `contractions`.
PRODUCTS = _row(
    "the hardware multiplies 16 bits and sums in float32",
    "matmul dot einsum tensordot vdot inner outer conv conv1d conv2d conv3d"
    " conv_transpose conv1d_transpose conv2d_transpose conv3d_transpose"
    " depthwise_conv depthwise_conv2d separable_conv separable_conv2d"
    " convolution dot_product_attention matvec kron sparse_dense_matmul",
)

# Numbers made from nothing or from other dtypes: rounded to 16 bits they are
# no longer the positions, ids, frequencies and masks that they were.
SEQUENCES = ("arange", "range", "linspace", "logspace", "geomspace")
MADE = _row(
    "positions above 256, frequencies and masks are made in float32 where code"
    " asks for 16 bits, and take 16 bits in the product that needs them",
    " ".join(
        ("cast saturate_cast convert_to_tensor array constant", *SEQUENCES)
    ),
)


def resolve(
    operations: bool | Mapping[str, Sequence[str]],
) -> dict[str, str] | None:
    """Returns what each operation computes in.

    Args:
        operations: True for the table; False for None; or a dict with `add`
            and `remove`, names to add to the table and to leave in 16 bits.

    Returns:
        "float32", "product" or "made" by name. An operation without an entry
        computes in what its operands have.

    Raises:
        InputError: another key, or a name that no operation has.
    """
    if operations is False:
        return None
    kinds = {name: "float32" for row in FLOAT32 for name in row.names}
    kinds.update(dict.fromkeys(PRODUCTS.names, "product"))
    kinds.update(dict.fromkeys(MADE.names, "made"))
    if operations is True:
        return kinds
    if not isinstance(operations, Mapping) or set(operations) - {
        "add",
        "remove",
    }:
        raise InputError(
            "operations must be True, False or a dict with lists of names"
            f" under 'add' and 'remove', got {operations!r}."
        )
    for key in ("add", "remove"):
        names = operations.get(key, ())
        if isinstance(names, str):
            names = (names,)
        for name in names:
            _require_known(name, kinds)
            if key == "add":
                kinds[name] = "float32"
            else:
                kinds.pop(name, None)
    return kinds


def _require_known(name: str, kinds: Mapping[str, str]) -> None:
    import keras
    import tensorflow as tf

    owners = (
        *(keras.ops, tf, tf.math, tf.nn, tf.linalg),
        *(tf.image, tf.signal, tf.sparse),
    )
    if name in kinds or any(hasattr(owner, name) for owner in owners):
        return
    near = difflib.get_close_matches(name, dir(keras.ops), n=3, cutoff=0.0)
    raise InputError(
        f"No operation is called {name!r}; expected a name of keras.ops, such"
        f" as {', '.join(near)}."
    )
