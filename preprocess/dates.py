"""The day that a name or a tag holds."""

import re
from datetime import date

# The day must stand alone: no digits around it. The scene id of a Landsat name (038034) is none.
_DATE = re.compile(r"(?<!\d)(19[7-9]\d|20\d\d)([-:/]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")


def find_date(text: str) -> str:
    """The first day in a text, ISO, or an empty string: 20200612, 2020-06-12, 2020:06:12 or 2020/06/12."""
    for match in _DATE.finditer(text):
        try:
            return date(int(match[1]), int(match[3]), int(match[4])).isoformat()
        except ValueError:  # the 30th of February
            continue
    return ""
