"""What a source says of a picture's class against the class list of its set: one number, or one for each finding.

A class list is a list of names, or a mapping from what the files say to names (`{"MEL": "melanoma"}`); several words
may mean one class, and a word that means none of them ("No Finding") is mapped to "".
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from mmkd_jax.errors import InputError, near


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class names in the order of their numbers, and other words for them ("" for none of them).

    Make it with `Classes.of`.
    """

    names: tuple[str, ...]
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Sequence[str] | Mapping[str, str], where: str = "classes") -> "Classes":
        """From a list of names, or a mapping from words to names.

        Raises:
          InputError: neither, or a name that comes twice; says where.
        """
        if isinstance(given, Mapping):
            words, names = {str(word): name for word, name in given.items()}, list(dict.fromkeys(given.values()))
            names = [name for name in names if name != ""]
        else:
            words, names = {}, given
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n.strip() for n in names):
            raise InputError(f"{where}: must be a list of names, or an object from labels in the files to names")
        if twice := next((name for name in names if list(names).count(name) > 1), None):
            raise InputError(f"{where}: the class {twice!r} comes twice")
        return cls(tuple(names), words)

    def number(self, word: str) -> int:
        """Number of the class that `word` means; -1 for none. Whole numbers mean themselves, if no name is a number.

        Raises:
          InputError: it is none of them.
        """
        word = str(word).strip()
        name = self.words.get(word, self.words.get(_whole(word), word))
        if name == "":
            return -1
        if name in self.names:
            return self.names.index(name)
        if not self.words and _whole(name).isdigit() and int(_whole(name)) < len(self.names):
            return int(_whole(name))
        raise InputError(f"label {word!r} is not one of the {len(self.names)} classes; {near(word, self._known())}")

    def single(self, label: str, label_id: int) -> tuple[str, int]:
        """Name and number of a picture's class from what its source says of either; ("", -1) if of neither.

        Raises:
          InputError: outside the list, or the two contradict each other.
        """
        if label_id >= len(self.names):
            raise InputError(f"label_id {label_id}, but only {len(self.names)} class names")
        if not label:
            return (self.names[label_id], label_id) if label_id >= 0 else ("", -1)
        number = self.number(label)
        if label_id >= 0 and number != label_id:
            raise InputError(
                f"its label is {label!r}, but class number {label_id} is {self.names[label_id]!r}; "
                "the class list has another order, or is another set's"
            )
        return (self.names[number], number) if number >= 0 else ("", -1)

    def several(self, findings: Sequence[str] | Mapping[str, int]) -> tuple[int, ...]:
        """1 (there), 0 (not there) or -1 (unknown) for each class.

        Args:
          findings: the words of those that are there, all others not being there; or a number by word, and then
            those that are not named are unknown.

        Raises:
          InputError: a word outside the list, or another number.
        """
        stated = isinstance(findings, Mapping)
        targets = [-1 if stated else 0] * len(self.names)
        for word in findings:
            value = findings[word] if stated else 1
            if value not in (-1, 0, 1):
                raise InputError(f"finding {word!r} has the value {value!r}, not 1 (there), 0 (not) or -1 (unknown)")
            if (number := self.number(word)) >= 0:
                targets[number] = max(targets[number], int(value))
        return tuple(targets)

    def _known(self) -> list[str]:
        return [*self.names, *self.words]


def _whole(text: str) -> str:
    """ "3.0" as "3": spreadsheets write whole numbers so."""
    return re.sub(r"^(\d+)\.0+$", r"\1", text)
