"""Described sets of questions, patients and slides: what is read, and what is refused by one clear line."""

import csv
import json

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax.cli import main
from mmkd_jax.data.sources import csv as csv_source
from mmkd_jax.data.sources import named
from mmkd_jax.errors import InputError
from mmkd_jax.evals import given, patient_sets, sets, slide_sets


def describe(root, record, tables):
    """A set with its `set.json`; tables are rows by file name."""
    root.mkdir(exist_ok=True)
    (root / "set.json").write_text(json.dumps({"name": "toy", **record}))
    for name, rows in tables.items():
        if name.endswith(".json"):
            (root / name).write_text(json.dumps(rows))
        else:
            with (root / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="\t" if name.endswith(".txt") else ",")
                writer.writeheader()
                writer.writerows(rows)
    return root


def check(root, capsys):
    code = main(["sets", "check", "toy", "--root", str(root)])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


# ---------------------------------------------------------------- questions

ASKED = {"task": "vqa", "layout": {"source": "questions", "input": "qa.json", "image": "imgs/{img}",
                                   "columns": {"image_id": "img", "split": "part"}}}  # fmt: skip


def questions(root, change=None, **layout):
    """Eight pictures with a closed and an open question each; `change` is of the first row."""
    rows = []
    for number in range(8):
        for kind, question, answer in (("CLOSED", "Is it?", "Yes"), ("OPEN ", "What is it?", f"mass {number % 3}")):
            about = {"img": f"{number}.png", "part": "test" if number > 5 else "train", "lang": "en"}
            rows.append({"question": question, "answer": answer, "answer_type": kind, **about})
    rows.append({**rows[0], "lang": "zh", "answer_type": "CLOSED"})
    rows[0] |= change or {}
    describe(root, {**ASKED, "layout": ASKED["layout"] | {"where": {"lang": "en"}} | layout}, {"qa.json": rows})
    (root / "imgs").mkdir(exist_ok=True)
    for number in range(8):
        (root / "imgs" / f"{number}.png").write_bytes(toy.picture(number))
    return root


def test_questions_of_a_picture_are_one_record(tmp_path, capsys):
    root = questions(tmp_path / "set")
    code, lines, _ = check(root, capsys)
    assert code == 0
    assert [line.split() for line in lines[:4]] == [
        ["train", "test"], ["closed", "6", "2"], ["open", "6", "2"], ["pictures", "6", "2"]
    ]  # fmt: skip
    record = sets.find("toy", str(root))
    first = next(iter(sets.open_set(record, str(root)).records()))
    assert (first.key, first.group, first.split) == ("0.png", "0.png", "train")
    asked = [(one["question"], one["answer"], one["answer_type"]) for one in first.extra["qa"]]
    assert asked == [("Is it?", "Yes", "closed"), ("What is it?", "mass 0", "open")]
    pairs = given.pairs_of({"toy": str(root)}, tmp_path / "kept")
    assert len(pairs.rows("toy.test")) == 2
    assert pairs.read(0).extra["qa"] == first.extra["qa"]


def test_a_picture_in_two_splits_is_told_and_a_made_split_mends_it(tmp_path, capsys):
    root = questions(tmp_path / "set", {"part": "test"})
    code, lines, _ = check(root, capsys)
    assert code == 0
    assert "problem: group '0.png' is in the splits test, train" in lines
    record = json.loads((root / "set.json").read_text())
    (root / "set.json").write_text(json.dumps(record | {"split": {"test": 0.25}}))
    code, lines, _ = check(root, capsys)
    assert lines[-1] == "toy can be evaluated; no problems"
    assert [line.split()[-1] for line in lines[1:4]] == ["2", "2", "2"]


