"""The form of a record: what a published model is, and for each statement where it was read and how sure it is."""

import dataclasses

from mmkd_jax.specs import ModelSpec, TokenizerSpec

CLIP_BPE, WORDPIECE = TokenizerSpec("bpe"), TokenizerSpec("wordpiece")  # as OpenAI and open_clip feed them
PLAIN_BPE, PLAIN_WORDPIECE = TokenizerSpec("bpe", repair=False), TokenizerSpec("wordpiece", repair=False)
# In the words of pairs sets, so that routing can find who was made for a modality.
ALL = ("ct", "mri", "xray", "ultrasound", "histopathology", "fundus", "dermoscopy", "endoscopy", "microscopy")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One statement.

    Attributes:
      about: what it says, of which fields of the spec.
      source: where it was read; of an unverified one, why it is likely.
      verified: whether the authors' code or config says so, or the published weights or features leave nothing else.
    """

    about: str
    source: str
    verified: bool = True


def known(about: str, source: str) -> Fact:
    """A verified fact."""
    return Fact(about, source)


def likely(about: str, source: str) -> Fact:
    """An unverified one."""
    return Fact(about, source, verified=False)


@dataclasses.dataclass(frozen=True)
class Facts:
    """A published model.

    Attributes:
      spec: what it takes to build and feed it.
      weights: where its authors put them, and in which form.
      facts: what the spec rests on.
      layout: names of the published weights, a key of `mmkd_jax.models.layouts.LAYOUTS`.
      terms: what to know before using the weights, beside the licence that the spec names.
      published_as: the name of its features in the samples published with MMKD-CLIP; empty if there are none.
    """

    spec: ModelSpec
    weights: str
    facts: tuple[Fact, ...]
    layout: str = "open_clip"
    terms: str = ""
    published_as: str = ""

    @property
    def verified(self) -> list[Fact]:
        """What is certain."""
        return [fact for fact in self.facts if fact.verified]

    @property
    def unverified(self) -> list[Fact]:
        """What is likely, and should be checked by who holds the weights."""
        return [fact for fact in self.facts if not fact.verified]
