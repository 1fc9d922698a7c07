"""Whether an answer equals the reference: parts are matched here, single values by `symbolic`.

Only the grading worker imports this: it needs sympy, and a hostile answer may take it any time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from llm_gym.envs.grading import symbolic
from llm_gym.envs.grading.closed import is_closed
from llm_gym.envs.grading.latex import clean, split_unit
from llm_gym.envs.grading.numbers import Undone, near
from llm_gym.envs.grading.numbers import parse as parse_number
from llm_gym.envs.grading.structure import Many, Matrix, Node, Relation, Value, parse

Verdict = Literal["equal", "different", "unparsed"]
MAX_ITEMS = 100
"""Most items of a list; more are no answer."""


def compare(gold: str, answer: str, *, ordered: bool = True) -> Verdict:
    """Compares two stated answers.

    Args:
        gold: the reference: LaTeX or plain text, without what stands around it.
        answer: the answer, likewise.
        ordered: a bare list (`1, 2`) must keep its order; sets, unions and "1 and 2" never need to.
    """
    left, right = clean(gold), clean(answer)
    if not left or not right:
        return "unparsed"
    if _spelling(left) == _spelling(right):
        return "equal"
    a, b = _number(left, comma=True), _number(right, comma=True)
    if a is not None and b is not None and not isinstance(b, Undone) and (a == b or "," not in left):
        return "equal" if a == b or near(a, b) else "different"
    try:
        return "equal" if _Comparison(ordered).nodes(parse(left), parse(right)) else "different"
    except (Unread, ValueError):
        return "unparsed"


class Unread(Exception):
    """A single value that cannot be read, or that leaves a calculation to the reader."""


def _spelling(text: str) -> str:
    """The letters and signs alone: for words, and for answers written alike."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)
    return re.sub(r"(?<=[_^])\{(\w)\}|[\s\\]", lambda m: m[1] or "", text)


