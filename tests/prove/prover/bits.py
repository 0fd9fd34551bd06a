"""Machine words: Python integers where a value is known, solver terms where it is not.

Each function takes words of `width` bits and folds what is known; the solver sees the rest.
"""

from __future__ import annotations

import z3

Word = int | z3.BitVecRef
Truth = bool | z3.BoolRef


def term(value: Word, width: int) -> z3.BitVecRef:
    """The word as a solver term."""
    return z3.BitVecVal(value, width) if isinstance(value, int) else value


def mask(width: int) -> int:
    return (1 << width) - 1


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def same(a: object, b: object) -> bool:
    """Whether two words or truths are the same by construction."""
    if isinstance(a, z3.ExprRef) and isinstance(b, z3.ExprRef):
        return a.eq(b)
    return type(a) is type(b) and a == b


def simplified(value: Word) -> Word:
    """The word as the solver would write it; a number where it is one."""
    if isinstance(value, int):
        return value
    value = z3.simplify(value)
    return value.as_long() if z3.is_bv_value(value) else value


def low(value: Word, width: int) -> Word:
    """The lowest `width` bits of a word that has as many or more."""
    if isinstance(value, int):
        return value & mask(width)
    if value.size() == width:
        return value
    if value.decl().kind() == z3.Z3_OP_ZERO_EXT:
        inner = value.arg(0)
        if inner.size() == width:
            return inner
        if inner.size() < width:
            return z3.ZeroExt(width - inner.size(), inner)
        return low(inner, width)
    if value.decl().kind() == z3.Z3_OP_CONCAT:
        last = value.arg(value.num_args() - 1)
        if last.size() == width:
            return last
    return z3.Extract(width - 1, 0, value)


def widen(value: Word, width: int) -> Word:
    """The word with zeroes above it."""
    if isinstance(value, int) or value.size() == width:
        return value
    return z3.ZeroExt(width - value.size(), value)


def sign_extend(value: Word, width: int, to: int) -> Word:
    """The lowest `width` bits with their sign carried up to `to` bits."""
    part = low(value, width)
    if isinstance(part, int):
        return signed(part, width) & mask(to)
    return z3.SignExt(to - width, part)


def byte(value: Word, index: int) -> Word:
    """Byte `index` of a word, counted from the least significant."""
    if isinstance(value, int):
        return value >> (8 * index) & 0xFF
    if value.size() == 8:
        return value
    if index == 0:
        return low(value, 8)
    if value.decl().kind() == z3.Z3_OP_CONCAT and all(a.size() == 8 for a in value.children()):
        return value.arg(value.num_args() - 1 - index)
    if value.decl().kind() == z3.Z3_OP_ZERO_EXT and value.arg(0).size() <= 8 * index:
        return 0
    return z3.Extract(8 * index + 7, 8 * index, value)


def join(parts: list[Word]) -> Word:
    """The word whose bytes these are, least significant first."""
    if all(isinstance(part, int) for part in parts):
        return sum(part << (8 * index) for index, part in enumerate(parts))  # type: ignore[misc]
    if len(parts) == 1:
        return parts[0]
    return z3.Concat(*[term(part, 8) for part in reversed(parts)])


