"""What chat templates that ask for the date are told."""

import datetime

from llmjax.errors import RequestError, shown

Date = str | datetime.date


def settled(date: Date | None) -> datetime.datetime:
    """A moment from a day or a time in ISO's form; the present from None.

    Raises:
      RequestError: it is no date.
    """
    if date is None:
        return datetime.datetime.now()
    try:
        return datetime.datetime.fromisoformat(str(date))
    except ValueError:
        raise RequestError(
            f"date: expected a day such as 2026-01-31, or a time such as 2026-01-31T09:30, found {shown(date)}"
        ) from None
