"""Survival in nested folds: sites whole, nothing learned from tested patients, real tables, chance where it must be."""

import numpy as np
import pytest

from mmkd_jax.errors import InputError
from mmkd_jax.evals import survival, survival_folds, survival_table
from mmkd_jax.evals.survival_curves import Outcomes

STAGES = ("I", "II", "III", "IV")
KNOWN = {"BLCA": 0.63, "BRCA": 0.69, "COADREAD": 0.71, "HNSC": 0.56, "STAD": 0.57}  # said beside the tables
RIDGE = (0.1,)


def drawn(n: int = 400, effect: float = 1.5, seed: int = 0):
    """Covariates of which the first shortens lives, and outcomes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    time, end = rng.exponential(np.exp(-effect * x[:, 0])), rng.exponential(2, n)
    return x, Outcomes(time <= end, np.minimum(time, end) + 1e-3), rng.integers(0, 20, n)


@pytest.fixture(scope="module")
def cohorts(mmkd_data):
    path = mmkd_data / "tcga_survival" / "survival.csv"
    if not path.exists():
        pytest.skip("needs the tables of TCGA survival")
    covariates = {"age": (), "is_female": (), "stage": STAGES}
    names = {"id": "case_id", "time": "os_months", "event": "os_event", "covariates": covariates}
    columns = ["official_fold", "tissue_source_site"]
    return {
        name: survival_table.read(path, **names, columns=columns, where={"cohort": f"TCGA-{name}"}) for name in KNOWN
    }


@pytest.mark.parametrize("name", KNOWN)
def test_real_cohorts(cohorts, name):
    """Age, sex and stage on the published folds: the C-index that comes with the tables, whose ridge is not told."""
    patients = cohorts[name]
    folds = list(survival_folds.nested(patients.columns["official_fold"], patients.outcomes, patients.ids))
    scored = survival.run(patients.covariates, patients.outcomes, folds, strengths=RIDGE, resamples=200)
    assert abs(scored.metrics["c_index"] - KNOWN[name]) < 0.02
    assert all(np.isfinite(value) for value in scored.metrics.values())
    low, high = scored.c_index.interval()
    assert low < scored.metrics["c_index"] < high


def test_sites_of_real_cohorts_stay_whole(cohorts):
    patients = cohorts["BRCA"]
    sites = patients.columns["tissue_source_site"]
    fold = survival_folds.site_folds(patients.outcomes, sites)
    assert set(fold) == set(range(5))
    assert all(len(set(fold[sites == site])) == 1 for site in set(sites))
    events = np.bincount(fold, patients.outcomes.event)
    largest = max(patients.outcomes.event[sites == site].sum() for site in set(sites))
    assert events.max() <= max(largest, 1.2 * events.mean())  # no fold has more than its share, but for one large site


def test_folds_depend_on_the_seed_alone():
    _, outcomes, sites = drawn()
    same, other = (survival_folds.site_folds(outcomes, sites, seed=seed) for seed in (0, 1))
    assert np.array_equal(same, survival_folds.site_folds(outcomes, sites))
    assert not np.array_equal(same, other)


def test_a_signal_is_found_and_permuted_outcomes_give_chance():
    x, outcomes, sites = drawn()
    folds = list(survival_folds.nested(survival_folds.site_folds(outcomes, sites), outcomes, np.arange(len(x))))
    found = survival.run(x, outcomes, folds, resamples=300)
    assert found.c_index.interval()[0] > 0.65
    assert found.log_rank[1] < 1e-6
    inside = []
    for seed in range(6):
        permuted = outcomes[np.random.default_rng(seed).permutation(len(x))]
        chance = survival.run(x, permuted, folds, strengths=RIDGE, resamples=300)
        inside.append(chance.c_index.interval()[0] < 0.5 < chance.c_index.interval()[1])
    assert sum(inside) >= 5  # 95 % intervals


def test_nothing_is_learned_from_the_tested_fold():
    """Other outcomes and covariates of one fold's patients change nothing about the risks of that fold but theirs."""
    x, outcomes, sites = drawn()
    fold = survival_folds.site_folds(outcomes, sites)
    changed = outcomes.time.copy()
    changed[fold == 2] = changed[fold == 2][::-1] * 3
    risks = []
    for times in (outcomes.time, changed):
        now = Outcomes(outcomes.event, times)
        tested = [one for one in survival_folds.nested(fold, now, np.arange(len(x))) if one.name == "2"]
        risks.append(survival.run(x, now, tested, resamples=2).risk[fold == 2])
    assert np.array_equal(*risks)
    moved = x.copy()
    moved[fold == 2] += 100
    tested = [one for one in survival_folds.nested(fold, outcomes, np.arange(len(x))) if one.name == "2"]
    shifted = survival.run(moved, outcomes, tested, resamples=2).risk[fold == 2]
    assert np.allclose(np.diff(shifted), np.diff(risks[0]))  # scales come from the others: a shift stays a shift