def swap(value: Word, width: int) -> Word:
    """The lowest `width` bits with their bytes in the other order."""
    part = low(value, width)
    return join([byte(part, index) for index in reversed(range(width // 8))])


# What the solver need not compute: any function will do for the proof, so it is told only that
# equal arguments give equal results. The allowlist's hash is of this kind.
_OPAQUE = {
    (name, width): z3.Function(f"{name}{width}", *[z3.BitVecSort(width)] * 3)
    for name in ("mul", "div", "mod")
    for width in (32, 64)
}


def _is_bit(value: Word) -> bool:
    """Whether the word is 0 or 1 by construction."""
    if isinstance(value, int):
        return value < 2
    if value.decl().kind() == z3.Z3_OP_ZERO_EXT:
        return _is_bit(value.arg(0))
    one = value.decl().kind() == z3.Z3_OP_BAND
    return one and any(z3.is_bv_value(a) and a.as_long() == 1 for a in value.children())


def _multiply(a: Word, b: Word, width: int) -> Word:
    for known, other in ((a, b), (b, a)):
        if isinstance(known, int) and (known.bit_count() <= 2 or _is_bit(other)):
            return term(known, width) * term(other, width)
    return _OPAQUE["mul", width](term(a, width), term(b, width))


def _divide(name: str, a: Word, b: Word, width: int) -> Word:
    if isinstance(b, int) and b.bit_count() == 1:
        shift = b.bit_length() - 1
        return (
            arithmetic("rsh", a, shift, width)
            if name == "div"
            else (arithmetic("and", a, b - 1, width))
        )
    return _OPAQUE[name, width](term(a, width), term(b, width))


def _fold(op: str, a: int, b: int, width: int) -> int:
    shift = b & (width - 1)
    # Division by zero gives 0 and the remainder of it the dividend (the BPF instruction set).
    result = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "div": lambda: a // b if b else 0,
        "mod": lambda: a % b if b else a,
        "or": lambda: a | b,
        "and": lambda: a & b,
        "xor": lambda: a ^ b,
        "lsh": lambda: a << shift,
        "rsh": lambda: a >> shift,
        "arsh": lambda: signed(a, width) >> shift,
    }[op]()
    return result & mask(width)


def arithmetic(op: str, a: Word, b: Word, width: int) -> Word:
    """One arithmetic operation of the BPF instruction set."""
    if isinstance(a, int) and isinstance(b, int):
        return _fold(op, a, b, width)
    if isinstance(a, int) and op in ("add", "or", "xor", "and"):
        a, b = b, a
    if isinstance(b, int):
        if b == 0 and op in ("add", "sub", "or", "xor", "lsh", "rsh", "arsh"):
            return a
        if b == 0 and op in ("and", "mul"):
            return 0
        if b == mask(width) and op == "and":
            return a
        if b == 1 and op in ("mul", "div"):
            return a
    if op == "mul":
        return _multiply(a, b, width)
    if op in ("div", "mod"):
        return _divide(op, a, b, width)
    if op in ("lsh", "rsh", "arsh"):
        b = arithmetic("and", b, width - 1, width)
    x, y = term(a, width), term(b, width)
    match op:
        case "add":
            return x + y
        case "sub":
            return x - y
        case "or":
            return x | y
        case "and":
            return x & y
        case "xor":
            return x ^ y
        case "lsh":
            return x << y
        case "rsh":
            return z3.LShR(x, y)
        case "arsh":
            return x >> y
    raise AssertionError(op)


def compare(op: str, a: Word, b: Word, width: int) -> Truth:
    """One comparison of the BPF instruction set."""
    if isinstance(a, int) and isinstance(b, int):
        sa, sb = signed(a, width), signed(b, width)
        return {
            "eq": a == b,
            "ne": a != b,
            "gt": a > b,
            "ge": a >= b,
            "lt": a < b,
            "le": a <= b,
            "set": a & b != 0,
            "sgt": sa > sb,
            "sge": sa >= sb,
            "slt": sa < sb,
            "sle": sa <= sb,
        }[op]
    x, y = term(a, width), term(b, width)
    match op:
        case "eq":
            return x == y
        case "ne":
            return z3.Not(x == y)
        case "gt":
            return z3.UGT(x, y)
        case "ge":
            return z3.UGE(x, y)
        case "lt":
            return z3.ULT(x, y)
        case "le":
            return z3.ULE(x, y)
        case "set":
            return z3.Not(x & y == 0)
        case "sgt":
            return x > y
        case "sge":
            return x >= y
        case "slt":
            return x < y
        case "sle":
            return x <= y
    raise AssertionError(op)


def negate(truth: Truth) -> Truth:
    if isinstance(truth, bool):
        return not truth
    return truth.arg(0) if z3.is_not(truth) else z3.Not(truth)


def every(truths: list[Truth] | tuple[Truth, ...]) -> Truth:
    """Whether all hold."""
    if any(truth is False for truth in truths):
        return False
    open_ones = [truth for truth in truths if truth is not True]
    if not open_ones:
        return True
    return open_ones[0] if len(open_ones) == 1 else z3.And(*open_ones)


def some(truths: list[Truth] | tuple[Truth, ...]) -> Truth:
    """Whether one holds."""
    return negate(every([negate(truth) for truth in truths])) if len(truths) < 2 else _some(truths)


def _some(truths: list[Truth] | tuple[Truth, ...]) -> Truth:
    if any(truth is True for truth in truths):
        return True
    open_ones = [truth for truth in truths if truth is not False]
    if not open_ones:
        return False
    return open_ones[0] if len(open_ones) == 1 else z3.Or(*open_ones)


def choose(condition: z3.BoolRef, a: Word, b: Word, width: int) -> Word:
    """`a` where the condition holds, else `b`."""
    if same(a, b):
        return a
    return z3.If(condition, term(a, width), term(b, width))


def either(condition: z3.BoolRef, a: Truth, b: Truth) -> Truth:
    """`a` where the condition holds, else `b`."""
    if same(a, b):
        return a
    if isinstance(a, bool) and isinstance(b, bool):
        return condition if a else negate(condition)
    return z3.If(condition, a, b)
