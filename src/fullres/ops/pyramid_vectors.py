"""Innermost loops of pyramid attention on the CPU, written for LLVM in vectors of float32.

Numba compiles neither products of matrices with a tile held in registers, nor exponentials of
short rows without a slow rest. Arrays are one-dimensional; a row of one is named by the array and
the position of its first element.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils as _untyped
from numba.extending import intrinsic

cgutils: Any = _untyped

LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
"""Floats of a vector."""
TILE = 6
"""Rows of a product that are held in registers, two vectors of each."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_UNDEFINED, _ZERO = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_VECTOR, None)
_FUSED = ("contract",)

_LOG2_E = 1.4426950408889634
_POWERS = (
    0.00015403530393381608,
    0.0013333558146428443,
    0.009618129107628477,
    0.05550410866482158,
    0.24022650695910072,
    0.6931471805599453,
    1.0,
)
"""Taylor series of 2^x from the sixth power down: off by 1e-7 at most where |x| <= 1/2."""


def _add_product(
    typing: Any,
    a: Any,
    a0: Any,
    lda: Any,
    b: Any,
    b0: Any,
    ldb: Any,
    c: Any,
    c0: Any,
    ldc: Any,
    depth: Any,
) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = _parts(builder, _start(context, builder, signature, args, 6), args[8])
        first = [_load(builder, part) for part in parts]
        for part, total in zip(parts, _tile(context, builder, signature, args, first), strict=True):
            _store(builder, total, part)
        return context.get_dummy_value()

    n = types.intp
    return types.void(a, n, n, b, n, n, c, n, n, n), code


add_product: Any = intrinsic(_add_product)
"""Adds a product of matrices, c += a b, for `TILE` rows and `2 * LANES` columns of c.

Arguments: each matrix as its array, first position and distance from row to row; the columns of a.
"""


def _follow_product(
    typing: Any,
    a: Any,
    a0: Any,
    lda: Any,
    b: Any,
    b0: Any,
    ldb: Any,
    c: Any,
    c0: Any,
    ldc: Any,
    depth: Any,
    further: Any,
) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = _parts(builder, _start(context, builder, signature, args, 6), args[8])
        zero = [_ZERO] * len(parts)
        for part, new in zip(parts, _tile(context, builder, signature, args, zero), strict=True):
            _follow(builder, part, args[10], new)
        return context.get_dummy_value()

    n = types.intp
    return types.void(a, n, n, b, n, n, c, n, n, n, n), code


follow_product: Any = intrinsic(_follow_product)
"""Lets a product of matrices follow those before it, for `TILE` rows and `2 * LANES` columns.

c holds the last product; `further` on, the sum of the last two, and as far again, of the last
three. Arguments: as `add_product`, and `further`.
"""


def _follow_mixed(
    typing: Any,
    w: Any,
    w0: Any,
    step: Any,
    c: Any,
    c0: Any,
    further: Any,
    number: Any,
) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, target = (_start(context, builder, signature, args, n) for n in (0, 3))
        with _blocks(builder, args[6]) as x:
            new = _sum3(builder, builder.gep(row, [x]), args[2])
            _follow(builder, builder.gep(target, [x]), args[5], new)
        return context.get_dummy_value()

    n = types.intp
    return types.void(w, n, n, c, n, n, n), code


follow_mixed: Any = intrinsic(_follow_mixed)
"""Lets a row, of sums of three elements each, follow those before it, as `follow_product` does.

Arguments: the array of the elements and the position of the first, the step between the three;
the array that takes the row and the position of its first element, `further`; the row's length,
rounded up to a multiple of `LANES`.
"""


def _exponentials(
    typing: Any,
    t: Any,
    t0: Any,
    step: Any,
    factor: Any,
    f0: Any,
    number: Any,
    shift: Any,
    scale: Any,
    out: Any,
    o0: Any,
    keep: Any,
) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, factors, target = (_start(context, builder, signature, args, n) for n in (0, 3, 8))
        step, number, keep = args[2], args[5], args[10]
        shift, scale = _spread(builder, args[6]), _spread(builder, args[7])
        lanes = ir.Constant(_INTS, list(range(LANES)))
        total = cgutils.alloca_once_value(builder, _ZERO)
        with _blocks(builder, number) as x:
            score = _sum3(builder, builder.gep(row, [x]), step)
            score = builder.fmul(score, _load(builder, builder.gep(factors, [x])), flags=_FUSED)
            y = _exponential(builder, builder.fsub(score, shift, flags=_FUSED))
            y = builder.fmul(y, scale, flags=_FUSED)
            left = _spread_ints(builder, builder.trunc(builder.sub(number, x), _INT))
            y = builder.select(builder.icmp_signed("<", lanes, left), y, _ZERO)
            builder.store(builder.fadd(builder.load(total), y), total)
            with builder.if_then(keep):
                _store(builder, y, builder.gep(target, [x]))
        add = _known(builder, "vector.reduce.fadd", ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR]))
        return builder.call(add, [_FLOAT(0), builder.load(total)], fastmath=("reassoc",))

    n, f = types.intp, types.float32
    return f(t, n, n, factor, n, n, f, f, out, n, types.boolean), code


