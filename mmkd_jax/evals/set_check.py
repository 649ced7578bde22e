"""Looks at a described set as it lies: how many pictures of what, examples, and everything wrong with it."""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from mmkd_jax import preprocess
from mmkd_jax.data import splits
from mmkd_jax.data.ingest import group_id, settled
from mmkd_jax.data.labels import Classes
from mmkd_jax.data.pairs import pair_id
from mmkd_jax.data.sources import Skipped, Source, SourceRecord
from mmkd_jax.errors import InputError
from mmkd_jax.evals import vqa_questions
from mmkd_jax.evals.sets import SetRecord

MAX_BAD = 0.05  # largest fraction of unusable pictures, as ingest has it by default
SHOWN = 5  # lines of a kind of problem


@dataclasses.dataclass(frozen=True)
class Case:
    """A usable picture.

    Attributes:
      key, split, group: as its source says; `unit`: what made splits go by, as in ingest.
      what: numbers of its classes; without: of findings that are known not to be there.
      captions: how many; closed, open: how many questions of either type.
      pixels: hash of them; size: width and height, px.
    """

    key: str
    split: str
    group: str
    unit: str
    what: tuple[int, ...]
    without: tuple[int, ...]
    captions: int
    pixels: bytes
    size: tuple[int, int]
    closed: int = 0
    open: int = 0


@dataclasses.dataclass
class Checked:
    """What was found.

    Attributes:
      cases: the usable pictures.
      classes: the class list, None without.
      unusable: lines about pictures that cannot be used.
      outside: lines about labels that are not in the class list.
      fatal: lines that say why the set cannot be evaluated; `problems`: other lines.
    """

    cases: list[Case]
    classes: Classes | None
    unusable: list[str]
    outside: list[str]
    fatal: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def check(record: SetRecord, source: Source) -> Checked:
    """Reads every picture of the set once.

    Raises:
      InputError: the layout is not what the record says, so that nothing can be counted.
    """
    found = _read(record, source)
    n = len(found.cases) + len(found.unusable)
    found.problems += _few(found.unusable, "unusable pictures")
    if not found.cases:
        found.fatal.append(f"none of {n} pictures can be used" if n else "there are no pictures")
        found.fatal += _few(found.outside, "labels outside the classes")
        return found
    if len(found.unusable) > MAX_BAD * n:
        found.fatal.append(f"{len(found.unusable)} of {n} pictures cannot be used, more than {MAX_BAD:.0%}")
    found.fatal += _few(found.outside, "labels outside the classes")
    _judge_splits(record, found)
    found.problems += _few(list(_shared_groups(found.cases)), "groups in several splits")
    found.problems += _few(list(_copies(found.cases)), "equal pictures in several splits")
    return found


def table(found: Checked) -> list[str]:
    """Lines of counts by split and class."""
    names = found.classes.names if found.classes else ()
    counts: dict[str, Counter] = defaultdict(Counter)
    totals: Counter = Counter()
    for case in found.cases:
        counts[case.split].update(case.what)
        totals[case.split] += 1
    order = sorted(totals, key=lambda split: ({"train": 0, "val": 1, "test": 2}.get(split, 3), split))
    width = max([len(name) for name in names] + [8])
    lines = [" " * width + "".join(f"{split:>9}" for split in order)]
    lines += [f"{name:{width}}" + "".join(f"{counts[s][i]:9}" for s in order) for i, name in enumerate(names)]
    for kind in ("closed", "open"):
        asked = Counter({split: sum(getattr(c, kind) for c in found.cases if c.split == split) for split in order})
        if asked.total():
            lines.append(f"{kind:{width}}" + "".join(f"{asked[split]:9}" for split in order))
    return [*lines, f"{'pictures':{width}}" + "".join(f"{totals[split]:9}" for split in order)]


def samples(found: Checked) -> list[str]:
    """A line about the first picture of each class in the test split, or of any."""
    tested = [case for case in found.cases if case.split == "test"] or found.cases
    lines, seen = [], set()
    for case in tested:
        if case.what in seen or len(seen) >= SHOWN:
            continue
        seen.add(case.what)
        what = ", ".join(found.classes.names[number] for number in case.what) if found.classes else ""
        lines.append(f"{case.split} {case.key}: {what or 'no class'}, {case.size[0]} x {case.size[1]} px")
    return lines


