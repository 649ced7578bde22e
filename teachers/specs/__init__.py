"""What is known of published biomedical CLIP models: one record a teacher, because weights do not say it.

Each says where its statements were read, and which could not be checked against the published weights or config. A
folder in open_clip's layout describes itself; these records serve bare weight files, and give folders their licence
and source.
"""

import json

from mmkd_jax import registry
from mmkd_jax.errors import InputError
from teachers.specs.facts import Fact, Facts, known, likely

__all__ = ["TEACHERS", "Fact", "Facts", "find", "known", "likely", "markdown", "page", "table"]

# The nine of MMKD-CLIP with their variants, and the student that was published.
TEACHERS = {
    "BMC-CLIP": "teachers.specs.clip.BMC_CLIP",
    "BiomedCLIP": "teachers.specs.bert.BIOMEDCLIP",
    "UniMed-CLIP": "teachers.specs.bert.UNIMED_CLIP",
    "QuiltNet-B-32": "teachers.specs.clip.QUILTNET_B32",
    "QuiltNet-B-16": "teachers.specs.clip.QUILTNET_B16",
    "QuiltNet-B-16-PMB": "teachers.specs.bert.QUILTNET_B16_PMB",
    "GenMedClip": "teachers.specs.clip.GENMEDCLIP",
    "GenMedClip-B-16": "teachers.specs.clip.GENMEDCLIP_B16",
    "GenMedClip-B-32": "teachers.specs.clip.GENMEDCLIP_B32",
    "GenMedClip-B-16-PMB": "teachers.specs.bert.GENMEDCLIP_B16_PMB",
    "PLIP": "teachers.specs.clip.PLIP",
    "PubMedCLIP": "teachers.specs.clip.PUBMEDCLIP",
    "PubMedCLIP-ImageNet": "teachers.specs.clip.PUBMEDCLIP_IMAGENET",
    "PubMedCLIP-HF": "teachers.specs.clip.PUBMEDCLIP_HF",
    "PMC-CLIP": "teachers.specs.cnn.PMC_CLIP",
    "PMC-CLIP-pooler": "teachers.specs.cnn.PMC_CLIP_POOLER",
    "PMC-CLIP-masked": "teachers.specs.cnn.PMC_CLIP_MASKED",
    "MedCLIP-ViT": "teachers.specs.cnn.MEDCLIP_VIT",
    "MedCLIP-ResNet": "teachers.specs.cnn.MEDCLIP_RESNET",
    "MMKD-CLIP": "teachers.specs.bert.MMKD_CLIP",
}
COLUMNS = ("name", "image tower", "text tower", "width", "licence", "not verified", "source")


def find(name: str) -> Facts:
    """The record of `name`; a dotted path (`my_lab.teachers.OURS`) names one of one's own.

    Raises:
      InputError: there is none; near names are told.
    """
    facts = registry.resolve(name, TEACHERS, "teacher")
    if not isinstance(facts, Facts):
        raise InputError(f"teacher {name!r} is a {type(facts).__name__}, not teachers.specs.Facts")
    return facts


def table() -> str:
    """One line a teacher, in columns."""
    rows = [row[:5] + row[6:] for row in _rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown() -> str:
    """The table of `teachers/README.md`."""
    rows = _rows()
    lines = [rows[0], ["---"] * len(COLUMNS), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(name: str) -> str:
    """All that is known of one teacher: for people first, then its spec as JSON."""
    facts = find(name)
    spec = facts.spec
    lines = [
        spec.name,
        f"  source   {spec.source}",
        f"  weights  {facts.weights}",
        f"  names    layout {facts.layout}",
        f"  licence  {spec.license}{f' ({facts.terms})' if facts.terms else ''}",
        f"  for      {', '.join(spec.modalities)}",
        "verified",
        *(f"  {fact.about}: {fact.source}" for fact in facts.verified),
        "not verified",
        *([f"  {fact.about}: {fact.source}" for fact in facts.unverified] or ["  nothing"]),
        json.dumps(spec.to_dict(), indent=2),
    ]
    return "\n".join(lines)


def _rows() -> list[list[str]]:
    """The cells of the tables."""
    rows = [list(COLUMNS)]
    for name in TEACHERS:
        facts = find(name)
        spec, text = facts.spec, facts.spec.text
        tower = f"{'BERT' if text.kind == 'bert' else 'CLIP'}, {text.context} tokens, {text.pooling}"
        doubts = "; ".join(fact.about for fact in facts.unverified) or "nothing"
        rows.append([spec.name, spec.image.title, tower, str(spec.embed), spec.license, doubts, spec.source])
    return rows