def test_paired_difference():
    x, outcomes, sites = drawn()
    folds = list(survival_folds.nested(survival_folds.site_folds(outcomes, sites), outcomes, np.arange(len(x))))
    full, less = (survival.run(part, outcomes, folds, resamples=300) for part in (x, x[:, 1:]))
    gain = survival.difference(full, less)
    assert gain.interval()[0] > 0.1
    assert survival.difference(full, full).interval() == (0, 0)


def test_bins_hold_their_left_edge_and_equal_shares():
    train = Outcomes([1] * 8 + [0] * 4, [1, 2, 3, 4, 5, 6, 7, 8, 90, 91, 92, 93])
    edges = survival_folds.bins(train, 4)
    assert edges.tolist() == [2.75, 4.5, 6.25]
    assert np.bincount(survival_folds.bin_of(train.time[:8], edges)).tolist() == [2, 2, 2, 2]
    assert survival_folds.bin_of([0.1, 2.75, 2.7499, 99], edges).tolist() == [0, 1, 0, 3]
    for event in ([0] * 12, [1] + [0] * 11):
        with pytest.raises(InputError, match="do not fill 4 bins"):
            survival_folds.bins(Outcomes(event, train.time), 4)


def test_folds_that_cannot_be():
    _, outcomes, sites = drawn(60)
    with pytest.raises(InputError, match="4 sites cannot be shared out among 5"):
        survival_folds.site_folds(outcomes, sites % 4)
    one = Outcomes(np.arange(60) < 2, outcomes.time)
    with pytest.raises(InputError, match="leave a fold without events"):
        survival_folds.site_folds(one, sites)
    fold = np.arange(60) % 5
    with pytest.raises(InputError, match="patient '7' is in two folds"):
        list(survival_folds.nested(fold, outcomes, np.where(np.arange(60) == 20, 7, np.arange(60))))
    with pytest.raises(InputError, match="fold 3 has no event"):
        list(survival_folds.nested(fold, Outcomes(outcomes.event & (fold != 3), outcomes.time), np.arange(60)))
    with pytest.raises(InputError, match="nested folds need three"):
        list(survival_folds.nested(fold % 2, outcomes, np.arange(60)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "months"}, "no column 'months'; did you mean 'os_months'"),
        ({"covariates": {"stage": ()}}, "'II', which is no number; give its levels"),
        ({"covariates": {"stage": ("A", "B")}}, "none of its levels A, B"),
        ({"where": {"cohort": "nowhere"}}, "no row where"),
        ({"event": "kind"}, "choose one event where several compete"),
        ({"time": "early"}, "row 1 has 0"),
        ({"id": "cohort"}, "patient 'x' has several rows"),
    ],
)
def test_wrong_tables(tmp_path, change, message):
    path = tmp_path / "t.csv"
    path.write_text("id,cohort,os_months,os_event,stage,kind,early\na,x,1.5,1,II,1,1\nb,x,2,0,,2,0\nc,y,3,1,I,0,2\n")
    usual = {"id": "id", "time": "os_months", "event": "os_event", "covariates": {"stage": STAGES}}
    found = survival_table.read(path, **usual)
    assert np.array_equal(found.covariates[:, 0], [1, np.nan, 0], equal_nan=True)
    with pytest.raises(InputError, match=message):
        survival_table.read(path, **{**usual, **change})
