r"""Splits an answer in LaTeX or plain text into mathematical tokens, and marks the units after its numbers."""

import re

from .units import FUNCTIONS, GREEK, SCALES, is_short_unit, may_be_unit, starts_unit

UNIT, SCALE = "unit:", "scale:"  # prefixes of the tokens of units ("unit:km") and of scale words ("scale:million")
OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "<<": ">>", "[[": "]]"}  # "[[" and "]]" enclose a matrix
CLOSING = frozenset(OPENING.values())

_STYLES = "text(?:bf|it|rm|sf|up|normal)?|math(?:bf|it|rm|sf|bb|cal)|boldsymbol|bm|mbox|emph|underline"
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}")
_STYLED = re.compile(rf"\\(?:{_STYLES})\s*\{{([^{{}}]*)\}}")
_UNIT_LETTERS = frozenset("mgshlLNJWVAKCF")
_MARK = "\x01"  # a sign put before a letter that is a unit
_MATRIX = r"\{(?:(?:[pbB]|small)?matrix|array)\}"
# Replacements that bring LaTeX's many ways of writing the same to one way. Their order counts.
_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\[\]]*\])?", " ;; "),  # the end of a row of a matrix
        (r"(?<=[0-9])(?:\{,\}|,\\!\s*|\\,(?=[0-9]{3}(?![0-9])))(?=[0-9])", ","),
        (r"\\(?:[()\[\],:;! ]|(?:q?quad|displaystyle|limits|[bB]igg?[lr]?|rm|bf)(?![a-zA-Z]))|~", " "),
        (r"\\(?:left|right)(?![a-zA-Z])\.?|\\(?:angle|triangle)(?![a-zA-Z])", " "),
        (r"(?<=\\)[dtc](?=frac(?![a-zA-Z])|binom(?![a-zA-Z]))", ""),
        (rf"\\begin{_MATRIX}(?:\{{[clr|]*\}})?", " [[ "),
        (rf"\\end{_MATRIX}", " ]] "),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\(?:circ|degree)(?![a-zA-Z])", "°"),
        (r"\bdegrees?\b(?! (?:c|f)\b)", "°"),
        (r"\\%|\bpercent\b|\bpct\b", "%"),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])|∪", " \\\\cup "),
        (r"(?<![a-zA-Z0-9])([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]{1,40})\}", r" repeating{\1}{\2}{\3} "),
        (r"(?:, ?)?(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])", ", "),
    )
]
_LEAD_IN = re.compile(
    r"(?:(?:the )?(?:final )?answer(?: is:?|:)|about|approximately|around|roughly|≈|\\approx|=)\s*", re.IGNORECASE
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SENTENCE = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4}|[a-zA-Z]{2,} [a-zA-Z])")
_WORDS = re.compile(r"(?=.*[a-zA-Z]{2})[a-zA-Z]+(?:[' .-]+[a-zA-Z]+)*")