def test_answers_that_say_no_type_are_closed_where_few_can_be_given(tmp_path, capsys):
    root = questions(tmp_path / "set")
    rows = json.loads((root / "qa.json").read_text())
    (root / "qa.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "answer_type"} for row in rows]))
    _, lines, _ = check(root, capsys)
    assert [line.split()[0] for line in lines[1:3]] == ["closed", "open"]
    rows = [{k: v for k, v in row.items() if k != "answer_type"} | {"A": "a", "B": "b"} for row in rows]
    (root / "qa.json").write_text(json.dumps(rows))
    record = json.loads((root / "set.json").read_text())
    record["layout"]["options"] = ["A", "B"]
    (root / "set.json").write_text(json.dumps(record))
    _, lines, _ = check(root, capsys)
    assert [line.split() for line in lines[1:3]] == [["closed", "12", "4"], ["pictures", "6", "2"]]


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"answer_type": "maybe"}, {}, "qa.json, row 1: the answer type 'maybe' is neither closed nor open"),
        ({"question": " "}, {}, "qa.json, row 1: the question is empty"),
        ({"answer": ""}, {}, "qa.json, row 1: the answer is empty"),
        ({}, {"columns": {"image_id": "pic"}}, "qa.json has no column 'pic'"),
        ({}, {"where": {"language": "en"}}, "has no column 'language'; did you mean"),
        ({}, {"input": "absent.json"}, "holds no absent.json, which its layout says"),
        ({}, {"image": "imgs/{picture}"}, "there is no 'picture' for the path"),
        ({}, {"image_column": "img"}, "source 'mmkd_jax.evals.question_sets' has no option 'image_column'"),
    ],
)
def test_wrong_questions_are_one_clear_line(change, layout, message, tmp_path, capsys):
    code, _, error = check(questions(tmp_path / "set", change, **layout), capsys)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_type_of_its_own_may_be_named(tmp_path, capsys):
    root = questions(tmp_path / "set", {"answer_type": "yes/no"}, types={"yes/no": "closed"})
    assert check(root, capsys)[0] == 0


# ---------------------------------------------------------------- patients

PATIENTS = {"task": "survival", "layout": {
    "source": "patients", "input": "data.txt", "columns": {"patient": "PATIENT", "time": "MONTHS", "event": "STATUS"},
    "events": {"1:DECEASED": 1, "0:LIVING": 0}, "covariates": {"AGE": [], "STAGE": ["I", "II"]},
    "bag": "features/{SLIDE.stem}.npy"}}  # fmt: skip


def patients(root, change=None, **layout):
    """Six patients, the first with two slides; `change` is of the second row."""
    rows = [
        {"PATIENT": f"p{max(k - 1, 0)}", "MONTHS": f"{2.5 + max(k - 1, 0)}", "AGE": "" if k == 3 else str(50 + k),
         "STATUS": "0:LIVING" if k % 2 and k > 1 else "1:DECEASED", "STAGE": "I" if k % 2 else "unknown",
         "SLIDE": f"s{k}.svs"}
        for k in range(7)
    ]  # fmt: skip
    rows[1] |= change or {}
    describe(root, {**PATIENTS, "layout": PATIENTS["layout"] | layout}, {"data.txt": rows})
    text = (root / "data.txt").read_text()
    (root / "data.txt").write_text("#Patient\tfirst line of cBioPortal\n#more\n" + text)
    (root / "features").mkdir(exist_ok=True)
    for k in range(7):
        np.save(root / "features" / f"s{k}.npy", np.zeros((1, 2), np.float32))
    return root


def test_patients_are_read_with_their_slides(tmp_path, capsys):
    root = patients(tmp_path / "set")
    cohort = patient_sets.read(sets.find("toy", str(root)), str(root))
    assert cohort.patients.ids.tolist() == [f"p{k}" for k in range(6)]
    assert cohort.patients.outcomes.time.tolist() == [2.5 + k for k in range(6)]
    assert cohort.patients.outcomes.event.tolist() == [True, True, False, True, False, True]
    assert cohort.bags[0] == ("features/s0.npy", "features/s1.npy")
    np.testing.assert_array_equal(cohort.patients.covariates[:, 0], [50, 52, np.nan, 54, 55, 56])
    np.testing.assert_array_equal(cohort.patients.covariates[:, 1], [np.nan, np.nan, 0, np.nan, 0, np.nan])
    code, lines, _ = check(root, capsys)
    assert (code, lines[0]) == (0, "patients 6, events 4, times 2.5 to 7.5")
    (root / "features" / "s4.npy").unlink()
    assert "problem: features/s4.npy is not there" in check(root, capsys)[1]


