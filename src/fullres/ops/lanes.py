"""Vectors of sixteen floats for compiled kernels that have to say what stays in registers.

Compilers vectorise one loop at a time, and keep nothing in registers across a store that might
change it. Kernels that hold factors and sums there, as convolutions and matrix products do, are
written in these vectors: `Lanes`, and `Square`, sixteen of them. LLVM maps both to whatever
registers the processor has.

Vectors are float32. Arrays are one-dimensional and hold float32, or bfloat16 by its bits as uint16.
Nothing is checked: sixteen values must lie from each position on.
"""

from __future__ import annotations

from math import factorial, log
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function, voidptr_t
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

LANES = 16
AHEAD = 2**13
"""Bytes that kernels going through memory in order fetch it ahead of its use."""

_FLOAT, _WORD, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_VECTOR, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _WORD, _HALF))


def _of(value: Any) -> Any:
    """How numba holds what is one value of LLVM's."""

    class Model(models.PrimitiveModel):
        def __init__(self, manager, lanes):
            super().__init__(manager, lanes, value)

    return Model


class Lanes(types.Type):
    """Sixteen floats."""

    def __init__(self) -> None:
        super().__init__("Lanes")


class Square(types.Type):
    """Sixteen `Lanes`."""

    def __init__(self) -> None:
        super().__init__("Square")


_SQUARE = ir.ArrayType(_VECTOR, LANES)
_lanes, _square = Lanes(), Square()
for _type, _model in ((Lanes, _VECTOR), (Square, _SQUARE)):
    register_model(_type)(_of(_model))


@intrinsic
def zeros(context):
    """Sixteen zeros."""
    return _lanes(), lambda *_: ir.Constant(_VECTOR, None)


@intrinsic
def load(context, array, at):
    """The sixteen values of an array from a position on."""
    return _lanes(array, types.intp), _emit_load


def _emit_load(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    pointer = _pointer(context, builder, signature.args, values)
    if signature.args[0].dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    halves = builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
    words = builder.shl(builder.zext(halves, _WORDS), _words(16))  # bfloat16 is the upper half
    return builder.bitcast(words, _VECTOR)


@intrinsic
def store(context, array, at, lanes):
    """Write sixteen values to an array from a position on, rounded to what it holds."""
    return types.void(array, types.intp, _lanes), _emit_store


def _emit_store(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    pointer, lanes = _pointer(context, builder, signature.args, values), values[2]
    if signature.args[0].dtype == types.float32:
        builder.store(lanes, builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    else:
        pointer = builder.bitcast(pointer, _HALVES.as_pointer())
        builder.store(_rounded(builder, lanes), pointer, align=2)
    return context.get_dummy_value()


def _rounded(builder: Any, lanes: Any) -> Any:
    """The bits of the nearest values in bfloat16, the even one of two as near; NaN stays NaN."""
    bits = builder.bitcast(lanes, _WORDS)
    odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    nearest = builder.add(bits, builder.add(odd, _words(0x7FFF)))
    number = builder.fcmp_ordered("ord", lanes, lanes)
    nearest = builder.select(number, nearest, builder.or_(bits, _words(0x400000)))
    return builder.trunc(builder.lshr(nearest, _words(16)), _HALVES)


@intrinsic
def prefetch(context, array, at):
    """Have the processor fetch what an array holds at a position, for soon."""
    return types.void(array, types.intp), _emit_prefetch


def _emit_prefetch(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    pointer = builder.bitcast(_pointer(context, builder, signature.args, values), voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [voidptr_t] + [_WORD] * 3)
    function = builder.module.declare_intrinsic("llvm.prefetch", [voidptr_t], kind)
    read, often, data = (ir.Constant(_WORD, value) for value in (0, 3, 1))
    builder.call(function, (pointer, read, often, data))
    return context.get_dummy_value()


@intrinsic
def multiply(context, a, b):
    """`a * b`."""
    return _lanes(a, b), lambda context, builder, _, values: builder.fmul(*values)


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
    for sign, limit in (("<", -87), (">", 88)):  # where exp would leave the range of normal floats
        x = builder.select(builder.fcmp_ordered(sign, x, _floats(limit)), _floats(limit), x)
    # exp(x) is 2ⁿ exp(r) with n whole: adding 3 · 2²² rounds to it, and leaves it in the low bits
    shifted = _fma(builder, x, _floats(1 / log(2)), _floats(3 * 2**22))
    n = builder.fsub(shifted, _floats(3 * 2**22))
    r = _fma(builder, n, _floats(_LOG_2 - log(2)), _fma(builder, n, _floats(-_LOG_2), x))
    exp = _floats(1 / factorial(7))
    for power in range(6, -1, -1):
        exp = _fma(builder, exp, r, _floats(1 / factorial(power)))
    exponent = builder.shl(builder.bitcast(shifted, _WORDS), _words(23))
    factor = builder.bitcast(builder.add(exponent, _words(0x3F800000)), _VECTOR)
    return builder.fdiv(_floats(1), _fma(builder, exp, factor, _floats(1)))


_LOG_2 = 45426 / 65536
"""The logarithm of 2 in 16 bits, so that its small multiples are exact; the rest comes apart."""


@intrinsic
def zero_square(context):
    """Sixteen times sixteen zeros."""
    return _square(), lambda *_: ir.Constant(_SQUARE, None)


@intrinsic
def add_outer(context, square, array, at, stride, lanes):
    """To the n-th vector of a square add `lanes` times what an array holds at `at + n * stride`.

    The array holds float32.
    """
    return _square(square, array, types.intp, types.intp, lanes), _emit_outer


def _emit_outer(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    square, array, at, stride, lanes = values
    for n in range(LANES):
        value = builder.load(_pointer(context, builder, signature.args[1:], (array, at)))
        at = builder.add(at, stride)
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
        same = builder.shuffle_vector(first, first, ir.Constant(_WORDS, None))
        total = _fma(builder, same, lanes, builder.extract_value(square, n))
        square = builder.insert_value(square, total, n)
    return square


@intrinsic
def add_square(context, array, at, stride, square):
    """Add a square's vectors to an array of float32, the n-th at `at + n * stride`."""
    return types.void(array, types.intp, types.intp, square), _emit_square


def _emit_square(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    array, at, stride, square = values
    for n in range(LANES):
        pointer = _pointer(context, builder, signature.args, (array, at))
        pointer = builder.bitcast(pointer, _VECTOR.as_pointer())
        total = builder.fadd(builder.load(pointer, align=4), builder.extract_value(square, n))
        builder.store(total, pointer, align=4)
        at = builder.add(at, stride)
    return context.get_dummy_value()


def _words(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _floats(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _pointer(context: Any, builder: Any, arguments: Any, values: Any) -> Any:
    """That to the position, the second argument, of an array, the first."""
    array = make_array(arguments[0])(context, builder, values[0])
    return builder.gep(array.data, [values[1]])
