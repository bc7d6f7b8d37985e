"""Conditions over columns as texts of the command line: --where "label == 3 and split != 'val'"."""

from __future__ import annotations

import ast
import operator
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_INSTEAD = {ast.BitAnd: "and", ast.BitOr: "or", ast.Invert: "not"}
_EXPECTED = "expected comparisons of columns, joined by `and`, `or` and `not`"
_VALUES = "a value is a number, a text in quotes, True or False"


class _InvalidNodeError(Exception):
    def __init__(self, node: ast.expr, reason: str) -> None:
        self.node, self.reason = node, reason


def parse_condition(text: str) -> pc.Expression:
    """Return the condition that a text in Python's grammar states. As in SQL, a comparison with a null is null.

    Names are columns; field('NAME') is a column that has no name of Python. There are comparisons with columns and
    values, `in` and `not in` with a list of values, `is None` and `is not None`, and `and`, `or` and `not`.
    Raises ValueError, which names the place in the text.
    """
    stripped = text.strip()
    n_before = len(text) - len(text.lstrip())
    try:
        return _expression(ast.parse(stripped, mode="eval").body)
    except _InvalidNodeError as error:
        node = error.node
        lines = stripped.splitlines(keepends=True)
        start = "".join(lines[: node.lineno - 1]) + lines[node.lineno - 1].encode()[: node.col_offset].decode()
        source = ast.get_source_segment(stripped, node)
        raise ValueError(f"{source!r} at character {n_before + len(start) + 1}: {error.reason}") from None
    except SyntaxError as error:
        place = f"at character {n_before + (error.offset or len(stripped) + 1)} of {text!r}"
        hint = "; a column with another name than Python allows is written field('NAME')"
        raise ValueError(f"{error.msg} {place}: {_EXPECTED}{hint}") from None
    except (RecursionError, MemoryError):
        raise ValueError("the condition is nested too deeply") from None


def _expression(node: ast.expr) -> pc.Expression:
    match node:
        case ast.Name(id=name) | ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=str(name))], keywords=[]):
            return pc.field(name)
        case ast.BoolOp(op=ast.And(), values=values):
            return reduce(operator.and_, map(_expression, values))
        case ast.BoolOp(op=ast.Or(), values=values):
            return reduce(operator.or_, map(_expression, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_expression(operand)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            pairs = zip([left, *rights[:-1]], ops, rights, strict=True)
            return reduce(operator.and_, [_comparison(*pair) for pair in pairs])
        case ast.Constant() | ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node)
            try:
                return pc.scalar(value)
            except (OverflowError, pa.ArrowInvalid):
                raise _InvalidNodeError(node, "the number is outside of int64") from None
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) if type(op) in _INSTEAD:
            raise _InvalidNodeError(node, f"write `{_INSTEAD[type(op)]}`")
    raise _InvalidNodeError(node, _EXPECTED)


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
    if isinstance(op, ast.Is | ast.IsNot):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise _InvalidNodeError(right, "`is` is only for None; compare with ==")
        return _expression(left).is_null() if isinstance(op, ast.Is) else _expression(left).is_valid()
    if not isinstance(op, ast.In | ast.NotIn):
        return _COMPARISONS[type(op)](_expression(left), _expression(right))
    if not isinstance(right, ast.List | ast.Tuple | ast.Set):
        raise _InvalidNodeError(right, "`in` takes a list of values, such as [1, 2] or ('a', 'b')")
    try:
        values = pa.array([_value(one) for one in right.elts])
    except (OverflowError, pa.ArrowInvalid, pa.ArrowTypeError):
        raise _InvalidNodeError(right, "the values must have one type, and integers be those of int64") from None
    tested = _expression(left)
    # Arrow says false for a null, so `not in` would be true.
    found = pc.if_else(tested.is_valid(), tested.isin(values), pa.scalar(None, pa.bool_()))
    return ~found if isinstance(op, ast.NotIn) else found


def _value(node: ast.expr) -> bool | int | float | str:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = ...
    if not isinstance(value, bool | int | float | str):
        hint = "; test for null with `is None`" if value is None else ""
        raise _InvalidNodeError(node, _VALUES + hint)
    return value
