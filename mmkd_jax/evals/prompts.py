"""What a zero-shot classifier is told about its classes: sentences, from templates by modality or written in full.

Wording is data: templates by modality (`prompts.json`), worded as its captions are, and records by name of a set
(`set_prompts.json`), in the form of `from_record`. Every number carries the hash of the sentences that it came from.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

from mmkd_jax import io
from mmkd_jax.errors import InputError, near

PROFILES = ("ensemble", "names")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The sentences of each class, in the order of the class names; `profile` says how they were made."""

    sentences: tuple[tuple[str, ...], ...]
    profile: str

    def __post_init__(self):
        if len(self.sentences) < 2:
            raise InputError(f"zero-shot classification needs at least two classes, got {len(self.sentences)}")
        for number, of_class in enumerate(self.sentences):
            if not of_class or not all(isinstance(text, str) and text.strip() for text in of_class):
                raise InputError(f"class number {number} needs at least one prompt, and none may be empty")

    @property
    def hash(self) -> str:
        """Identity of the sentences, their classes and order."""
        return io.hash_of(self.sentences)


@functools.cache
def _data(file: str = "prompts.json") -> dict:
    return json.loads((pathlib.Path(__file__).parent / file).read_text(encoding="utf-8"))


def of_sets() -> dict[str, Mapping]:
    """Our wording by name of a set, records of `from_record`."""
    return _data("set_prompts.json")


def templates(modality: str | None = None) -> tuple[str, ...]:
    """The templates of `modality`, or the generic ones when it is unknown or None."""
    data = _data()
    return tuple(data["modality"].get(modality, data["generic"]))


def from_templates(class_names: Sequence[str], wordings: Sequence[str], profile: str = "ensemble") -> Prompts:
    """Every class name put into every template.

    Raises:
      InputError: a template without exactly one `{}`.
    """
    return from_synonyms([[name] for name in class_names], wordings, profile)


def from_synonyms(synonyms: Sequence[Sequence[str]], wordings: Sequence[str], profile: str = "synonyms") -> Prompts:
    """Every name of a class put into every template; classes may have different numbers of names.

    All sentences of a class count alike, so that the mean of a class is flat over names and templates.

    Raises:
      InputError: a template without exactly one `{}`.
    """
    for wording in wordings:
        if wording.count("{}") != 1:
            raise InputError(f"the prompt template {wording!r} must contain {{}} once, where the class name goes")
    return Prompts(
        tuple(tuple(w.replace("{}", name) for name in names for w in wordings) for names in synonyms), profile
    )


def absent(class_names: Sequence[str]) -> Prompts:
    """What is said of a picture that does not show each finding: the other side of a multi-label question."""
    return from_templates(class_names, _data()["absent"], "absent")


def from_sentences(class_names: Sequence[str], sentences: Mapping[str, Sequence[str]]) -> Prompts:
    """Full sentences by class name, as hand-written or generated descriptions come.

    Raises:
      InputError: a class without sentences, or sentences of an unknown class.
    """
    for name in sentences:
        if name not in class_names:
            raise InputError(f"prompts are given for {name!r}, which is not a class; {near(name, class_names)}")
    for name in class_names:
        if name not in sentences:
            raise InputError(f"no prompts are given for the class {name!r}; add sentences for it")
    return Prompts(tuple(tuple(sentences[name]) for name in class_names), "sentences")


def from_record(class_names: Sequence[str], record: Mapping, where: str = "prompts") -> Prompts:
    """Prompts as a file gives them.

    Either `{"sentences": {class: [...]}}`, or `{"templates": [...], "synonyms": {class: [...]}}`, where synonyms are
    further names of a class beside its own, and may be left out. Beside either, `absent` may hold such a record of
    what is said of a picture that does not show the class, see `absent_of`.

    Raises:
      InputError: another form, unknown classes, or what `from_sentences` and `from_synonyms` refuse; says where.
    """
    forms = ({"sentences"}, {"templates"}, {"templates", "synonyms"})
    if not isinstance(record, Mapping) or set(record) - {"absent"} not in forms:
        raise InputError(f'{where}: must be {{"sentences": ...}} or {{"templates": ..., "synonyms": ...}}')
    synonyms = record.get("synonyms", {})
    if not isinstance(synonyms, Mapping) or not isinstance(record.get("sentences", {}), Mapping):
        raise InputError(f"{where}: sentences and synonyms must be objects with a list of texts by class")
    lists = [record.get("templates", []), *record.get("sentences", {}).values(), *synonyms.values()]
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists):
        raise InputError(f"{where}: templates, and the sentences or synonyms of each class, must be lists of texts")
    for name in synonyms:
        if name not in class_names:
            raise InputError(f"{where}: synonyms are given for {name!r}, not a class; {near(name, class_names)}")
    try:
        if "sentences" in record:
            return from_sentences(class_names, record["sentences"])
        names = [list(dict.fromkeys([name, *synonyms.get(name, [])])) for name in class_names]
        return from_synonyms(names, record["templates"], "synonyms" if synonyms else "templates")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def default(
    class_names: Sequence[str],
    modality: str | None = None,
    profile: str = "ensemble",
    *,
    name: str = "",
    own: Mapping | None = None,
) -> Prompts:
    """The class names in the modality's templates (`ensemble`), or by themselves (`names`).

    A set with wording of its own is asked in that: in `own`, which came with its data, or else in ours for the set of
    that `name`, if it has the classes that ours was written for. `profile` may also be a JSON file with a record by
    set's name, see `from_record`; sets that are not in it are asked as in `ensemble`, and the result's context says so.
    """
    if found := _wording(class_names, profile, name, own):
        record, where = found
        prompts = from_record(class_names, record, where)
        plain = profile == "ensemble" and prompts.profile == "templates"
        return dataclasses.replace(prompts, profile="ensemble") if plain else prompts
    if profile == "names":
        return from_templates(class_names, ("{}",), profile)
    return from_templates(class_names, templates(modality))


def absent_of(
    class_names: Sequence[str], profile: str = "ensemble", *, name: str = "", own: Mapping | None = None
) -> Prompts | None:
    """What the wording that `default` takes says of a picture without each class, None where it says nothing."""
    record, where = _wording(class_names, profile, name, own) or ({}, "")
    if "absent" not in record:
        return None
    return dataclasses.replace(from_record(class_names, record["absent"], f"{where}, absent"), profile="absent")


def _wording(class_names, profile: str, name: str, own: Mapping | None) -> tuple[Mapping, str] | None:
    """The record that a set's classes are asked in and where it is from, None where the modality's templates serve."""
    if profile.endswith(".json"):
        records = io.read_json(profile)
        if not isinstance(records, dict):
            raise InputError(f"{profile} must hold an object with a record of prompts by the name of a set")
        if name in records:
            return records[name], f"{profile}, set {name}"
    elif profile not in PROFILES:
        raise InputError(f"prompt profile {profile!r} is unknown; {near(profile, PROFILES)}")
    if profile == "names":
        return None
    if own:
        return own, f"the prompts of {name}"
    ours = of_sets().get(name, {})
    fits = set(ours.get("synonyms", {})) <= set(class_names) and set(ours.get("sentences", class_names)) == set(
        class_names
    )
    return (ours, f"set_prompts.json, {name}") if ours and fits else None
