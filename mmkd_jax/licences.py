"""What licences allow: whether a model made from teachers and data may be passed on.

Licences are free text here (SPDX names, `CC BY-NC-SA 4.0`, `not stated`). Read is what the Creative Commons' short
names say: ND forbids sharing what was made from a work, NC using it commercially. This is a guard, not legal advice.
"""

import re
from collections.abc import Mapping
from typing import Any

from mmkd_jax.errors import InputError

USES = ("research", "commercial")
_NO_DERIVATIVES = re.compile(r"\bnd\b|no.?deriv", re.IGNORECASE)
_NON_COMMERCIAL = re.compile(r"\bnc\b|non.?commercial|research.only", re.IGNORECASE)
_UNKNOWN = re.compile(r"|unknown|other|not (stated|known)", re.IGNORECASE)


def of_checkpoint(meta: Mapping[str, Any]) -> dict[str, str]:
    """Licences of all that a checkpoint's parameters were made from, by what they are of.

    Args:
      meta: the checkpoint's record: of its spec, its teachers and data, and of what it started from.
    """
    spec, terms = meta["spec"], meta["data"].get("licences", {})
    own = {} if spec["license"] == "unknown" else {f"the model {spec['name']}": spec["license"]}
    teachers = {f"teacher {name}": licence for name, licence in terms.get("teachers", {}).items()}
    data = {f"data under {licence}": licence for licence in terms.get("data", {})}
    return {**meta.get("inherited", {}), **own, **teachers, **data}


def conflicts(licences: Mapping[str, str], use: str = "research") -> list[str]:
    """What forbids passing a model on, one line each.

    Args:
      licences: by what they are of (`teacher UniMed-CLIP`, `data`).
      use: one of `USES`: what the model is meant for.

    Raises:
      InputError: there is no such use.
    """
    if use not in USES:
        raise InputError(f"use {use!r} is not one of {', '.join(USES)}")
    found = []
    for what, licence in licences.items():
        if _NO_DERIVATIVES.search(licence):
            found.append(f"{what} ({licence}) forbids derivatives")
        elif use == "commercial" and _NON_COMMERCIAL.search(licence):
            found.append(f"{what} ({licence}) forbids commercial use")
        elif use == "commercial" and _UNKNOWN.fullmatch(licence.strip()):
            found.append(f"{what} (licence {licence or 'not stated'}) does not allow commercial use")
    return found
