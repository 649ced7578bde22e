"""A closed question as statements, one group for each answer, so that a picture can be matched with them.

What answers a question allows is read off its words alone: "A or B" asks for one of two, any other question that
begins with a verb for yes or no. Nothing is learned from answers. English only.
"""

import re

_VERBS = "is are was were does do did has have had can could would should will may might am"
_POLAR = re.compile(rf"^(?:{'|'.join(_VERBS.split())})\b\s*(.+)$", re.IGNORECASE)
_THERE = re.compile(r"^there\s+(?:a\s+|an\s+|any\s+|some\s+)?(.+)$", re.IGNORECASE)
_THIS = re.compile(r"^(this|that|it|these|those|they)\s+(.+)$", re.IGNORECASE)
_CHOICE = re.compile(r"([\w-]+)\s+(?:or|vs\.?|versus)\s+(?:(?:a|an|the)\s+)?([\w-]+)", re.IGNORECASE)
_DETERMINER = re.compile(r"^(?:the|a|an|any|some)\s+", re.IGNORECASE)


def statements(question: str) -> dict[str, list[str]]:
    """Sentences by answer: two answers, or none where the question is neither of yes or no nor of one of two.

    The first answer of a question of yes or no is `yes`. Each answer has as many sentences as the other.
    """
    asked = " ".join(question.split()).rstrip(" ?.!")
    if found := _CHOICE.search(asked):
        return {option: [option, f"{asked}? {option}"] for option in found.groups()} if _differ(*found.groups()) else {}
    if not (found := _POLAR.match(asked)):
        return {}
    true, false = _said(asked, found[1])
    return {"yes": [true, f"{asked}? yes"], "no": [false, f"{asked}? no"]}


def _differ(one: str, other: str) -> bool:
    return one.lower() != other.lower()


def _said(asked: str, rest: str) -> tuple[str, str]:
    """What holds if the answer is yes, and if it is no."""
    if found := _THERE.match(rest):
        return f"there is {found[1]}", f"there is no {found[1]}"
    verb = asked.split()[0].lower()
    if found := _THIS.match(rest):
        return f"{found[1]} {verb} {found[2]}", f"{found[1]} {verb} not {found[2]}"
    return rest, f"no {_DETERMINER.sub('', rest)}"
