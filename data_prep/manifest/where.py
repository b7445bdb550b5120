"""Which cells of a dataset are wanted, by their annotations: the manifest column `where`.

    is_primary_data=True; suspension_type=cell|nucleus; disease!=COVID-19

Conditions are separated by `;` and all hold for a cell that is kept; `|` separates values, of which
one is enough. Values are compared as the text that an annotation becomes
(`data_prep.staging.annotations`); nothing after `=` is a missing value. Numbers are compared
without zeros behind the point, since 1 becomes 1.0 where a value is missing. True and False also
fit 1 and 0, T and F and any case. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.annotations.words import fits

PRIMARY = "is_primary_data"
"""Annotation of CELLxGENE: False for cells that are in another of its datasets, too."""
REASON = "not where "
"""In front of the condition that a cell fails, in the ledger's `dropped_cells`."""
WHERE_HELP = (
    "keep the cells for which all conditions hold, such as 'suspension_type=cell|nucleus; "
    "disease!=COVID-19'; cells with is_primary_data False are left out unless it names that column"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """What one annotation of a cell must be, or must not."""

    column: str
    values: tuple[str, ...]
    equal: bool

    @property
    def text(self) -> str:
        """The condition as it is written."""
        return f"{self.column}{'=' if self.equal else '!='}{'|'.join(self.values)}"

    def holds(self, value: str) -> bool:
        """Tell whether a cell with this annotation is wanted.

        Args:
            value: The annotation as text.
        """
        return any(fits(wanted, value) for wanted in self.values) == self.equal


PRIMARY_CELLS = Condition(PRIMARY, ("False",), equal=False)
"""What holds unless a dataset's own conditions name the column."""


def parse_where(text: str) -> tuple[Condition, ...]:
    """Return the conditions of a text; of an empty one none.

    Args:
        text: See the module.

    Raises:
        ValueError: A part that is no condition.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        equal = not name.endswith("!")
        column = name.removesuffix("!").strip()
        if not equals or not column:
            raise ValueError(
                f"where '{part[:80]}': not a condition; write COLUMN=VALUE, COLUMN=ONE|OTHER or "
                "COLUMN!=VALUE, with ';' between conditions"
            )
        found.append(Condition(column, tuple(v.strip() for v in values.split("|")), equal))
    return tuple(found)


def conditions_of(where: str, columns: Iterable[str]) -> tuple[Condition, ...]:
    """Return what must hold for the cells of a file: what was asked for, and `PRIMARY_CELLS`.

    Args:
        where: The text of the manifest.
        columns: Annotations of the file.
    """
    asked = parse_where(where)
    named = any(condition.column == PRIMARY for condition in asked)
    return asked if named or PRIMARY not in columns else (*asked, PRIMARY_CELLS)