def test_patients_without_time_are_left_out_and_told(tmp_path, capsys):
    root = patients(tmp_path / "set", {"PATIENT": "p9", "MONTHS": "NA"})
    _, lines, _ = check(root, capsys)
    assert lines[0].startswith("patients 6,")
    assert any(line.endswith("data.txt, row 2: no time or no event") for line in lines)


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"STATUS": "dead"}, {}, "data.txt, row 2: the event 'dead' is unknown"),
        ({"PATIENT": "p9", "MONTHS": "0"}, {}, "row 2: the time is 0, not above zero"),
        ({"PATIENT": "p9", "MONTHS": "-3"}, {}, "row 2: the time is -3, not above zero"),
        ({"PATIENT": "p9", "MONTHS": "long"}, {}, "row 2: the time 'long' is no number"),
        ({"PATIENT": "p9", "MONTHS": "nan"}, {}, "row 2: the time is nan, not above zero"),
        ({"MONTHS": "9"}, {}, "row 2: another time or event than in"),
        ({"AGE": "old", "PATIENT": "p9"}, {}, "row 2: AGE is 'old', no number; give its levels in order"),
        ({"PATIENT": ""}, {}, "row 2: the patient has no name"),
        ({}, {"columns": {"patient": "PATIENTS", "time": "MONTHS", "event": "STATUS"}}, "no column 'PATIENTS'; did"),
        ({}, {"columns": {"patient": "PATIENT"}}, "no column 'time'"),
        ({}, {"unit": "years"}, "must be months or days, not 'years'"),
        ({}, {"covariate": {}}, "the source 'patients' has no option 'covariate'; did you mean 'covariates'"),
        ({}, {"source": "csv"}, "the source 'csv' is not for the task survival: it must be 'patients'"),
    ],
)  # fmt: skip
def test_wrong_patients_are_one_clear_line(change, layout, message, tmp_path, capsys):
    code, _, error = check(patients(tmp_path / "set", change, **layout), capsys)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_table_is_not_taken_for_pictures(tmp_path, capsys):
    root = patients(tmp_path / "set")
    assert main(["eval", "--checkpoint", "x", "--out", str(tmp_path / "out"), "--set", f"toy={root}"]) == 2
    assert "set toy is a table for survival, not pictures; evaluate it in a suite" in capsys.readouterr().err


# ---------------------------------------------------------------- slides

SLIDES = {"task": "diagnosis", "classes": {"neg": "no tumor", "pos": "tumor", "pN1": ""}, "layout": {
    "source": "slides", "input": "s.csv", "columns": {"slide": "id", "label": "stage", "split": "part"},
    "bag": "slides/{id}.tif", "patient": "(p\\d+)_"}}  # fmt: skip


def slides(root, change=None, record=None, **layout):
    """Twelve slides of six patients, and a row that is of a patient; `change` is of the first row."""
    rows = [
        {"id": f"p{k // 2}_{k}", "stage": ("neg", "pos")[k % 2], "part": "test" if k > 7 else "train"}
        for k in range(12)
    ]
    rows.append({"id": "p0", "stage": "pN1", "part": "train"})
    rows[0] |= change or {}
    describe(root, {**SLIDES, **(record or {}), "layout": SLIDES["layout"] | layout}, {"s.csv": rows})
    (root / "slides").mkdir(exist_ok=True)
    for k in range(12):
        (root / "slides" / f"p{k // 2}_{k}.tif").write_bytes(b"x")
    return root


def test_slides_are_read_with_their_patients(tmp_path, capsys):
    root = slides(tmp_path / "set")
    found = list(slide_sets.read(sets.find("toy", str(root)), str(root)))
    assert [(one.slide, one.patient, one.label, one.split) for one in found[:2]] == [
        ("p0_0", "p0", 0, "train"), ("p0_1", "p0", 1, "train")
    ]  # fmt: skip
    code, lines, _ = check(root, capsys)
    assert code == 0
    assert [line.split()[-2:] for line in lines[1:4]] == [["4", "2"], ["4", "2"], ["8", "4"]]
    assert lines[-1] == "toy can be evaluated; no problems"
    _, lines, _ = check(slides(tmp_path / "set", {"part": "test"}), capsys)
    assert "problem: patient 'p0' is in the splits test, train" in lines
    slides(tmp_path / "set", record={"split": {"test": 0.5}})
    made = list(slide_sets.read(sets.find("toy", str(root)), str(root)))
    assert len({(one.patient, one.split) for one in made}) == 6


