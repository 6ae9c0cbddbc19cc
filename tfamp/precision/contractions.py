"""Which products multiply matrices, and which only have such a name.

A product of matrices uses a number many times, and adds up what it multiplied:
that is what hardware does in 16 bits with sums in float32. An outer product
adds up nothing, so it is a multiplication; a product of vectors, as a squared
norm, uses each number once, so it is a sum.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

_Axes = list[Hashable]


def kind(name: str, args: Sequence, kwargs: Mapping, is_reflected: bool) -> str:
    """What a product is.

    Args:
        name: a name of `operations.PRODUCTS`.
        args: of its call.
        kwargs: of its call.
        is_reflected: whether its two operands come in the other order.

    Returns:
        "product", "sum" or "multiplication"; "product" too where that hangs on
        a size that is not known yet.
    """
    if name in ("kron", "outer"):
        return "multiplication"
    if name not in _AXES:
        return "product"
    if is_reflected:
        args = args[::-1]
    try:
        operands, summed = _AXES[name](*args, **kwargs)
        used = [
            {
                axis
                for axis, size in zip(axes, _shape(operand), strict=True)
                if size != 1
            }
            for operand, axes in operands
        ]
    except (AttributeError, TypeError, ValueError):
        # The function itself will say what is wrong with the call.
        return "product"
    if not set().union(*used) & set(summed):
        return "multiplication"
    if len(used) > 2 or used[0] != used[-1]:
        return "product"
    return "sum"


def _shape(operand: Any) -> tuple[int | None, ...]:
    return tuple(getattr(operand, "shape", ()))


def _rank(operand: Any) -> int:
    return len(_shape(operand))


def _einsum(equation: str, *operands: Any, **kwargs: Any):
    terms, arrow, result = equation.replace(" ", "").partition("->")
    named = [
        (operand, _letters(term, _rank(operand)))
        for term, operand in zip(terms.split(","), operands, strict=True)
    ]
    every = [axis for _, axes in named for axis in axes]
    if arrow:
        summed = [axis for axis in every if str(axis) not in result]
    else:
        summed = [axis for axis in every if every.count(axis) > 1]
    return named, [axis for axis in summed if not isinstance(axis, int)]


def _letters(term: str, rank: int) -> _Axes:
    """The axes of a term; those of an ellipsis by their place from its end."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return [*before, *range(-hidden if dots else 0, 0), *after]


def _matmul(
    a: Any,
    b: Any,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
    *_: Any,
    **kwargs: Any,
):
    def axes(operand, matrix, is_transposed, vector):
        rank = _rank(operand)
        if rank < 2:
            return vector[:rank]
        matrix = matrix[::-1] if is_transposed else matrix
        return [*range(-rank, -2), *matrix]

    left = axes(a, ["row", "inner"], transpose_a or adjoint_a, ["inner"])
    right = axes(b, ["inner", "column"], transpose_b or adjoint_b, ["inner"])
    return [(a, left), (b, right)], ["inner"]


def _tensordot(a: Any, b: Any, axes: Any = 2, *_: Any, **kwargs: Any):
    if isinstance(axes, int):
        axes = range(_rank(a) - axes, _rank(a)), range(axes)
    return _contracted(a, b, *axes)


def _dot(a: Any, b: Any):
    if 0 in (_rank(a), _rank(b)):
        return _contracted(a, b, [], [])
    return _contracted(a, b, [-1], [-min(2, _rank(b))])


def _inner(a: Any, b: Any):
    each = [-1] if _rank(a) and _rank(b) else []
    return _contracted(a, b, each, each)


def _vdot(a: Any, b: Any):
    every = range(_rank(a))
    return _contracted(a, b, every, every)


def _contracted(a: Any, b: Any, axes_of_a, axes_of_b):
    """Operands of which some axes are summed, and the others are of one."""
    left: _Axes = [("left", axis) for axis in range(_rank(a))]
    right: _Axes = [("right", axis) for axis in range(_rank(b))]
    pairs = list(zip(_listed(axes_of_a), _listed(axes_of_b), strict=True))
    for axis_of_a, axis_of_b in pairs:
        left[axis_of_a] = right[axis_of_b] = ("both", axis_of_a % _rank(a))
    return [(a, left), (b, right)], set(left) & set(right)


def _listed(axes: Any) -> list[int]:
    return [axes] if isinstance(axes, int) else list(axes)


_AXES: dict[str, Callable] = {
    "dot": _dot,
    "einsum": _einsum,
    "inner": _inner,
    "matmul": _matmul,
    "tensordot": _tensordot,
    "vdot": _vdot,
}