_SYMBOLS = {
    **{"**": "^", "·": "*", "⋅": "*", "×": "*", "÷": "/", "−": "-", "–": "-", "²": "^2", "³": "^3"},
    **{"≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "∈": "in", "±": "+-", "∓": "-+", "π": "pi", "√": "sqrt"},
    **{"∞": "infty", "⟨": "<<", "⟩": ">>", "∅": "emptyset", "[[": "[[", "]]": "]]", ";": ",", "θ": "theta"},
}
_COMMANDS = {
    **{"cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "+-", "mp": "-+", "in": "in", "cup": "cup"},
    **{"le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">"},
    **{"ne": "!=", "neq": "!=", "langle": "<<", "rangle": ">>", "varnothing": "emptyset", "emptyset": "emptyset"},
    **{name: "|" for name in ("lvert", "rvert", "vert", "mid")},
}
_NAMES = FUNCTIONS | GREEK | {"pi", "sqrt", "frac", "binom", "infty", "repeating"}
_PRODUCT_LETTERS = frozenset("abcxyz")  # words of these letters are products: "xy" is x times y, but "dog" is a word
_GLUED = re.compile(rf"({'|'.join(sorted(FUNCTIONS | {'sqrt', 'pi'}, key=len, reverse=True))})([a-zA-Z])")
_NOT_A_PRODUCT = frozenset("no on an as at be by do go he if in is it me my of oh ok so to up us we am or".split())

_THOUSANDS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|"
# A number with an exponent, as 1e-05, or without one. The "e" of "2e", "2e^3" and "2e3x" is Euler's number.
_PLAIN_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+−–]?[0-9]{1,3}(?![a-zA-Z0-9]|\.[0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_REST = (
    rf"(?P<name>(?:{_MARK}|\\)?[a-zA-Z]+)|(?P<space>\s+)"
    r"|(?P<sign>\*\*|<=|>=|!=|;;|\[\[|\]\]|\\[{}|]|[-+*/^_=<>()\[\]{},;:|!°%&'$€£·⋅×÷−–²³≤⩽≥⩾≠∈±∓π√∞⟨⟩∅θ])"
)
_TOKEN = re.compile(f"(?P<number>{_THOUSANDS}{_PLAIN_NUMBER})|{_REST}")
_TOKEN_IN_BRACKETS = re.compile(f"(?P<number>{_PLAIN_NUMBER})|{_REST}")
# After these tokens, "{" encloses an argument, in which "1,000" is one number. Any other "{" encloses a set.
_TAKES_ARGUMENT = FUNCTIONS | {"frac", "binom", "sqrt", "repeating", "^", "_", "]", "}"}
_REST_OF_UNIT = re.compile(r"\.?(?:/[a-zA-Z]+)?(?:\s*\^\s*(?:[23]|\{\s*[23]\s*\})|[23²³](?![0-9]))?")


_MINUS_SIGNS = str.maketrans("−–", "--")


class Unreadable(Exception):
    """The text is no mathematics that is read here, or it is too large."""


def simplify_latex(text: str) -> str:
    r"""Bring an answer to one way of writing, without delimiters, spacing, styles, a box around it and a final period.

    >>> simplify_latex(r"$\left(\dfrac12\right)\,\text{cm}$."), simplify_latex(r"\boxed{50\%}"), simplify_latex(r"\$5")
    ('(\\frac12 ) cm', '50%', '$5')
    """
    text = " ".join(text.split()).strip("*` ").rstrip(" .;")
    text = text.replace(_MARK, " ").replace("\\$", "\0")
    if text.count("$") != 1:  # a single sign is a currency, and a pair encloses mathematics
        text = text.replace("$", " ")
    text = _unbox(text.replace("\0", "$"))
    for pattern, replacement in _REPLACEMENTS[:2]:
        text = pattern.sub(replacement, text)
    text = _OPERATOR.sub(_operator, text)
    text = _STYLED.sub(_without_style, _STYLED.sub(_without_style, text))
    for pattern, replacement in _REPLACEMENTS[2:]:
        text = pattern.sub(replacement, " ".join(text.split()))
    text = " ".join(text.split()).strip("*`").rstrip(" .;,")
    return text[lead_in.end() :] if (lead_in := _LEAD_IN.match(text)) else text


def split_tokens(text: str) -> list[str]:
    r"""The tokens of a text from `simplify_latex`. A product of letters is split into its letters.

    Raises:
        Unreadable: the text has a word or a sign that is no mathematics that is read here.

    >>> split_tokens(r"2xy + \frac{\pi}{1,000}")
    ['2', 'x', 'y', '+', 'frac', '{', 'pi', '}', '{', '1,000', '}']
    >>> split_tokens("(2,100)"), split_tokens("5 square miles"), split_tokens("2 million")
    (['(', '2', ',', '100', ')'], ['5', 'unit:square', 'unit:miles'], ['2', 'scale:million'])
    """
    if _WORDS.fullmatch(text) and not _PRODUCT_LETTERS.issuperset(text.replace(" ", "")) and text not in _NAMES:
        raise Unreadable(f"the words {text!r}")
    tokens: list[str] = []
    open_brackets: list[bool] = []  # for each open bracket, whether a comma in it separates values
    position = 0
    while position < len(text):
        match = (_TOKEN_IN_BRACKETS if any(open_brackets) else _TOKEN).match(text, position)
        if match is None:
            raise Unreadable(f"the sign {text[position]!r}")
        position = match.end()
        if match["number"]:
            tokens.append(match[0].translate(_MINUS_SIGNS))
        elif match["sign"]:
            token = _SYMBOLS.get(match[0], match[0])
            if token in ("(", "[", "{", "\\{", "<<"):
                open_brackets.append(token != "{" or not tokens or tokens[-1] not in _TAKES_ARGUMENT)
            elif token in (")", "]", "}", "\\}", ">>") and open_brackets:
                open_brackets.pop()
            tokens.extend(token if token in ("^2", "^3") else [token])
        elif match["name"]:
            position = _take_word(text, match, tokens)
    return tokens


def _take_word(text: str, match: re.Match[str], tokens: list[str]) -> int:
    """Add the tokens of a word of the text: a scale word, a unit or a name. Returns where the next token begins."""
    word, position = match[0], match.end()
    attached = match.start() > 0 and not text[match.start() - 1].isspace()
    follows_value = bool(tokens) and tokens[-1] not in ("+", "-", "*", "^", "_", "=", "(", "{", "frac", "sqrt")
    if tokens and word.casefold().removesuffix("s") in SCALES and tokens[-1][-1].isdigit():
        tokens.append(SCALE + word.casefold().removesuffix("s"))
    elif follows_value and _is_unit(word, tokens, attached, text[position:]):
        rest = _REST_OF_UNIT.match(text, position)
        position = rest.end()
        tokens.append(UNIT + word.removeprefix(_MARK) + rest[0].replace(" ", ""))
    else:
        tokens.extend(_split_word(word))
    return position


def _unbox(text: str) -> str:
    r"""The text without its `\boxed{...}`, and without a sentence before it. A sentence with several boxes stays."""
    boxes = list(_BOXED.finditer(text))
    if boxes and _SENTENCE.search(text[: boxes[-1].start()]):
        if len(boxes) > 1:
            return text
        text = text[boxes[0].start() :]
        boxes = list(_BOXED.finditer(text))
    for box in reversed(boxes):
        depth, end = 1, box.end()
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:
            return text  # the box is not closed
        text = f"{text[: box.start()]} {text[box.end() : end - 1]} {text[end:]}"
    return text


def _operator(match: re.Match[str]) -> str:
    r"""Replace an \operatorname: a short unit, which some write so, by its text, and any other name by a command."""
    return f"\\text{{ {match[1]}}}" if is_short_unit(match[1]) and match[1] != "min" else f"\\{match[1]} "


def _without_style(match: re.Match[str]) -> str:
    r"""Replace a style such as \text{...} by its content, and mark a letter after a number as a unit."""
    content = match[1].strip()
    if content in _UNIT_LETTERS and re.search(r"[0-9a-z}]\s*$|\\[,; ]$|~$", match.string[: match.start()]):
        return f" {_MARK}{content} "
    return f" {match[1]} "


def _is_unit(word: str, tokens: list[str], attached: bool, rest: str) -> bool:
    """Whether a word belongs to a unit, given the tokens before it and the rest of the text after it."""
    if word.startswith(("\\", _MARK)):
        return word.startswith(_MARK)
    if tokens[-1].startswith((UNIT, SCALE)):
        if word == "a":
            return re.match(r" [a-zA-Z]{2}", rest) is not None  # as in "dollars a day"
        if len(word) == 1:  # as in "visits to company B"
            return word.isupper() and len(tokens[-1]) > len(UNIT) + 3
        is_product = len(word) <= 3 and _PRODUCT_LETTERS.issuperset(word) and word not in _NOT_A_PRODUCT
        return not is_product and may_be_unit(word)
    if tokens[-1] == "/":
        return tokens[-2:][0].startswith(UNIT) or len(word) > 2 and starts_unit(word, attached)
    return starts_unit(word, attached)


def _split_word(word: str) -> list[str]:
    """The tokens of a word: a command, a name, or letters that are multiplied. Raises Unreadable for other words."""
    name = word.removeprefix("\\")
    if word != name and name in _COMMANDS:
        return [_COMMANDS[name]]
    if name in _NAMES:
        return [name]
    if name.casefold() in ("inf", "infinity"):
        return ["infty"]
    if len(word) == 1 or _PRODUCT_LETTERS.issuperset(word) or re.fullmatch("[A-Z]{3}", word):
        return list(word)
    if word == name and len(name) == 2 and name.casefold() not in _NOT_A_PRODUCT:
        return list(name)
    if word == name and (glued := _GLUED.fullmatch(name)):
        return [glued[1], glued[2]]
    raise Unreadable(f"the word {word!r}")