def test_slides_whose_paths_say_all(tmp_path):
    record = {**SLIDES, "layout": {"source": "slides", "files": "*/*.tif", "label": "/(neg|pos)_", "split": "^(\\w+)/"}}
    root = describe(tmp_path / "set", record, {})
    for part in ("train", "test"):
        (root / part).mkdir()
        for word in ("neg", "pos"):
            (root / part / f"{word}_1.tif").write_bytes(b"x")
    found = list(slide_sets.read(sets.find("toy", str(root)), str(root)))
    assert [(one.slide, one.label, one.split) for one in found] == [
        ("test/neg_1.tif", 0, "test"), ("test/pos_1.tif", 1, "test"),
        ("train/neg_1.tif", 0, "train"), ("train/pos_1.tif", 1, "train"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "layout", "record", "message"),
    [
        ({"stage": "positive"}, {}, {}, "slide p0_0: label 'positive' is not one of the 2 classes; did you mean"),
        ({"id": "p0_1"}, {}, {}, "the slide 'p0_1' comes twice"),
        ({}, {"bag": "slides/{slide_id}.tif"}, {}, "there is no 'slide_id' for the path"),
        ({}, {"patient": "(q\\d+)_"}, {}, "finds nothing in it"),
        ({}, {"patient": "(p"}, {}, "is not a regular expression"),
        ({}, {"files": "*"}, {}, "layout needs either bag"),
        ({}, {}, {"classes": ["a"]}, "1 class names; at least two"),
        ({}, {}, {"task": "classification"}, "the source 'slides' is not for the task classification"),
    ],
)
def test_wrong_slides_are_one_clear_line(change, layout, record, message, tmp_path, capsys):
    code, _, error = check(slides(tmp_path / "set", change, record, **layout), capsys)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_missing_slides_are_counted(tmp_path, capsys):
    root = slides(tmp_path / "set")
    (root / "slides" / "p0_0.tif").unlink()
    code, lines, _ = check(root, capsys)
    assert code == 2
    assert "cannot be evaluated: 1 of 12 slides are not there, more than 5%" in lines


# ---------------------------------------------------------------- pictures


def test_columns_by_number_and_classes_in_columns(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("a,b,c\nx.png,0.0,1.0\ny.png,1,1\nz.png,0,0\n")
    for name in "xyz":
        (tmp_path / f"{name}.png").write_bytes(toy.picture(ord(name)))
    found = list(csv_source.records([str(table)], image="#0", one_of=["b", "c"]))
    assert [(one.key, one.label) for one in found] == [("x.png", "c"), ("y.png", "b"), ("z.png", "")]
    found = list(csv_source.records([str(table)], image="a", columns={"label": "#2"}))
    assert [one.label for one in found] == ["1.0", "1", "0"]
    for wrong in ({"image": "#3"}, {"image": "a", "one_of": ["b", "d"]}, {"image": "a", "columns": {"label": "#9"}}):
        with pytest.raises(InputError, match="has no column"):
            list(csv_source.records([str(table)], **wrong))


def test_names_that_say_their_class(tmp_path):
    for name in ("train/1_A.png", "test/2_B.png", "test/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(toy.picture(1))
    options = {"label": "_([AB])\\.", "split": "^(\\w+)/"}
    found = list(named.records([str(tmp_path)], **options))
    assert [(one.key, one.label, one.split) for one in found] == [
        ("test/2_B.png", "B", "test"), ("train/1_A.png", "A", "train")
    ]  # fmt: skip
    assert named.classes([str(tmp_path)], **options) == {tmp_path.name: ["A", "B"]}
    with pytest.raises(InputError, match=r"2_B.png: the expression for label, '_A', finds nothing"):
        list(named.records([str(tmp_path)], label="_A"))
    with pytest.raises(InputError, match="needs folders of pictures and label"):
        list(named.records([str(tmp_path)]))
