"""Unicode mathematics as ASCII and LaTeX: digits of every script, signs, superscripts, Greek letters."""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑﹣－", "-"),
        **dict.fromkeys("×·⋅∙∗✕✖", r"\cdot "),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("≤≦⩽", r"\le "),
        **dict.fromkeys("≥≧⩾", r"\ge "),
        **dict.fromkeys("≈≃≅∼≒", r"\approx "),
        **dict.fromkeys("≮≯≰≱≡∝≪≫≲≳¬", r"\not "),
        **dict.fromkeys("⁄∕÷", "/"),
        **{"π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "±": r"\pm ", "∓": r"\mp "},
        **{"≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ "},
        **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega "},
        **{"θ": r"\theta ", "٫": ".", "٬": ",", "،": ",", "٪": "%", "。": ". ", "、": ", "},
    }
)
_UP = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_DOWN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile(r"[¼-¾⅐-⅞]")
_DIGIT = re.compile(r"(?![0-9])\d")
_INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def ascii_mathematics(text: str) -> str:
    r"""Text whose mathematics is ASCII or LaTeX; letters of other scripts stay, what cannot be seen goes.

    >>> ascii_mathematics("x² ≤ 3½"), ascii_mathematics("١٢٫٥"), ascii_mathematics("√２")
    ('x^{2} \\le  3\\frac{1}{2}', '12.5', '\\sqrt 2')
    """
    if text.isascii():
        return _CONTROL.sub(" ", text)
    text = _UP.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("−", "-") + "}", text)
    text = _DOWN.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = _VULGAR.sub(lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = _DIGIT.sub(lambda m: str(unicodedata.decimal(m[0])), text)
    return _CONTROL.sub(" ", _INVISIBLE.sub("", text))
