"""Survival from a table of patients: clinical columns, further tables of numbers, and features of slides.

    mmkd eval --config configs/survival.py --config.root=DATA/tcga_survival --out RUN
    mmkd eval --config configs/survival.py:genes --config.root=DATA/tcga_survival --out RUN
    mmkd eval --config configs/survival.py --config.root=DIR --config.slides=DIR/features --out RUN

The defaults read the tables of TCGA that SurvPath published (github.com/mahmoodlab/SurvPath, datasets_csv): overall
survival, age, sex and stage, the published folds. The argument `genes` compares with and without gene expressions, on
the patients that have them. Any other table is named by overriding fields.
"""

from ml_collections import ConfigDict

from mmkd_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, genes=False, smoke=False)
    config = ConfigDict()
    config.task = "survival"
    config.name = "tcga"
    config.root = ""  # folder of the tables
    config.table = "survival.csv"
    config.id, config.time, config.event = "case_id", "os_months", "os_event"
    config.unit = "months"
    # Cohorts: values of a column, each evaluated by itself.
    config.cohort = "cohort"
    config.cohorts = ("TCGA-BLCA", "TCGA-BRCA", "TCGA-COADREAD", "TCGA-HNSC", "TCGA-STAD")
    # Covariates called `clinical`: columns of numbers, or COLUMN=LEVEL,LEVEL,... in order.
    config.clinical = ("age", "is_female", "stage=I,II,III,IV")
    # Further covariates, NAME=FILE: all columns of numbers in a table with the same ids.
    config.tables = ()
    # What is compared, on the patients that have all of it: covariates joined by +; `slides` are the means of features.
    config.cox = ("clinical",)
    config.mil = ()  # the same by gated attention with hazards: `slides`, or covariates as a bag of one
    # Folds: a column, or made with the sites of a column whole.
    config.fold = "official_fold"
    config.site = "tissue_source_site"
    config.folds = 5
    # Slides: folder of features, SLIDE.npy float16 or float32 [patches, width]; their names, joined by ; , in a column.
    config.slides = ""
    config.slide_column = "slide_ids"
    config.times = (12.0, 36.0, 60.0)  # at which the AUC is told
    config.l1_ratio = 0.0  # of the penalty: 0 ridge, above an elastic net
    config.strengths = (0.01, 0.03, 0.1, 0.3, 1.0)
    config.heads = ConfigDict({"bins": 4, "steps": 200, "batch": 16, "lr": 1e-3, "checkpoints": 4, "hidden": 64,
                               "attention": 32, "dropout": 0.25, "decay": 1e-2, "alpha": 0.0})  # fmt: skip
    if args.genes:
        config.name = "tcga_genes"
        config.cohorts = ("TCGA-BLCA", "TCGA-COADREAD", "TCGA-STAD")
        config.tables = ("genes=expression_top300.csv",)
        config.cox = ("clinical", "genes", "clinical+genes")
        config.strengths = (0.1, 0.3, 1.0, 3.0, 10.0)  # 300 covariates need more than six do
        config.mil = ("clinical+genes",)
    if args.smoke:
        config.strengths, config.heads.steps, config.heads.checkpoints = (0.1,), 20, 2
    return config
