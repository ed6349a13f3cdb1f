"""Vectors of sixteen floats for compiled kernels that have to say what stays in registers.

Compilers vectorise one loop at a time, and keep nothing in registers across a store that might
change it. Kernels that hold factors and sums there, as convolutions and matrix products do, are
written in these vectors: `Lanes`, and `Block`, rows of them. LLVM maps both to whatever registers
the processor has.

Vectors are float32. Arrays are one-dimensional and hold float32, or bfloat16 by its bits as uint16.
Nothing is checked: sixteen values must lie from each position on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from math import log
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, llvm_version_info
from numba import config, types
from numba.core.cgutils import get_or_insert_function, voidptr_t
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

LANES = 16
AHEAD = 2**13
"""Bytes that kernels going through memory in order fetch it ahead of its use."""

_FLOAT, _WORD, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_VECTOR, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _WORD, _HALF))
_WIDE = ir.VectorType(ir.DoubleType(), LANES)


def processor_has(feature: str) -> bool:
    """Whether kernels may use what LLVM knows by this name of a processor's features."""
    told = config.CPU_FEATURES  # what numba was told, where it was told
    if told:
        return f"+{feature}" in told.split(",")
    return bool(get_host_cpu_features().get(feature, False))


class _Brain(ir.Type):
    """LLVM's bfloat16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


PAIRS = processor_has("avx512bf16") and llvm_version_info[0] >= 16
"""Whether pairs of bfloat16 are multiplied and added in one step."""
_PAIRS = ir.VectorType(_Brain(), 2 * LANES)


class Lanes(types.Type):
    """Sixteen floats, or doubles."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name)
        self.value = value
        """What LLVM holds them in."""


class Block(types.Type):
    """Rows of as many `Lanes` each."""

    def __init__(self, rows: int, vectors: int) -> None:
        super().__init__(f"Block({rows}, {vectors})")
        self.rows, self.vectors = rows, vectors

    @property
    def value(self) -> Any:
        """What LLVM holds them in."""
        return ir.ArrayType(_VECTOR, self.rows * self.vectors)


@register_model(Lanes)
@register_model(Block)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.value)


_lanes, _doubles = Lanes("Lanes", _VECTOR), Lanes("Doubles", _WIDE)


@intrinsic
def pointer(context, array):
    """Where an array begins; what takes arrays here takes it, too. It and None stay as they are.

    Whoever holds an array is counted, and a call that passes one counts for as long as a short
    product takes. A pointer holds nothing: take it of an argument, which the caller holds.
    """
    kind = array if array == types.none else types.CPointer(array.dtype)
    return kind(array), _emit_pointer


