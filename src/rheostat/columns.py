"""Tables on narrow terminals: words wrap, numbers never do, and columns that find no room stand below the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Column, Table

GAP = 2
"""Spaces between two columns of a table without a box."""


def in_parts(table: Table, width: int) -> list[Table]:
    """`table` as it is where it fits into `width` columns of the screen, else as tables to print below one another.

    Each of them begins with the columns that say what a row is: those up to the last that holds words. Cells are texts.
    """
    columns = table.columns
    if _total([_natural(one) for one in columns]) <= width:
        return [table]
    least = [_least(one) for one in columns]
    num_keys = 1 + max((i for i, one in enumerate(columns) if one.justify == "left"), default=0)
    groups: list[list[int]] = [[]]
    for i in range(num_keys, len(columns)):
        if groups[-1] and _total([*least[:num_keys], *(least[k] for k in groups[-1]), least[i]]) > width:
            groups.append([])
        groups[-1].append(i)
    return [
        _part(table, [*range(num_keys), *group], least, table.title if not n else None)
        for n, group in enumerate(groups)
    ]


def _part(table: Table, chosen: Sequence[int], least: Sequence[int], title: object) -> Table:
    from rich.table import Table

    part = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)  # type: ignore[arg-type]
    for i in chosen:
        one = table.columns[i]
        # A width of its own is what rich does not take from a column to give it to others. Where not even one column
        # fits beside the keys, it is taken nevertheless, and numbers go on in the next line.
        own = None if _wraps(one) else least[i]
        part.add_column(one.header, justify=one.justify, width=own, overflow="fold")
    for row in zip(*(table.columns[i].cells for i in chosen), strict=True):
        part.add_row(*row)
    return part


def _wraps(column: Column) -> bool:
    return column.justify == "left" and not column.no_wrap


def _natural(column: Column) -> int:
    return max(map(_length, [column.header, *column.cells]))


def _least(column: Column) -> int:
    """Numbers stay whole, and so do words. A heading may wrap between words."""
    words = str(column.header).split()
    for cell in column.cells:
        words += str(cell).split() if _wraps(column) else [str(cell)]
    return max(map(_length, words), default=0)


def _length(cell: object) -> int:
    from rich.cells import cell_len

    return cell_len(str(cell))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)
