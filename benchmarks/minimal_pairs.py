"""Minimal pairs for small models of documentation and code: two texts that differ in one place, one of them right.

    pairs("agreement, a phrase between", 400)[0]   # Pair(right="The key of the file is empty.", wrong="...")

Subject-verb agreement as Marvin and Linzen (arXiv 1808.09031) and BLiMP (arXiv 1912.00582) test it, in words that
manuals use; and what corresponds to it in code: the closing bracket, a name that was given before, the indentation, a
word of the language at hand. Texts come from templates, two of a frame, in which the alternatives change places: a
model that always prefers one of the two, such as the more frequent word, gets half of them right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    right: str
    wrong: str


Frame = tuple[Pair, Pair]

NOUNS = (
    *("option", "function", "method", "argument", "module", "value", "file", "class", "parameter", "object", "field"),
    *("command", "key", "variable", "test", "page", "user", "package", "block", "name", "type", "table", "column"),
    *("row", "device", "process", "thread", "model", "image", "line", "message", "event", "script", "tool", "feature"),
)
PREDICATES = (  # as the singular and the plural have them, and what goes on
    *(("is", "are", rest) for rest in ("optional", "not used", "empty", "ignored by default", "no longer supported")),
    *(
        ("is", "are", rest)
        for rest in ("described below", "only available on Linux", "new in version 2.0", "required")
    ),
    *(("was", "were", rest) for rest in ("removed in version 3.0", "added in this release", "changed", "not found")),
    *(("has", "have", rest) for rest in ("a default value", "no effect", "the same type", "been deprecated")),
    *(("does", "do", rest) for rest in ("not exist", "not change", "nothing on Windows", "not need a name")),
    *(("needs", "need", rest) for rest in ("more memory", "to be installed")),
    *(("contains", "contain", rest) for rest in ("a list of names", "the default settings")),
    *(("uses", "use", rest) for rest in ("the same format", "the default encoding")),
    *(("takes", "take", "two arguments"), ("returns", "return", "a list"), ("supports", "support", "this format")),
)
PREPOSITIONS = ("of", "in", "for", "from", "with", "before", "near", "behind")
INNER = (("uses", "use"), ("needs", "need"), ("reads", "read"), ("creates", "create"), ("calls", "call"))

NAMES = (
    *("values", "items", "names", "rows", "data", "other", "key", "result", "count", "size", "path", "text"),
    *("lines", "start", "index", "width", "name", "args", "node", "length"),
)
CALLS = ("max", "len", "list", "sorted", "update", "merge", "parse", "build", "check", "get", "load", "find")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
ELEMENTS = ("{a}, {b}", "{a} + {b}", "{a}.{b}, 1", "x for x in {a} if x != {b}", "{a}, None, {b}")
STARTS = ("return ", "{c} = ", "yield ", "assert {c} == ")
REPEATS = (
    "    return {a} + {slot}\n",
    "    for item in {slot}:\n        {a}.append(item)\n",
    "    return [{a} * item for item in {slot}]\n",
    "    {a}.update({slot})\n",
    "    print({a}, {slot})\n",
    "    if {slot} is None:\n        return {a}\n",
    "    self.{a} = {slot}\n",
)
OPENING = ("if {a}:", "for item in {a}:", "while {a}:", "with open({a}) as file:", "if not {a}:", "if {a} is None:")
PLAIN = ("{c} = {a}", "{c} = len({a})", "print({a})", "{a}.append({b})", "{c} = {a} + {b}", "assert {a}")
NEXT = ("return {b}", "print({b})", "{b} += 1", "raise ValueError({b})", "{b}.update({a})")
LANGUAGES = (  # the alternatives, and where Python and Java have them
    ("self", "this", "        return {slot}.{a}\n", "        return {slot}.{a};\n"),
    ("self", "this", "        {slot}.{a} = {b}\n", "        {slot}.{a} = {b};\n"),
    ("None", "null", "        return {slot}\n", "        return {slot};\n"),
    ("True", "true", "        return {slot}\n", "        return {slot};\n"),
    ("False", "false", "        {a} = {slot}\n", "        {a} = {slot};\n"),
    ("and", "&&", "        if {a} {slot} {b}:\n", "        if ({a} {slot} {b}) {\n"),
    ("or", "||", "        return {a} {slot} {b}\n", "        return {a} {slot} {b};\n"),
    ("raise", "throw", "        {slot} RuntimeError({a})\n", "        {slot} new RuntimeException({a});\n"),
)


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def named(text: str, *names: str) -> str:
    """A template with its {a}, {b} and {c}; other braces are the code's."""
    for place, name in zip("abc", names, strict=False):
        text = text.replace(f"{{{place}}}", name)
    return text


