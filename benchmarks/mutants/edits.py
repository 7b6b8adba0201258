"""Single edits of a source file, one for every place where a slip of the hand would still run.

An edit replaces one expression: another operator, sign, comparison or constant, the other branch, the other end of an
order, a function left out. Never touched: text, annotations, decorators, and what is raised or warned.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
PAIRS = [
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("sum", "mean"),
    ("any", "all"),
    ("zeros_like", "ones_like"),
    ("log_ndtr", "ndtr"),
    ("gammainc", "gammaincc"),
    ("floor", "ceil"),
]
OTHER_FUNCTION = {name: other for a, b in PAIRS for name, other in ((a, b), (b, a))}
LEFT_OUT = {
    *("exp", "log", "sqrt", "rsqrt", "square", "abs", "log1p", "expm1", "reciprocal", "lgamma", "logit", "sigmoid"),
    *("cumsum", "diff", "clamp", "clone", "flip", "cos", "sin", "nan_to_num"),
}
"""Functions of one argument, as ``torch.f(x)`` or ``x.f()``, that an edit replaces by ``x``."""

Scope = tuple[int, int]


@dataclass(frozen=True)
class Edit:
    """One replacement in the text of a file.

    Attributes:
        line: line of the place, from 1.
        span: first byte and the byte after the last.
        old: the text there, in the parser's spelling.
        new: what replaces it.
        scope: first and last line of the function around it; None at the level of the module or a class.
        in_body: whether it is in the body of that function, not in a default of its arguments.
    """

    line: int
    span: tuple[int, int]
    old: str
    new: str
    scope: Scope | None
    in_body: bool

    def reached_by(self, lines: Iterable[int]) -> bool:
        """Whether a test that enters the functions which start in these lines runs the edited code."""
        return self.scope is None or any(self.scope[0] <= line <= self.scope[1] for line in lines)

    @property
    def text(self) -> str:
        """The edit in one line, for tables."""
        return f"{self.old} -> {self.new}"

    def applied(self, source: str) -> str:
        """The source with this edit; parentheses keep the replacement one expression."""
        data = source.encode()
        start, stop = self.span
        return (data[:start] + f"({self.new})".encode() + data[stop:]).decode()


def edits_of(source: str) -> list[Edit]:
    """All edits of a file, in the order of the text."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: set[Edit] = set()
    for node, scope, in_body in _places(ast.parse(source), None, False):
        place = node.test if isinstance(node, ast.If | ast.While) else node
        last = (place.end_lineno or place.lineno) - 1
        span = (starts[place.lineno - 1] + place.col_offset, starts[last] + (place.end_col_offset or 0))
        for new in _replacements(node):
            found.add(Edit(place.lineno, span, ast.unparse(place), ast.unparse(new), scope, in_body))
    return sorted(found, key=lambda edit: (edit.span, edit.new))


def _places(
    node: ast.AST, scope: Scope | None, in_body: bool
) -> Iterator[tuple[ast.expr | ast.If | ast.While, Scope | None, bool]]:
    """Expressions and conditions that may be edited, with the function around each and whether in its body.

    Yields:
        The node and where it is.
    """
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        scope = (min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno or node.lineno)
    if isinstance(node, ast.expr | ast.If | ast.While):
        yield node, scope, in_body
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_text(child):
                yield from _places(child, scope, in_body or (is_function and name == "body"))


def _is_text(node: ast.AST) -> bool:
    """What only speaks to people or to the type checker."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    if isinstance(node, ast.keyword):
        return node.arg in {"strict", "stacklevel"}  # of `zip`, an assertion; of warnings
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.Call) and _called(node) in {"warn", "TypeVar", "cast"}


def _replacements(node: ast.expr | ast.If | ast.While) -> Iterator[ast.expr]:
    match node:
        case ast.If(test) | ast.While(test) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield ast.UnaryOp(ast.Not(), test)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS and not any(map(_is_label, (left, right))):
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.Compare(left, [op], comparators):
            yield from (ast.Compare(left, [other()], comparators) for other in COMPARISONS[type(op)])
        case ast.Compare(left, [*ops], comparators):
            for i, op in enumerate(ops):
                for other in COMPARISONS[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(1.5 * value if value else 1.0)
        case ast.IfExp(test, body, orelse) if not isinstance(test, ast.Compare):
            yield ast.IfExp(test, orelse, body)
        case ast.Attribute(value, "mT"):
            yield value
        case ast.Call():
            yield from _other_calls(node)


def _other_calls(node: ast.Call) -> Iterator[ast.expr]:
    name = _called(node)
    if name in OTHER_FUNCTION:
        renamed = copy.deepcopy(node)
        if isinstance(renamed.func, ast.Attribute):
            renamed.func.attr = OTHER_FUNCTION[name]
        else:
            renamed.func = ast.Name(OTHER_FUNCTION[name])
        yield renamed
    if name == "where" and len(node.args) == 3:
        yield ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
    if name in LEFT_OUT and isinstance(node.func, ast.Attribute):
        of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in {"torch", "math", "np"}
        yield node.args[0] if of_module else node.func.value


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_label(node: ast.expr) -> bool:
    """Whether an operand is text or a type, whose operators are not arithmetic."""
    if isinstance(node, ast.Name):
        return node.id in {"int", "float", "str", "bool"} or (node.id[:1].isupper() and not node.id.isupper())
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | None))