exponentials: Any = intrinsic(_exponentials)
"""Exponentials of a row of scores; gives their sum.

The score of key x is the factor of x times the sum of three elements: element x of a row and two
that are each `step` further. What is summed is scale * e^(score - shift), with exponents no further
from 0 than 87; NaN stays NaN. Reads up to `LANES - 1` elements beyond, and writes them as zeros.

Arguments: the row's array and first position, step; the factors' array and first position; keys;
shift; scale; the array that takes the exponentials and its first position, and whether to write.
"""


def _exponential(builder: Any, x: Any) -> Any:
    """e^x as a power of two and a polynomial; what is not a number passes both bounds."""
    for bound, beyond in ((-87.0, "<"), (87.0, ">")):
        limit = _constant(bound)
        x = builder.select(builder.fcmp_ordered(beyond, x, limit), limit, x)
    rounding = _known(builder, "rint", ir.FunctionType(_VECTOR, [_VECTOR]))
    whole = builder.call(rounding, [builder.fmul(x, _constant(_LOG2_E))])
    rest = builder.fsub(builder.fmul(x, _constant(_LOG2_E), flags=_FUSED), whole, flags=_FUSED)
    y = _constant(_POWERS[0])
    for power in _POWERS[1:]:
        y = builder.fadd(builder.fmul(y, rest, flags=_FUSED), _constant(power), flags=_FUSED)
    exponent = builder.shl(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(y, _INTS), exponent), _VECTOR)


def _known(builder: Any, name: str, kind: Any) -> Any:
    """A function of vectors that LLVM knows."""
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")


def _start(context: Any, builder: Any, signature: Any, args: Any, n: int) -> Any:
    """Pointer into the array that is argument n, at the position that is argument n + 1."""
    array = cgutils.create_struct_proxy(signature.args[n])(context, builder, args[n])
    return builder.gep(array.data, [args[n + 1]])


def _rows(builder: Any, pointer: Any, length: Any) -> list[Any]:
    return [builder.gep(pointer, [builder.mul(length, length.type(r))]) for r in range(TILE)]


def _parts(builder: Any, pointer: Any, length: Any) -> list[Any]:
    """Pointers to the vectors of a tile, row by row."""
    rows = _rows(builder, pointer, length)
    return [builder.gep(row, [_INT(n * LANES)]) for row in rows for n in range(2)]


def _tile(context: Any, builder: Any, signature: Any, args: Any, first: list[Any]) -> list[Any]:
    """Vectors of a tile of a product, added to those given."""
    a_rows = _rows(builder, _start(context, builder, signature, args, 0), args[2])
    b_start = _start(context, builder, signature, args, 3)
    sums = [cgutils.alloca_once_value(builder, value) for value in first]
    with cgutils.for_range(builder, args[9]) as loop:
        b_row = builder.gep(b_start, [builder.mul(loop.index, args[5])])
        b_parts = [_load(builder, builder.gep(b_row, [_INT(n * LANES)])) for n in range(2)]
        for r, a_row in enumerate(a_rows):
            factor = _spread(builder, builder.load(builder.gep(a_row, [loop.index])))
            for n, part in enumerate(b_parts):
                place = sums[2 * r + n]
                product = builder.fmul(factor, part, flags=_FUSED)
                builder.store(builder.fadd(builder.load(place), product, flags=_FUSED), place)
    return [builder.load(place) for place in sums]


def _follow(builder: Any, pointer: Any, further: Any, new: Any) -> None:
    """The last vector, the sum of the last two and of the last three, `further` apart."""
    two = builder.gep(pointer, [further])
    three = builder.gep(two, [further])
    one = _load(builder, pointer)
    _store(builder, builder.fadd(_load(builder, two), new), three)
    _store(builder, builder.fadd(one, new), two)
    _store(builder, new, pointer)


def _sum3(builder: Any, pointer: Any, step: Any) -> Any:
    """Sum of the vectors at a pointer and at one and two steps from it."""
    total = _load(builder, pointer)
    for _ in range(2):
        pointer = builder.gep(pointer, [step])
        total = builder.fadd(total, _load(builder, pointer))
    return total


@contextmanager
def _blocks(builder: Any, number: Any) -> Iterator[Any]:
    """A loop over the first position of each vector of a row."""
    kind = number.type
    with cgutils.for_range_slice(builder, kind(0), number, kind(LANES), kind) as (x, _):
        yield x


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _constant(x: float) -> Any:
    return ir.Constant(_VECTOR, [x] * LANES)


def _spread(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(_UNDEFINED, scalar, _INT(0))
    return builder.shuffle_vector(one, _UNDEFINED, ir.Constant(_INTS, None))


def _spread_ints(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    one = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, None))
