"""Described sets: records, `mmkd sets`, and evaluating sets as they lie."""

import csv
import json
import re
from collections import Counter

import data_fixtures as toy
import numpy as np
import pytest
import set_fixtures
import set_layouts
from test_evals_sets import Pixels

from mmkd_jax.cli import main
from mmkd_jax.data.ingest import ingest
from mmkd_jax.data.pairs import PairsSet, pair_id
from mmkd_jax.errors import InputError
from mmkd_jax.evals import given, patient_sets, prompts, results, set_check, sets, slide_sets, table_check

RECORD = {"name": "toy", "layout": {"source": "folders"}, "classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clases": ["a"]}, "there is no field 'clases'; did you mean 'classes'"),
        ({"name": "no name"}, "the name 'no name' must be letters"),
        ({"name": 3}, "name must be text"),
        ({"layout": "folders"}, "layout must be an object"),
        ({"task": "multilable"}, "did you mean 'multilabel'"),
        ({"classes": ["a", "a"]}, "the class 'a' comes twice"),
        ({"classes": ["a"]}, "1 class names; at least two"),
        ({"split": {"test": 1.5}}, "the fraction of test is 1.5"),
        ({"split": {"test": 0.6, "val": 0.6}}, "must not add up to more than 1"),
        ({"prompts": {"template": ["{}"]}}, "prompts: must be"),
        ({"prompts": {"templates": ["no place"]}}, "prompts: the prompt template 'no place'"),
        ({"prompts": {"templates": ["{}"], "synonyms": {"c": ["d"]}}}, "'c', not a class"),
        ({"prompts": {"sentences": {"a": ["it is a"]}}}, "no prompts are given for the class 'b'"),
        ({"modality": None}, "modality must be text"),
    ],
)
def test_a_wrong_record_is_one_clear_line(change, message, tmp_path, capsys):
    sets.read(RECORD, "r")  # is right without the change
    (tmp_path / "set.json").write_text(json.dumps(RECORD | change))
    assert main(["sets", "check", str(tmp_path / "set.json"), "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "set.json" in error
    assert error.count("\n") == 1


def test_the_record_in_the_documents_is_right(repository):
    (text,) = re.findall(r"```json\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    record = sets.read(json.loads(text), "README.md")
    assert record.classes.number("nv") == 1
    assert record.split == {"test": 0.2}


def check(root, capsys, name="toy"):
    code = main(["sets", "check", name, "--root", str(root)])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_check_counts(tmp_path, capsys):
    code, lines, _ = check(set_layouts.describe(tmp_path / "set", "folders"), capsys)
    assert code == 0
    assert lines[0].split() == ["train", "val", "test"]
    truth = [[sum(c["label"] == name and c["split"] == s for c in set_layouts.rows()) for s in ("train", "val", "test")]
             for name in set_layouts.CLASSES]  # fmt: skip
    assert [[int(n) for n in line.split()[-3:]] for line in lines[1:4]] == truth
    assert lines[4].split() == ["pictures", "12", "6", "6"]
    assert sum(line.startswith("sample: test ") for line in lines) == 3
    assert lines[-1] == "toy can be evaluated; no problems"


def plant(root, *steps):
    """The set of class folders with something done to it."""
    set_layouts.describe(root, "folders")
    for step in steps:
        step(root)
    return root


def copy(root):
    place = root / "test" / "normal" / "p99"
    place.mkdir()
    (place / "99.png").write_bytes((root / "train" / "normal" / "p01" / "02.png").read_bytes())


def divide(root):
    """One of the two pictures of a patient goes to another split."""
    place = root / "test" / "normal" / "p01"
    place.mkdir()
    (root / "train" / "normal" / "p01" / "02.png").rename(place / "02.png")


def empty(root):
    for file in (root / "test" / "normal").rglob("*.png"):
        file.unlink()


def damage(root, count=1):
    for file in sorted((root / "train").rglob("*.png"))[:count]:
        file.write_bytes(b"\x89PNG\r\n\x1a\n and no more")


def describe_again(**fields):
    def step(root):
        record = json.loads((root / "set.json").read_text())
        (root / "set.json").write_text(json.dumps({k: v for k, v in (record | fields).items() if v is not None}))

    return step


@pytest.mark.parametrize(
    ("step", "code", "line"),
    [
        (copy, 0, r"problem: train/normal/p01/02.png \(train\) is the same picture as .*99.png \(test\)"),
        (divide, 0, r"problem: group 'p01' is in the splits test, train"),
        (empty, 0, r"problem: class 'normal' is absent in split test"),
        (damage, 0, r"problem: train/benign mass/p00/00.png: .*"),
        (lambda root: damage(root, 4), 2, r"cannot be evaluated: 4 of 24 pictures cannot be used, more than 5%"),
        (describe_again(size={"train": 13}), 0, r"problem: split train has 12 pictures, the record says 13"),
        (describe_again(classes=["benign mass", "normal"]), 2, r"cannot .*: .*'malignant mass' is not one of.*"),
        (lambda root: (root / "test").rename(root / "dev"), 2, r"cannot .*: there is no split test.* train, val"),
        (describe_again(split={"val": 0.5}), 2, r"cannot be evaluated: there is no split test.* only train, val"),
        (describe_again(task="retrieval", classes=None), 2, r"cannot be evaluated: no picture .* has a caption"),
    ],
)  # fmt: skip
def test_check_finds_what_is_wrong(step, code, line, tmp_path, capsys):
    assert not any(re.fullmatch(line, found) for found in check(plant(tmp_path / "right"), capsys)[1])
    left, lines, error = check(plant(tmp_path / "wrong", step), capsys)
    assert left == code
    assert any(re.fullmatch(line, found) for found in lines), lines
    assert error == ""


def test_check_of_splits_that_are_made(tmp_path, capsys):
    root = plant(tmp_path / "set", describe_again(split={"test": 0.5}))
    code, lines, _ = check(root, capsys)
    assert code == 0
    assert lines[0].split() == ["train", "test"]
    ingested = given.pairs_of({"toy": str(root)}, tmp_path / "kept")
    assert [int(n) for n in lines[4].split()[1:]] == [len(ingested.rows(f"toy.{s}")) for s in ("train", "test")]
    record = sets.find("toy", str(root))
    cases = set_check.check(record, sets.open_set(record, str(root))).cases
    tested = set(ingested.ids(ingested.rows("toy.test").rows))
    assert {pair_id("toy", case.key) for case in cases if case.split == "test"} == tested


def test_wrong_sets_on_the_command_line(tmp_path, capsys):
    for line, message in [
        (["check", "toi", "--root", str(tmp_path)], "no set 'toi' is known"),
        (["check", "busi", "--root", str(tmp_path / "none")], "set busi: "),
        (["check", "pathmnist", "--root", str(tmp_path)], "holds no pathmnist*.npz"),
        (["show", "pathmnst"], "did you mean 'pathmnist'"),
    ]:
        assert main(["sets", *line]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for name in ("pathmnist.npz", "pathmnist_64.npz"):
        (tmp_path / name).write_bytes(b"")
    assert main(["sets", "check", "pathmnist", "--root", str(tmp_path)]) == 2
    assert "holds 2 of pathmnist*.npz; give one of them" in capsys.readouterr().err


def test_list_and_show(capsys):
    assert main(["sets", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in listed} == set(sets.known())
    assert main(["sets", "show", "chestxray14"]) == 0
    shown = capsys.readouterr().out
    assert "pleural effusion (Effusion in the files)" in shown
    assert "[from memory]" in shown
    assert main(["sets", "show", "camelyon17"]) == 0
    shown = capsys.readouterr().out
    assert "for:       diagnosis" in shown
    assert "[seen: camelyon17.grand-challenge.org/Data]" in shown
    assert main(["sets", "suites"]) == 0
    assert "medmnist12        12 sets" in capsys.readouterr().out


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs `mmkd eval --set ...` with pixels for a model."""
    monkeypatch.setattr("mmkd_jax.api.load", lambda path, name=None: Pixels())
    out = str(tmp_path / "out")
    return lambda *words: main(["eval", "--checkpoint", "x", "--out", out, "--bootstrap", "20", "--set", *words])


def test_sets_are_evaluated_as_they_lie(evaluate, tmp_path, capsys):
    own = {"templates": ["a {}."], "synonyms": {"normal": ["nothing"]}}
    toy_root = set_layouts.describe(tmp_path / "toy", "csv", prompts=own)
    other = set_layouts.describe(tmp_path / "other", "medmnist", name="other")
    assert evaluate(f"toy={toy_root}", f"other={other}") == 0
    rows = results.load(tmp_path / "out" / "results.json")
    assert {(row["dataset"], row["task"]) for row in rows} == {
        (name, task) for name in ("toy", "other") for task in ("zeroshot", "linear_probe")
    }
    hashes = {row["dataset"]: row["context"]["prompt_hash"] for row in rows if row["task"] == "zeroshot"}
    assert hashes["toy"] == prompts.from_record(set_layouts.CLASSES, own).hash
    assert hashes["other"] == prompts.default(set_layouts.CLASSES, "ultrasound").hash
    (kept,) = (tmp_path / "out" / "sets").iterdir()
    made = (kept / "manifest.json").stat().st_mtime_ns
    assert evaluate(f"toy={toy_root}", f"other={other}") == 0
    assert (kept / "manifest.json").stat().st_mtime_ns == made  # nothing was ingested again
    (toy_root / "images" / "00.png").write_bytes(toy.picture(99))
    assert evaluate(f"toy={toy_root}", f"other={other}") == 0
    assert len(list((tmp_path / "out" / "sets").iterdir())) == 2  # a changed picture is another set
    capsys.readouterr()
    for words, message in [
        ([f"toy={toy_root}", f"absent={tmp_path / 'nowhere'}"], "set absent: "),
        ([f"toy={toy_root}", f"nobody={toy_root}"], "no set 'nobody' is known, and"),
        ([f"toy={toy_root}", f"toy={other}"], "--set toy is given twice"),
        (["toy"], "must be NAME=ROOT"),
        ([f"toy={toy_root}", "--pairs", str(kept)], "and not both"),
    ]:
        assert evaluate(*words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_set_without_a_test_split_is_not_left_out(evaluate, tmp_path, capsys):
    right = set_layouts.describe(tmp_path / "toy", "folders")
    wrong = set_layouts.describe(tmp_path / "other", "folders", name="other")
    (wrong / "test").rename(wrong / "dev")
    assert evaluate(f"toy={right}", f"other={wrong}") == 2
    assert "set other has no split test to evaluate on, only train, val" in capsys.readouterr().err
    describe_again(split={"test": 1})(wrong)
    assert evaluate(f"toy={right}", f"other={wrong}") == 0
    rows = results.load(tmp_path / "out" / "results.json")
    assert {row["n"] for row in rows if row["dataset"] == "other"} == {set_layouts.N}


def test_findings_are_evaluated_one_by_one(evaluate, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    with (root / "labels.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["image", "a", "b", "split"])
        for case in set_layouts._files(root):
            number = case["number"]
            table.writerow([case["image"], number % 2, "" if number % 4 == 3 else number % 3 % 2, case["split"]])
    absent = {"templates": ["not {} at all"]}
    record = {
        "name": "toy", "task": "multilabel", "layout": {"source": "csv", "input": "labels.csv", "findings": ["a", "b"]},
        "prompts": {"templates": ["with {}"], "absent": absent},
    }  # fmt: skip
    (root / "set.json").write_text(json.dumps(record))
    assert evaluate(f"toy={root}") == 0
    rows = results.load(tmp_path / "out" / "results.json")
    assert {row["task"] for row in rows} == {"multilabel"}
    tested = [case["number"] for case in set_layouts.rows() if case["split"] == "test"]
    counts = {row["metric"]: row["n"] for row in rows}
    assert counts["auc:a"] == len(tested)
    assert counts["auc:b"] == sum(number % 4 != 3 for number in tested) < len(tested)
    assert rows[0]["context"]["absent_hash"] == prompts.from_record(["a", "b"], absent).hash
    assert rows[0]["context"]["absent_hash"] != prompts.absent(["a", "b"]).hash


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (lambda number: 0, "cannot be evaluated: class 'b' is absent in split test"),
        (lambda number: 1, "cannot be evaluated: no picture of split test is without 'b'"),
        (lambda number: "" if number % 4 == 3 else 1, "cannot be evaluated: no picture of split test is without 'b'"),
        (lambda number: number // 2 % 3 % 2, "toy can be evaluated; no problems"),
    ],
)
def test_findings_need_both_answers(cell, line, evaluate, tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    rows = [f"{c['image']},{c['number'] % 2},{cell(c['number'])},{c['split']}\n" for c in set_layouts._files(root)]
    (root / "labels.csv").write_text("image,a,b,split\n" + "".join(rows))
    layout = {"source": "csv", "input": "labels.csv", "findings": ["a", "b"]}
    (root / "set.json").write_text(json.dumps({"name": "toy", "task": "multilabel", "layout": layout}))
    code, lines, _ = check(root, capsys)
    assert line in lines
    assert evaluate(f"toy={root}") == code  # what is said to be refused is
    error = capsys.readouterr().err
    assert ("b: no AUC exists" in error) == (code == 2)


# ---------------------------------------------------------------- the registry


NINE = {"xray", "ct", "mri", "ultrasound", "histopathology", "fundus", "oct", "dermoscopy", "endoscopy"}
SIX = {"zero-shot classification", "linear probe", "retrieval", "VQA", "survival", "diagnosis"}


def published():
    """Records of sets as their authors give them out, without our samples of them."""
    return [one for one in sets.known().values() if "a sample made from it" not in one.seen("layout")]


def test_the_registry_covers_nine_modalities_and_six_tasks():
    assert len(published()) >= 60
    modalities = Counter(one.modality for one in published())
    assert all(modalities[modality] >= 3 for modality in NINE), modalities
    types = Counter(kind for one in published() for kind in one.types)
    assert set(types) == SIX
    assert all(types[kind] >= 5 for kind in SIX), types


def test_the_readme_counts_the_registry(repository):
    types = Counter(kind for one in published() for kind in one.types)
    assert types["VQA"] == types["survival"] == types["diagnosis"]
    text = " ".join((repository / "README.md").read_text().split())
    assert f"names {len(published())} public sets of nine modalities and six types of task" in text
    counts = (types["zero-shot classification"], types["linear probe"], types["retrieval"], types["VQA"])
    said = "({} for zero-shot classification, {} for linear probes, {} for retrieval, {} each for visual questions"
    assert said.format(*counts) in text


def test_every_field_of_the_registry_says_where_it_is_known_from():
    for one in sets.known().values():
        assert one.modality in {*prompts._data()["modality"], "mixed"}, one.name
        assert one.license, one.name
        assert one.about["citation" if "citation" in one.about else "note"], one.name
        assert one.about.get("title"), one.name
        assert one.about.get("url", "").startswith("https://"), one.name
        assert set(one.evidence) <= {"all", *vars(one), *sets.ABOUT}, one.name
        for field in ("layout", "classes", "license", "url", "citation", "size", "modality", "task"):
            assert one.seen(field).startswith(("seen", "from memory")), (one.name, field)
        for field in ("split", "prompts"):
            assert one.seen(field), (one.name, field)


def test_sentences_of_the_registry_are_for_one_class_each():
    for one in sets.known().values():
        if one.task not in ("classification", "multilabel"):
            continue
        asked = prompts.default(one.classes.names, one.modality, name=one.name, own=one.prompts)
        said = [set(of) for of in asked.sentences]
        assert all(len(set(of)) == len(of) for of in asked.sentences), one.name
        assert sum(map(len, said)) == len(set.union(*said)), one.name


def test_what_is_known_of_the_paper_is_marked_and_nothing_else():
    """Two sets were released with the evaluation code, which names two others; no list of the 58 is public."""
    marked = {name for name, one in sets.known().items() if one.about.get("paper")}
    assert marked == {"lc25000", "unimed_lc25000_lung", "unimed_lc25000_colon", "chestmnist", "unimed_chexpert5x200"}
    assert all(sets.known()[name].seen("paper").startswith("seen: ") for name in marked)


def test_our_wording_is_for_sets_that_are_known():
    assert set(prompts.of_sets()) <= set(sets.known())
    for name in prompts.of_sets():
        one = sets.known()[name]
        assert prompts.default(one.classes.names, one.modality, name=name) != prompts.default(
            one.classes.names, one.modality
        )


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The folder of a record's fixture, made once."""
    folder = tmp_path_factory.mktemp("sets")

    def make(name):
        if not (root := folder / name).exists():
            root.mkdir()
            set_fixtures.write(sets.known()[name], root)
        return root

    return make


PICTURES = [name for name, one in sets.known().items() if one.task not in sets.TABLES]


@pytest.mark.parametrize("name", PICTURES)
def test_every_record_reads_a_set_of_its_layout(name, laid_out):
    one = sets.known()[name]
    found = set_check.check(one, sets.open_set(one, str(laid_out(name))))
    assert found.fatal == []
    assert [line for line in found.problems if "the record says" not in line] == []
    if "group" in one.layout.get("columns", one.layout) and one.task != "vqa":
        assert len({case.group for case in found.cases}) == len(found.cases)
    tested = [case for case in found.cases if case.split in ("test", "val")]
    if one.classes:
        tested = [case for case in tested if case.split == "test"]
        assert {number for case in tested for number in case.what} == set(range(len(one.classes.names)))
    elif one.task == "vqa":
        assert sum(case.closed for case in found.cases) >= len(found.cases)
        assert sum(case.open for case in found.cases) or one.layout.get("options")
    else:
        assert all(case.captions for case in tested)


@pytest.mark.parametrize("name", [name for name, one in sets.known().items() if one.task in sets.TABLES])
def test_every_record_reads_a_table_of_its_layout(name, laid_out):
    one, root = sets.known()[name], str(laid_out(name))
    found = table_check.check(one, root)
    assert found.fatal == []
    assert [line for line in found.problems if "the record says" not in line] == []
    if one.task == "diagnosis":
        assert {slide.label for slide in slide_sets.read(one, root)} == set(range(len(one.classes.names)))
        return
    cohort = patient_sets.read(one, root)
    assert len(cohort.patients) == 12
    assert cohort.patients.outcomes.event.sum() == 6
    assert np.isfinite(cohort.patients.covariates).all()
    assert all(cohort.bags) == ("bag" in one.layout)


@pytest.mark.parametrize(
    "name",
    ["pathmnist", "ham10000", "pcam", "kvasir", "fives", "unimed_acl_mri", "isic2019", "camelyon16", "camelyon17"],
)
def test_a_class_that_the_list_lacks_is_refused(name, laid_out, tmp_path, capsys):
    """Every way in which files say a class: its second one is taken out of the record."""
    one = sets.known()[name]
    lacking = one.classes.names[1]
    words = {word: meant for word, meant in one.classes.words.items() if meant != lacking}
    words |= {"something": "something else"}  # so that there are two
    classes = words if one.classes.words else [meant for meant in one.classes.names if meant != lacking]
    record = {"name": name, "layout": dict(one.layout), "task": one.task, "split": dict(one.split), "classes": classes}
    (tmp_path / "set.json").write_text(json.dumps(record))
    assert main(["sets", "check", str(tmp_path / "set.json"), "--root", str(laid_out(name))]) == 2
    printed = capsys.readouterr()
    assert re.search(r"is not one of the \d+ classes|but only \d+ class names", printed.out + printed.err)


@pytest.mark.parametrize("name", ["busi", "bccd_cells"])
def test_real_sets_are_as_their_records_say(name, mmkd_data, tmp_path, capsys):
    code, lines, _ = check(mmkd_data / name, capsys, name)
    assert (code, lines[-1]) == (0, f"{name} can be evaluated; no problems")
    pairs = given.pairs_of({name: str(mmkd_data / name)}, tmp_path)
    assert isinstance(pairs, PairsSet)
    assert pairs.classes[name] == json.loads((mmkd_data / name / "classes.json").read_text())


def test_a_class_list_of_another_order_is_refused(mmkd_data, tmp_path):
    """Real labels under a list in which two classes have changed places."""
    names = list(sets.known()["busi"].classes.names)
    record = {"name": "busi", "layout": {"source": "webdataset"}, "classes": [names[1], names[0], names[2]]}
    (tmp_path / "set.json").write_text(json.dumps(record))
    one = sets.find(str(tmp_path / "set.json"))
    with pytest.raises(InputError, match="has another order"):
        ingest(sets.open_set(one, str(mmkd_data / "busi")), tmp_path / "out")
