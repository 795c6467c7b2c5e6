"""Conditions on rows, as they are written on a command line."""

from __future__ import annotations

from ambient_sd.utils.errors import UserError


def split_condition(term: str) -> tuple[str, str, str]:
    """Split a row condition `column=value`, `column<=number` or `column>=number` into (column, operator, value).

    Raises:
        UserError: `term` has another form.

    Example:
        >>> split_condition("year>=1990")
        ('year', '>=', '1990')
    """
    for operator in ("<=", ">=", "="):
        column, found, value = term.partition(operator)
        if found and column and value:
            return column, operator, value
    raise UserError(f"row_filter is {term!r}", rule="it must read column=value, column<=number or column>=number",
                    remedy="for example split=train")  # fmt: skip