def _emit_pointer(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    if signature.return_type == types.none:
        return values[0]
    return _begin(context, builder, signature.args[0], values[0])


@intrinsic
def zeros(context):
    """Sixteen zeros."""
    return _lanes(), lambda *_: ir.Constant(_VECTOR, None)


@intrinsic
def load(context, array, at):
    """The sixteen values of an array from a position on; doubles of one of float64."""
    kind = _doubles if array.dtype == types.float64 else _lanes
    return kind(array, types.intp), _emit_load


def _emit_load(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    pointer = _pointer(context, builder, signature.args, values)
    if signature.args[0].dtype == types.float64:
        return builder.load(builder.bitcast(pointer, _WIDE.as_pointer()), align=8)
    if signature.args[0].dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    halves = builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
    words = builder.shl(builder.zext(halves, _WORDS), _words(16))  # bfloat16 is the upper half
    return builder.bitcast(words, _VECTOR)


@intrinsic
def store(context, array, at, lanes):
    """Write sixteen values to an array from a position on, rounded to what it holds.

    To one of float64 only doubles.
    """
    kind = _doubles if array.dtype == types.float64 else lanes
    return types.void(array, types.intp, kind), _emit_store


def _emit_store(
    context: Any,
    builder: Any,
    signature: Any,
    values: Any,
    *,
    past_caches: bool = False,
    flushed: bool = False,
) -> Any:
    pointer, lanes = _pointer(context, builder, signature.args, values), values[2]
    kind, given = signature.args[0].dtype, signature.args[2]
    if given == _doubles and kind != types.float64:
        lanes = builder.fptrunc(lanes, _VECTOR)
    if kind == types.float64:
        builder.store(lanes, builder.bitcast(pointer, _WIDE.as_pointer()), align=8)
    elif kind == types.float32:
        written = builder.store(lanes, builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
        if past_caches:
            _past_caches(builder, written)
    else:
        pointer = builder.bitcast(pointer, _HALVES.as_pointer())
        builder.store(_rounded(builder, lanes, flushed), pointer, align=2)
    return context.get_dummy_value()


@intrinsic
def stream(context, array, at, lanes):
    """Write sixteen values as `store` does, floats past caches, without reading what was there.

    For what caches do not hold until it is read again. The vector lies in one line of cache, of 64
    bytes; `drain` comes before others may read it.
    """
    return types.void(array, types.intp, lanes), partial(_emit_store, past_caches=True)


@intrinsic
def drain(context):
    """Let all that this thread wrote reach memory before what it writes next."""
    return types.void(), _emit_drain


def _emit_drain(context: Any, builder: Any, *_: Any) -> Any:
    builder.fence("seq_cst")
    return context.get_dummy_value()


def _rounded(builder: Any, lanes: Any, flushed: bool) -> Any:
    """The bits of the nearest values in bfloat16, the even one of two as near; NaN stays NaN.

    Where those below normal values may be `flushed`, to zero, processors may do it.
    """
    if flushed and PAIRS:
        kind = ir.FunctionType(ir.VectorType(_Brain(), LANES), [_VECTOR])
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * LANES}"
        function = get_or_insert_function(builder.module, kind, name)
        return builder.bitcast(builder.call(function, (lanes,)), _HALVES)
    bits = builder.bitcast(lanes, _WORDS)
    odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    nearest = builder.add(bits, builder.add(odd, _words(0x7FFF)))
    number = builder.fcmp_ordered("ord", lanes, lanes)
    nearest = builder.select(number, nearest, builder.or_(bits, _words(0x400000)))
    return builder.trunc(builder.lshr(nearest, _words(16)), _HALVES)


@intrinsic
def stream_words(context, array, at, lanes, others):
    """Write sixteen values to an array of float32 from a position on, as they are; or, to one of
    uint32, sixteen pairs of them and others, rounded to bfloat16, where what is below normal values
    may become zero. Past caches, as `stream` does.
    """
    return types.void(array, types.intp, lanes, others), _emit_words


def _emit_words(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    words = values[2]
    if signature.args[0].dtype == types.uint32:
        low, high = (builder.zext(_rounded(builder, half, True), _WORDS) for half in values[2:])
        words = builder.or_(low, builder.shl(high, _words(16)))
    pointer = _pointer(context, builder, signature.args, values)
    written = builder.store(words, builder.bitcast(pointer, words.type.as_pointer()))
    _past_caches(builder, written)
    return context.get_dummy_value()


def _past_caches(builder: Any, written: Any) -> None:
    written.align = 4 * LANES
    written.set_metadata("nontemporal", builder.module.add_metadata([_WORD(1)]))


@intrinsic
def prefetch(context, array, at):
    """Have the processor fetch what an array holds at a position, for soon."""
    return types.void(array, types.intp), partial(_emit_prefetch, write=0)


@intrinsic
def claim(context, array, at):
    """Have the processor fetch what an array holds at a position, to be written soon."""
    return types.void(array, types.intp), partial(_emit_prefetch, write=1)


def _emit_prefetch(context: Any, builder: Any, signature: Any, values: Any, *, write: int) -> Any:
    pointer = builder.bitcast(_pointer(context, builder, signature.args, values), voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [voidptr_t] + [_WORD] * 3)
    function = builder.module.declare_intrinsic("llvm.prefetch", [voidptr_t], kind)
    how = (ir.Constant(_WORD, value) for value in (write, 3, 1))  # kept in all caches, data
    builder.call(function, (pointer, *how))
    return context.get_dummy_value()


@intrinsic
def widen(context, lanes):
    """The same in float64."""
    return _doubles(lanes), _emit_widen


def _emit_widen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return values[0] if signature.args[0] == _doubles else builder.fpext(*values, _WIDE)


@intrinsic
def repeat(context, value):
    """Sixteen times the same value; in float64 if it is."""
    return (_doubles if value == types.float64 else _lanes)(value), _emit_repeat


def _emit_repeat(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return _everywhere(builder, values[0], signature.return_type.value)


@intrinsic
def multiply(context, a, b):
    """`a * b`."""
    return a(a, b), lambda context, builder, _, values: builder.fmul(*values)


@intrinsic
def add(context, a, b):
    """`a + b`."""
    return a(a, b), lambda context, builder, _, values: builder.fadd(*values)


@intrinsic
def subtract(context, a, b):
    """`a - b`."""
    return a(a, b), lambda context, builder, _, values: builder.fsub(*values)


@intrinsic
def fma(context, a, b, c):
    """`a * b + c`, in one step where the processor has it."""
    return _lanes(a, b, c), lambda context, builder, _, values: _fma(builder, *values)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, (a, b, c))


@intrinsic
def maximum(context, a, b):
    """The larger of each two values; NaN where either is."""
    return _lanes(a, b), lambda context, builder, _, values: _maximum(builder, *values)


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    # Either order gives the second value where one is NaN. The bits of both orders together are
    # NaN then, and else the same: two of the fastest instructions, and no masks.
    orders = (
        builder.bitcast(builder.select(builder.fcmp_ordered(">", p, q), p, q), _WORDS)
        for p, q in ((a, b), (b, a))
    )
    return builder.bitcast(builder.or_(*orders), _VECTOR)


@intrinsic
def relu(context, lanes):
    """Those above zero, and zero for the others; NaN stays NaN."""
    return _lanes(lanes), _emit_relu


def _emit_relu(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    below = builder.fcmp_ordered("<", values[0], _floats(0))
    return builder.select(below, _floats(0), values[0])


@intrinsic
def sigmoid(context, lanes):
    """`1 / (1 + exp(-x))`, within two roundings; NaN stays NaN."""
    return _lanes(lanes), _emit_sigmoid


def _emit_sigmoid(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x = builder.fneg(values[0])
    for sign, limit in (("<", -87), (">", 87)):  # where exp or its inverse would not be normal
        x = builder.select(builder.fcmp_ordered(sign, x, _floats(limit)), _floats(limit), x)
    # exp(x) is 2ⁿ exp(r) with n whole: adding 3 · 2²² rounds to it, and leaves it in the low bits
    shifted = _fma(builder, x, _floats(1 / log(2)), _floats(3 * 2**22))
    n = builder.fsub(shifted, _floats(3 * 2**22))
    r = _fma(builder, n, _floats(_LOG_2 - log(2)), _fma(builder, n, _floats(-_LOG_2), x))
    exp = _polynomial(builder, r, _EXP)
    exponent = builder.shl(builder.bitcast(shifted, _WORDS), _words(23))
    factor = builder.bitcast(builder.add(exponent, _words(0x3F800000)), _VECTOR)
    return _quotient(builder, _floats(1), _fma(builder, exp, factor, _floats(1)))


def _quotient(builder: Any, a: Any, b: Any) -> Any:
    """`a / b`, `b` normal and above zero, within little more than a rounding; NaN stays NaN.

    Faster than divisions, which processors do a few at a time.
    """
    y, steps = _rough_inverse(builder, b)
    b = builder.fneg(b)
    for _ in range(steps):
        y = _fma(builder, y, _fma(builder, b, y, _floats(1)), y)
    quotient = builder.fmul(a, y)
    return _fma(builder, _fma(builder, b, quotient, a), y, quotient)


def _rough_inverse(builder: Any, b: Any) -> tuple[Any, int]:
    """An inverse, and how many of Newton's steps, each of which squares its error, bring it to 1e-4
    or less.
    """
    if _INVERTS:  # within 2⁻¹⁴
        name, mask = f"llvm.x86.avx512.rcp14.ps.{32 * LANES}", ir.IntType(16)
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, mask])
        function = get_or_insert_function(builder.module, kind, name)
        return builder.call(function, (b, ir.Constant(_VECTOR, None), mask(-1))), 0
    # the bits grow as the logarithm, piece by piece: to take them from a constant is an inverse
    # within 0.0506
    return builder.bitcast(builder.sub(_words(0x7EF311C7), builder.bitcast(b, _WORDS)), _VECTOR), 2


_INVERTS = processor_has("avx512f")
"""Whether the processor gives inverses of vectors, roughly."""
_LOG_2 = 45426 / 65536
"""The logarithm of 2 in 16 bits, so that its small multiples are exact; the rest comes apart."""
_EXP = (1.0, 1.0, 0.5, 1.66664155e-1, 4.16663529e-2, 8.37512640e-3, 1.39411085e-3)
"""A polynomial within 2e-8 of exp(x), relatively, for |x| up to log(2) / 2."""


@intrinsic
def gelu(context, lanes):
    """`x * (1 + erf(x / √2)) / 2`, within 3e-7 of `max(|x|, 1)`; NaN stays NaN."""
    return _lanes(lanes), _emit_gelu


def _emit_gelu(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x = values[0]
    square = builder.fmul(x, x)
    p, q = (_polynomial(builder, square, coefficients) for coefficients in (_GELU_P, _GELU_Q))
    share = builder.fadd(_floats(0.5), _quotient(builder, builder.fmul(x, p), q))
    for sign, end, limit in (("<=", -_GELU_REACH, 0), (">=", _GELU_REACH, 1)):
        share = builder.select(builder.fcmp_ordered(sign, x, _floats(end)), _floats(limit), share)
    return builder.fmul(x, share)


def _polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """The constant first."""
    *others, value = map(_floats, coefficients)
    for coefficient in reversed(others):
        value = _fma(builder, value, x, coefficient)
    return value


# x * P(x²) / Q(x²) is less than 5e-9 from half of erf(x / √2) up to this |x|; beyond, gelu(x) is
# within 4e-7 of x or 0. Fitted to erf.
_GELU_REACH = 5.3
_GELU_P = (3.98942254e-1, 3.29358906e-2, 4.62800035e-3, 1.60335636e-4, 6.37907022e-6, 2.40502103e-8)
_GELU_Q = (1.0, 2.49224264e-1, 2.81388860e-2, 1.83657798e-3, 7.13526937e-5, 1.23716638e-6)


def blocks(rows: int, vectors: int) -> Any:
    """A function for kernels that gives a block of zeros."""
    block = Block(rows, vectors)

    @intrinsic
    def zero_block(context):
        return block(), lambda *_: ir.Constant(block.value, None)

    return zero_block


square = blocks(LANES, 1)


@intrinsic
def load_square(context, array, at, stride):
    """Sixteen rows of an array, the n-th from `at + n * stride` on."""
    return Block(LANES, 1)(array, types.intp, types.intp), _emit_square


def _emit_square(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    array, at, stride = values
    rows = []
    for _ in range(LANES):
        rows.append(_emit_load(context, builder, signature, (array, at)))
        at = builder.add(at, stride)
    return _block(builder, rows)


@intrinsic
def transposed(context, square):
    """Rows of a square as columns."""
    return square(square), _emit_transposed


def _emit_transposed(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    rows = _rows(builder, *signature.args, *values)
    for far in (8, 4, 2, 1):  # off-diagonal blocks of this side change places
        for n in range(LANES):
            if not n & far:
                low, high = rows[n], rows[n + far]
                pick = [[i, i + LANES - far][i & far > 0] for i in range(LANES)]
                other = [[i + far, i + LANES][i & far > 0] for i in range(LANES)]
                rows[n], rows[n + far] = (
                    builder.shuffle_vector(low, high, ir.Constant(_WORDS, which))
                    for which in (pick, other)
                )
    return _block(builder, rows)


@intrinsic
def add_outer(context, block, array, at, stride, other, to):
    """To the n-th row of a block add what `other` holds from `to` on, as wide as the block, times
    the value that `array` holds at `at + n * stride`.

    Both arrays hold float32; or, where `PAIRS`, pairs of bfloat16 as uint32, of which both products
    are added.
    """
    return block(block, array, types.intp, types.intp, other, types.intp), _emit_outer


def _emit_outer(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    kind, *arguments = signature.args
    block, array, at, stride, other, to = values
    row = [
        builder.load(_vector(context, builder, arguments[3:], (other, to), v), align=4)
        for v in range(kind.vectors)
    ]
    step = _fma if arguments[0].dtype == types.float32 else _add_pairs
    for n in range(kind.rows):
        value = builder.load(_pointer(context, builder, arguments, (array, at)))
        same = _everywhere(builder, builder.bitcast(value, _FLOAT))
        at = builder.add(at, stride)
        for i, vector in enumerate(row, n * kind.vectors):
            total = step(builder, same, vector, builder.extract_value(block, i))
            # lest LLVM unroll the loop around this, which spills the sums to the stack
            total.attributes.add("convergent")
            block = builder.insert_value(block, total, i)
    return block


def _add_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`c` plus the products of both halves of each word of `a` and `b`."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR, _PAIRS, _PAIRS])
    function = get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, (c, builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)))


@intrinsic
def leaky(context, block, lanes, slope):
    """Each row, of one vector, plus `lanes`, then those values below zero times a slope."""
    return block(block, lanes, types.float32), _emit_leaky


def _emit_leaky(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    block, lanes, slope = values
    rows, slope = [], _everywhere(builder, slope)
    for row in _rows(builder, signature.args[0], block):
        total = builder.fadd(row, lanes)
        below = builder.fcmp_ordered("<", total, _floats(0))
        rows.append(builder.select(below, builder.fmul(total, slope), total))
    return _block(builder, rows)


@intrinsic
def add_rows(context, block, array, at, stride):
    """Each row, of one vector, plus that of an array, the n-th from `at + n * stride` on."""
    return block(block, array, types.intp, types.intp), _emit_rows


def _emit_rows(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    block, array, at, stride = values
    read, rows = _lanes(*signature.args[1:3]), []
    for row in _rows(builder, signature.args[0], block):
        rows.append(builder.fadd(row, _emit_load(context, builder, read, (array, at))))
        at = builder.add(at, stride)
    return _block(builder, rows)


@intrinsic
def at_least(context, block, least):
    """The values of a block, none of them less than that; NaN stays NaN."""
    return block(block, types.float32), _emit_at_least


def _emit_at_least(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    block, least = values[0], _everywhere(builder, values[1])
    rows = []
    for row in _rows(builder, signature.args[0], block):
        below = builder.fcmp_ordered("<", row, least)
        rows.append(builder.select(below, least, row))
    return _block(builder, rows)


@intrinsic
def store_block(context, array, at, stride, block):
    """Write a block's rows to an array, the n-th from `at + n * stride` on.

    Of bfloat16, what is below normal values may become zero.
    """
    return types.void(array, types.intp, types.intp, block), _emit_block


@intrinsic
def add_block(context, array, at, stride, block):
    """Add a block's rows to what an array holds, likewise."""
    return types.void(array, types.intp, types.intp, block), partial(_emit_block, adds=True)


def _emit_block(
    context: Any, builder: Any, signature: Any, values: Any, *, adds: bool = False
) -> Any:
    array, at, stride, block = values
    place, kind = signature.args[:2], signature.args[3]
    rows = iter(_rows(builder, kind, block))
    for _ in range(kind.rows):
        for v in range(kind.vectors):
            to = builder.add(at, ir.Constant(at.type, v * LANES))
            vector = next(rows)
            if adds:
                held = _emit_load(context, builder, _lanes(*place), (array, to))
                vector = builder.fadd(held, vector)
            written = types.void(*place, _lanes)
            _emit_store(context, builder, written, (array, to, vector), flushed=True)
        at = builder.add(at, stride)
    return context.get_dummy_value()


def _rows(builder: Any, kind: Block, block: Any) -> list[Any]:
    """The vectors of a block, row by row."""
    return [builder.extract_value(block, i) for i in range(kind.rows * kind.vectors)]


def _block(builder: Any, vectors: Sequence[Any]) -> Any:
    """A block of vectors."""
    block = ir.Constant(ir.ArrayType(_VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        block = builder.insert_value(block, vector, i)
    return block


def combining(matrix: Sequence[Sequence[float]]) -> Any:
    """A function for kernels that multiplies vectors by a matrix that is known beforehand.

    `combine(array, at, stride)` takes one vector a column of the matrix, the n-th from
    `at + n * stride` on, of float32 or bfloat16, and gives a block of one a row. Rows, and columns,
    that differ by nothing but signs share their products.
    """
    after, factors = _shared(np.asarray(matrix))
    before, factors = (factor.T for factor in _shared(factors.T))
    block = Block(len(after), 1)

    @intrinsic
    def combine(context, array, at, stride):
        return block(array, types.intp, types.intp), emit

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, at, stride = values
        vectors = []
        for _ in before.T:
            vectors.append(_emit_load(context, builder, signature, (array, at)))
            at = builder.add(at, stride)
        for factor in (before, factors, after):
            vectors = [_sum(builder, row, vectors) for row in factor]
        return _block(builder, vectors)

    return combine


def _shared(matrix: Any) -> tuple[Any, Any]:
    """Factors of a matrix: of two rows alike but for signs, the second has half of their sum and
    half of their difference, in which there is less to multiply, and the first adds these up.
    """
    first, second = np.eye(len(matrix)), matrix.copy()
    for k, i in combinations(range(len(matrix)), 2):
        if (abs(matrix[k]) == abs(matrix[i])).all():
            first[k, i], first[i, k], first[i, i] = 1, 1, -1
            second[[k, i]] = (matrix[k] + matrix[i]) / 2, (matrix[k] - matrix[i]) / 2
    return first, second


def _sum(builder: Any, factors: Any, vectors: Any) -> Any:
    """Vectors times factors, of which those that are 1 come first: they take no products."""
    total = None
    terms = [pair for pair in zip(factors, vectors, strict=True) if pair[0]]
    for factor, vector in sorted(terms, key=lambda pair: pair[0] != 1):
        if total is None:
            total = vector if factor == 1 else builder.fmul(_floats(factor), vector)
        elif abs(factor) == 1:
            total = (builder.fadd if factor == 1 else builder.fsub)(total, vector)
        else:
            total = _fma(builder, _floats(factor), vector, total)
    return total


def _everywhere(builder: Any, value: Any, kind: Any = _VECTOR) -> Any:
    """A vector of the same value."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(_WORDS, None))


def _words(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _floats(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _vector(context: Any, builder: Any, arguments: Any, values: Any, n: int) -> Any:
    """That to the n-th vector of floats from the position on."""
    array, at = values
    values = array, builder.add(at, ir.Constant(at.type, n * LANES))
    pointer = _pointer(context, builder, arguments, values)
    return builder.bitcast(pointer, _VECTOR.as_pointer())


def _pointer(context: Any, builder: Any, arguments: Any, values: Any) -> Any:
    """That to the position, the second argument, of an array, the first."""
    return builder.gep(_begin(context, builder, arguments[0], values[0]), [values[1]])


def _begin(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.CPointer):
        return value
    return make_array(kind)(context, builder, value).data
