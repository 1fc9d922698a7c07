r"""Whether an answer is one number, written out: a literal, or one closed form of literals (`\sqrt{144}`, `2^{10}`).

A sum, difference, product or quotient of numbers is a calculation left to the reader, whatever surrounds it. So the
forms that are none are listed here, and everything else is one: a text is reduced from the inside, with `N` for each
number in it (and `P` for pi), until `N` alone is left.
"""

from __future__ import annotations

import re
from math import gcd

_FRACTION = re.compile(r"\\frac ?\{ ?-? ?(\d+) ?\} ?\{ ?-? ?(\d+) ?\}|(?<![\w.)}\]^])(\d+) ?/ ?(\d+)(?![\w.(])")
_LITERALS = [
    (re.compile(pattern), form)
    for pattern, form in (
        (r"\d+(?:\.\d+)? ?\\cdot ?10 ?\^ ?(?:\{ ?-? ?\d+ ?\}|\d+)", "N"),  # 3 x 10^8
        (r"\( ?\d+ ?\+ ?N ?\)", "N"),  # the mixed number 2 1/2, as `latex.clean` writes it
        (r"(?<![\d.])(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)", "N"),
        (r"\\pi(?![a-zA-Z])", "P"),
        (r"\\frac ?\{ ?-? ?(?:N ?)?P ?\} ?\{ ?N ?\}|(?:N ?)?P(?: ?/ ?N)?", "N"),  # an angle
        (r"(?<![a-zA-Z\\])e(?![a-zA-Z])|\\infty(?![a-zA-Z])", "N"),
    )
]
_CLOSED = re.compile(
    r"\{ ?[-+]? ?N ?\}|\( ?[-+]? ?N ?\)|\| ?-? ?N ?\||\\lfloor ?-? ?N ?\\rfloor|\\lceil ?-? ?N ?\\rceil"
    r"|N ?\^ ?-? ?N|N ?!|N ?°"
    r"|\\(?:ln|log|lg|exp|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh) ?(?:[_^] ?N ?)?-?N"
    r"|\\sqrt ?(?:\[ ?N ?\] ?)?-?N|\\binom ?N ?N"
)


def is_closed(text: str, *, undone: bool = False) -> bool:
    r"""Whether a single value in the plain form (`latex.clean`) is one number, written out.

    Args:
        text: the value, without its unit.
        undone: a fraction with a slash need not be in lowest terms (one with a bar never does).

    >>> all(is_closed(t) for t in (r"\sqrt{144}", r"2^{10}", r"3\cdot 10^{8}", r"\frac{3}{4}", "-7.5", r"\log_{2} 8"))
    True
    >>> any(is_closed(t) for t in (r"3\cdot 5", r"\frac{3\cdot 5}{1}", "21/3", "(3)(5)", r"\sqrt{3\cdot 75}", "14+1"))
    False
    """
    if re.search(r"[A-Z]", text):
        return False

    def fraction(match: re.Match[str]) -> str:
        over, under = int(match[1] or match[3]), int(match[2] or match[4])
        return "N" if undone or match[1] or (under > 1 and gcd(over, under) == 1) else match[0].replace("/", "//")

    text = _FRACTION.sub(fraction, text)
    for pattern, form in _LITERALS:
        text = pattern.sub(form, text)
    before = ""
    while before != text:
        before, text = text, _CLOSED.sub("N", text)
    return re.fullmatch(r" ?[-+]? ?N ?", text) is not None