class _Comparison:
    """Walks two trees together."""

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered

    def nodes(self, gold: Node, got: Node) -> bool:
        """Whether two nodes are equal."""
        gold, got = _named_list(gold), _named_list(got)
        if isinstance(gold, Relation) or isinstance(got, Relation):
            return self.relations(gold, got)
        if isinstance(gold, Many) and isinstance(got, Many):
            return self.many(gold, got)
        if isinstance(got, Many):
            return got.kind in ("list", "set") and all(self.nodes(gold, item) for item in got.items)
        if isinstance(gold, Many):
            return gold.kind == "set" and len(gold.items) == 1 and self.nodes(gold.items[0], got)
        if isinstance(gold, Matrix) or isinstance(got, Matrix):
            return self.matrices(gold, got)
        return self.values(gold, got)

    def many(self, gold: Many, got: Many) -> bool:
        if max(len(gold.items), len(got.items)) > MAX_ITEMS:
            raise Unread
        kinds = {gold.kind, got.kind}
        if kinds == {"tuple"} and gold.brackets != got.brackets and (len(gold.items) == 2 or _half_open(got)):
            return False  # an interval of another kind, or no tuple at all
        if kinds == {"tuple", "list"} and "()" not in (gold.brackets, got.brackets):
            return False
        if kinds in ({"tuple"}, {"tuple", "list"}) or (kinds == {"list"} and self.keeps_order(gold)):
            return len(gold.items) == len(got.items) and all(map(self.nodes, gold.items, got.items))
        if "tuple" in kinds:
            return False
        return self.covers(gold.items, got.items) and self.covers(got.items, gold.items, swapped=True)

    def keeps_order(self, gold: Many) -> bool:
        """Whether the order of a bare list means something: that of points or equations, or in braces, never does."""
        return self.ordered and gold.brackets != "{}" and all(isinstance(item, Value | Matrix) for item in gold.items)

    def covers(self, some: Sequence[Node], others: Sequence[Node], *, swapped: bool = False) -> bool:
        """Whether each of `some` equals one of `others`."""
        return all(any(self.nodes(o, s) if swapped else self.nodes(s, o) for o in others) for s in some)

    def matrices(self, gold: Node, got: Node) -> bool:
        if not (isinstance(gold, Matrix) and isinstance(got, Matrix)):
            return False
        if [len(r) for r in gold.rows] != [len(r) for r in got.rows]:
            return False
        return all(
            self.nodes(a, b) for x, y in zip(gold.rows, got.rows, strict=True) for a, b in zip(x, y, strict=True)
        )

    def values(self, gold: Value, got: Value, *, calculation: bool = False) -> bool:
        """Whether two single values are equal.

        Args:
            gold: the reference.
            got: the answer.
            calculation: it may be a calculation, where a number is wanted.

        Raises:
            Unread: it is none that can be read, or a calculation that is equal.
        """
        if ":" in gold.text + got.text:
            return _spelling(gold.text).lower() == _spelling(got.text).lower()  # a time or a ratio: only as written
        (left, unit), (right, other) = split_unit(gold.text), split_unit(got.text)
        if unit and other and unit != other:
            return False
        if not left or not right:
            raise Unread
        if got.about and _is_whole(left):
            return False
        equal = _spelling(left) == _spelling(right) or self.same(left, right)
        if equal and not calculation and _leaves_work(left, right):
            raise Unread
        return equal

    def same(self, left: str, right: str) -> bool:
        a, b = _number(left), _number(right)
        if a is not None and b is not None:
            return a == b or near(a, b)
        if _based(left) or _based(right):
            return _based(left) == _based(right)  # only as written
        if _word(left) or _word(right):
            return _word(left) is not None and _word(left) == _word(right)
        verdict = symbolic.same(left, right)
        if verdict is None:
            raise Unread
        return verdict or symbolic.rounds_to(left, right) or symbolic.rounds_to(right, left)

    def relations(self, gold: Node, got: Node) -> bool:
        """Whether two relations, or a relation and a value or a set, say the same."""
        if isinstance(gold, Relation) and isinstance(got, Relation):
            names = _name(gold), _name(got)
            if all(names):
                return (names[0] == names[1] and self.nodes(gold.parts[-1], got.parts[-1])) or self.equations(gold, got)
            if any(names) and {*gold.signs, *got.signs} == {"="} and len(got.parts) > 2:
                return names[0] is not None and self.nodes(gold.parts[-1], got.parts[-1])
            return self.equations(gold, got)
        if isinstance(gold, Many) and isinstance(got, Relation) and set(got.signs) != {"="}:
            return False  # the reference fixes the form: a set or an interval
        relation, other = (gold, got) if isinstance(gold, Relation) else (got, gold)
        assert isinstance(relation, Relation)
        if set(relation.signs) == {"="}:
            if relation is gold:
                return _name(gold) is not None and self.nodes(relation.parts[-1], got)
            return self.result(gold, relation)
        return self.same_bounds(_bounds_of(relation), _bounds_of(other, relation))

    def result(self, gold: Node, got: Relation) -> bool:
        """Whether a chain `x = 2 + 3 = 5` ends in the reference, or all of a calculation `2 + 3 = 5` is equal to it."""
        if _name(got) is not None:
            last = got.parts[-1]
            if not (len(got.parts) > 2 and isinstance(gold, Value) and isinstance(last, Value)) or _written(last):
                return self.nodes(gold, last)
            got = Relation(got.parts[1:], got.signs[1:])
        elif not _is_result(got):
            return False
        if not isinstance(gold, Value):
            return all(self.nodes(gold, part) for part in got.parts)
        values = [part for part in got.parts if isinstance(part, Value)]
        if len(values) < len(got.parts) or not all(self.values(gold, part, calculation=True) for part in values):
            return False
        if not any(map(_written, values)):
            raise Unread
        return True

    def equations(self, gold: Relation, got: Relation) -> bool:
        """Whether two equations or inequalities are multiples of each other."""
        equal = self.same_bounds(_bounds_of(gold), _bounds_of(got))
        if equal and any(map(_calculates, got.parts)) and not any(map(_calculates, gold.parts)):
            raise Unread
        return equal

    def same_bounds(self, gold: list[Bound] | None, got: list[Bound] | None) -> bool:
        if gold is None or got is None:
            return False
        one, two = ([_difference(b) for b in bounds] for bounds in (gold, got))
        return len(one) == len(two) and all(any(a[0] == b[0] and _multiple(a[1], b[1], a[0]) for b in two) for a in one)


Bound = tuple[str, str, str]
"""(left, sign, right) of one relation, its sign `=`, `ne`, `<` or `le`."""


def _half_open(many: Many) -> bool:
    """Whether the two brackets are of different kinds."""
    return many.brackets not in ("()", "[]")


def _named_list(node: Node) -> Node:
    """`n = 1, 2, 3` as the set of values that it is."""
    if not (isinstance(node, Many) and node.kind in ("list", "set") and len(node.items) > 1):
        return node
    first, *rest = node.items
    if isinstance(first, Relation) and _name(first) and not any(isinstance(item, Relation) for item in rest):
        return Many("set", (first.parts[-1], *rest))
    return node


_NAME = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|\\angle|\\triangle|\\overline|\\frac|\\mathbf|\\vec|\\[a-z]+|[a-zA-Z]|_\{?\w+\}?|['\s{}|,:()/+*]"
    r"|(?<=[a-zA-Z])\(-?[\w.,\s]*\))+"
)


def _name(relation: Relation) -> str | None:
    """The name that `name = ... = value` gives its value; None if it is another kind of relation."""
    first = relation.parts[0]
    text = first.text if isinstance(first, Value) else "tuple" if isinstance(first, Many) else ""
    if set(relation.signs) != {"="} or not _NAME.fullmatch(text):
        return None
    return re.sub(r"\([a-z]\)$", "", _spelling(text))