def _read(record: SetRecord, source: Source) -> Checked:
    classes = source.classes().get(record.name)
    found, keys = Checked([], classes, [], []), set()
    for one in source.records():
        case = _case(one, classes, keys)
        if isinstance(case, Case):
            found.cases.append(case)
        elif isinstance(case, InputError):
            found.outside.append(str(case))
        else:
            found.unusable.append(f"{case.key}: {case.reason}")
    if record.split and found.cases:
        groups = [case.unit for case in found.cases]
        made = splits.by_group(record.name, groups, [case.what for case in found.cases], record.split)
        found.cases = [dataclasses.replace(case, split=split) for case, split in zip(found.cases, made)]
    return found


def _case(one: SourceRecord | Skipped, classes: Classes | None, keys: set[str]) -> Case | Skipped | InputError:
    if isinstance(one, Skipped):
        return one
    if one.key in keys:
        return Skipped(one.key, "its key comes twice")
    keys.add(one.key)
    try:
        picture = preprocess.decode(one.image)
    except InputError as error:
        return Skipped(one.key, str(error))
    try:
        settled_one, targets = settled(one, classes)
        types = Counter(_type(entry, one) for entry in one.extra.get(vqa_questions.FIELD) or ())
    except InputError as error:
        return error
    there = tuple(number for number, target in enumerate(targets) if target == 1)
    what = there if targets else (settled_one.label_id,) if settled_one.label_id >= 0 else ()
    without = tuple(number for number, target in enumerate(targets) if target == 0)
    pixels = hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()
    unit = group_id(one) or pair_id(one.source, one.key)
    about = {"captions": len(one.captions), "pixels": pixels, "size": picture.size, **types}
    return Case(one.key, one.split, one.group, unit, what, without, **about)


def _type(entry: Mapping, one: SourceRecord) -> str:
    """Whether a question is closed or open.

    Raises:
      InputError: it says neither, or lacks its text or answer.
    """
    kind = str(entry.get("answer_type", "")).lower()
    if kind not in vqa_questions.TYPES or not str(entry.get("question", "")) or not str(entry.get("answer", "")):
        raise InputError(f"{one.key}: a question needs question, answer and answer_type (closed or open), not {entry}")
    return kind


def _judge_splits(record: SetRecord, found: Checked) -> None:
    """Says what the splits lack."""
    by_split: dict[str, list[Case]] = defaultdict(list)
    for case in found.cases:
        by_split[case.split].append(case)
    tested = by_split.get("test") or (by_split.get("val") if record.task == "retrieval" else None)
    if not tested:
        found.fatal.append(f"there is no split test to evaluate on, only {', '.join(sorted(by_split))}")
    elif record.task == "retrieval" and not any(case.captions for case in tested):
        found.fatal.append("no picture that is tested on has a caption")
    elif record.task == "vqa" and not any(case.closed + case.open for case in tested):
        found.fatal.append("no picture that is tested on has a question")
    for split, wanted in record.about.get("size", {}).items():
        if split in ("train", "val", "test") and len(by_split[split]) != wanted:
            found.problems.append(f"split {split} has {len(by_split[split])} pictures, the record says {wanted}")
    if record.task in ("retrieval", "vqa"):
        return
    if found.classes is None:
        found.fatal.append("there are no labels, and no class list")
        return
    for split, cases in sorted(by_split.items()):
        counts = Counter(number for case in cases for number in case.what)
        without = Counter(number for case in cases for number in case.without)
        for number, name in enumerate(found.classes.names):
            needed = record.task == "multilabel" and split == "test"  # no AUC exists without both
            if not counts[number]:
                (found.fatal if needed else found.problems).append(f"class {name!r} is absent in split {split}")
            elif needed and not without[number]:
                found.fatal.append(f"no picture of split test is without {name!r}")
    if tested and len({number for case in tested for number in case.what}) < 2 and record.task == "classification":
        found.fatal.append("split test has fewer than two classes")


def _shared_groups(cases: list[Case]) -> Iterator[str]:
    seen: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.group:
            seen[case.group].add(case.split)
    for group, of in sorted(seen.items()):
        if len(of) > 1:
            yield f"group {group!r} is in the splits {', '.join(sorted(of))}"


def _copies(cases: list[Case]) -> Iterator[str]:
    first: dict[bytes, Case] = {}
    for case in cases:
        other = first.setdefault(case.pixels, case)
        if other.split != case.split:
            yield f"{case.key} ({case.split}) is the same picture as {other.key} ({other.split})"


def _few(lines: list[str], what: str) -> list[str]:
    """The lines, or the first of them and how many there are."""
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... {len(lines)} {what} in all"]