def swapped(texts: tuple[str, str], alternatives: tuple[str, str]) -> Frame:
    """Two pairs: the first text with the first alternative and the second with the second are right."""
    first, second = (tuple(text.replace("{slot}", word) for word in alternatives) for text in texts)
    return Pair(first[0], first[1]), Pair(second[1], second[0])


def agreement(draw: random.Random, between: str | None = None, attracting: bool = False) -> Frame:
    """A singular and a plural subject; if wanted a phrase or clause between, whose noun has the same number or not."""
    noun, other = draw.sample(NOUNS, 2)
    *verbs, rest = draw.choice(PREDICATES)
    preposition, inner = draw.choice(PREPOSITIONS), draw.choice(INNER)
    texts = []
    for subject, is_plural in ((noun, False), (plural(noun), True)):
        many = is_plural != attracting  # whether the other noun is plural
        object_ = plural(other) if many else other
        middle = {
            None: "",
            "phrase": f" {preposition} the {object_}",
            "clause": f" that the {object_} {inner[many]}",
        }[between]
        texts.append(f"The {subject}{middle} {{slot}} {rest}.")
    return swapped((texts[0], texts[1]), (verbs[0], verbs[1]))


def brackets(draw: random.Random) -> Frame:
    """Which of two brackets closes first, after `f([` and after `[f(`, and so on."""
    a, b, c = draw.sample(NAMES, 3)
    first, second = draw.sample(tuple(BRACKETS), 2)
    function, call = draw.sample(CALLS, 2)
    element, start = named(draw.choice(ELEMENTS), a, b), named(draw.choice(STARTS), a, b, c)
    texts = []
    for outer, inner in ((first, second), (second, first)):
        opened = "".join(call + bracket if bracket == "(" else bracket for bracket in (outer, inner))
        texts.append(f"def {function}({a}, {b}, {c}):\n    {start}{opened}{element}{{slot}}\n")
    return swapped((texts[0], texts[1]), (BRACKETS[second] + BRACKETS[first], BRACKETS[first] + BRACKETS[second]))


def names(draw: random.Random) -> Frame:
    """An argument's name, or one that is none."""
    a, b, c = draw.sample(NAMES, 3)
    body, function = named(draw.choice(REPEATS), a), draw.choice(CALLS)
    arguments = f"self, {a}" if "self" in body else a
    return swapped(
        (f"def {function}({arguments}, {b}):\n{body}", f"def {function}({arguments}, {c}):\n{body}"), (b, c)
    )


def indentation(draw: random.Random) -> Frame:
    """Deeper after a line that ends in a colon, and not after another."""
    a, b, c = draw.sample(NAMES, 3)
    line, function = draw.choice(NEXT), draw.choice(CALLS)
    before = draw.choice(OPENING), draw.choice(PLAIN)
    texts = [named(f"def {function}({{a}}, {{b}}):\n    {one}\n{{slot}}{line}\n", a, b, c) for one in before]
    return swapped((texts[0], texts[1]), (" " * 8, " " * 4))


def language(draw: random.Random) -> Frame:
    """A word of Python or of Java, in a method of either."""
    a, b = draw.sample(NAMES, 2)
    first, second, python, java = draw.choice(LANGUAGES)
    function, kind = draw.choice(CALLS), draw.choice(NAMES).capitalize()
    starts = (
        f"class {kind}:\n    def {function}(self, {a}, {b}):\n",
        f"public class {kind} {{\n    public Object {function}(Object {a}, Object {b}) {{\n",
    )
    return swapped((starts[0] + named(python, a, b), starts[1] + named(java, a, b)), (first, second))


TASKS: dict[str, Callable[[random.Random], Frame]] = {
    "agreement": agreement,
    "agreement, a phrase between": lambda draw: agreement(draw, "phrase"),
    "agreement, a phrase of the other number": lambda draw: agreement(draw, "phrase", attracting=True),
    "agreement, a clause between": lambda draw: agreement(draw, "clause"),
    "agreement, a clause of the other number": lambda draw: agreement(draw, "clause", attracting=True),
    "code, brackets": brackets,
    "code, names": names,
    "code, indentation": indentation,
    "code, language": language,
}


def pairs(task: str, count: int) -> list[Pair]:
    """Return `count` pairs of a task, two of a frame, the same on every machine."""
    draw = random.Random(task)
    frames = (TASKS[task](draw) for _ in range(2 * count))
    found = list(dict.fromkeys(pair for frame in frames for pair in frame))[:count]  # each once
    if len(found) < count:
        raise ValueError(f"{task} has fewer than {count} pairs: expected a smaller count")
    return found