def _is_result(relation: Relation) -> bool:
    """Whether `a = b` is a calculation: only numbers stand on the left."""
    first = relation.parts[0]
    return isinstance(first, Value) and re.search(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", first.text) is None


def _leaves_work(gold: str, got: str) -> bool:
    """Whether the reference is one rational number, and the answer a calculation that gives it."""
    undone = _number(gold) is not None and re.search(r"\d ?/ ?\d|\\frac", gold) is not None
    return not is_closed(got, undone=undone) and is_closed(gold, undone=True) and symbolic.is_rational(gold)


def _calculates(part: Node) -> bool:
    """Whether a side of a relation is a calculation that gives a rational number."""
    return isinstance(part, Value) and not _written(part) and symbolic.is_rational(split_unit(part.text)[0])


def _written(part: Node) -> bool:
    """Whether a single value is one number, written out."""
    return isinstance(part, Value) and is_closed(split_unit(part.text)[0])


def _is_whole(text: str) -> bool:
    """Whether it is an integer."""
    value = _number(text)
    return value is not None and value == int(value)


_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\(?!infty|pi)[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?")


def _bounds_of(node: Node, like: Relation | None = None) -> list[Bound] | None:
    """The relations that a chain, or an interval for the variable of `like`, stands for; None if it is neither."""
    if isinstance(node, Relation):
        if not all(isinstance(part, Value) for part in node.parts):
            return None
        texts = [part.text for part in node.parts if isinstance(part, Value)]
        return [_oriented(a, sign, b) for a, sign, b in zip(texts, node.signs, texts[1:], strict=False)]
    if not (isinstance(node, Many) and node.kind == "tuple" and len(node.items) == 2 and like is not None):
        return None
    ends = [item.text for item in node.items if isinstance(item, Value)]
    variables = {part.text for part in like.parts if isinstance(part, Value) and _VARIABLE.fullmatch(part.text)}
    if len(ends) != 2 or len(variables) != 1:
        return None
    (x,) = variables
    low, high = ("<" if bracket in "()" else "\\le" for bracket in node.brackets)
    bounds = [] if "\\infty" in ends[0] else [_oriented(ends[0], low, x)]
    return bounds if "\\infty" in ends[1] else [*bounds, _oriented(x, high, ends[1])]


def _oriented(left: str, sign: str, right: str) -> Bound:
    """The relation with its sign one of `=`, `ne`, `<`, `le`."""
    turned = {">": "<", "\\ge": "le"}
    if sign in turned:
        return right, turned[sign], left
    return left, sign.removeprefix("\\"), right


def _difference(bound: Bound) -> tuple[str, object]:
    """(sign, left minus right) of a relation."""
    left, sign, right = bound
    sides = symbolic.expression(left), symbolic.expression(right)
    if any(side is None for side in sides):
        raise Unread
    return sign, sides[0] - sides[1]  # type: ignore[operator]


def _multiple(a: object, b: object, sign: str) -> bool:
    """Whether two differences say the same: a constant factor apart, a positive one for inequalities."""
    factor = symbolic.ratio(a, b)
    return factor is not None and (sign in ("=", "ne") or bool(factor > 0))


def _number(text: str, *, comma: bool = False) -> int | Fraction | None:
    """The exact value of a plain number, with a decimal comma (`2,74`) too if `comma`."""
    if comma and re.fullmatch(r"[-+]?(?:\d+,\d{1,2}|0,\d+|\d+,\d{4,})", text):
        text = text.replace(",", ".")
    return parse_number(text)


_CHOICE = re.compile(r"\(?([a-zA-Z])\)?(?:[.):]\s.*)?")


_SHORT = ("yes", "no", "odd", "all")


def _word(text: str) -> str | None:
    """The words of a text answer, in lower case; None for mathematics."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    bare = " ".join(bare.replace("(", " ").replace(")", " ").split()).strip(" .,;:!\"'").lower()
    wordy = re.fullmatch(r"[a-z][a-z'-]+(?: [a-z'-]+)*", bare) is not None and (len(bare) > 3 or bare in _SHORT)
    marked = "\\text" in text and not re.search(r"\\(?!text)", text)
    if not bare or not (wordy or marked):
        return None
    return re.sub(r"^(?:the|a|an) (?=\w)", "", bare)


_BASES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_BASE = re.compile(r"(-?[0-9A-Fa-f.]+)(?:_\s*\{?\(?\s*(?:base\s*)?|\s*\(?\s*base\s*)([0-9]+|[a-z]+)\s*\)?\}?\)?")


def _based(text: str) -> tuple[str, str] | None:
    """A numeral and its base, as of 204_5, 204_{\\text{five}} or 204 base 5; None for anything else."""
    match = _BASE.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    if match is None or not re.search(r"\d", match[1]):
        return None
    return match[1].upper(), str(_BASES.index(match[2])) if match[2] in _BASES else match[2]
