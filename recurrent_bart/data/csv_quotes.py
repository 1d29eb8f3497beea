"""Search for missing quotes in a CSV row of several lines: each line may be a whole row of the file."""

import re
from collections.abc import Iterator, Sequence
from enum import Enum

# Pattern of a delimiter that seems to separate fields: a comma with text on both sides, outside of numbers, because a
# space follows a comma in prose; and any tab.
SEPARATES = {",": re.compile(r"(?<=[^\s,]),(?=[^\s,\d])|(?<=[^\s,\d]),(?=\d)"), "\t": re.compile("\t")}


class Column(Enum):
    """Kind of a column, seen from one of its fields."""

    EMPTY = "no text in the field, so a field of another row may have some or none"
    CODE = "a number, date or name with a digit, without spaces"
    TEXT = "any other text"

    @classmethod
    def of(cls, field: str) -> "Column":
        """Return the kind of the column of a field."""
        if not field.strip():
            return cls.EMPTY
        is_code = len(field.split()) == 1 and "\n" not in field and any(character.isdigit() for character in field)
        return cls.CODE if is_code else cls.TEXT


def lines_are_rows(lines: Sequence[str], row: Sequence[str], delimiter: str) -> bool:
    """Return True if each line, without its quotes, seems to be a row with the columns of `row`.

    `lines` are the lines of `row` in the file.
    """
    plain = [line.replace('"', "") for line in lines]
    if all(len(SEPARATES[delimiter].findall(line)) == len(row) - 1 for line in plain):
        return True
    return delimiter == "," and all(_Line(line, row).is_row() for line in plain)


class _Line:
    """Line whose commas either separate fields or belong to a text.

    Fields around the quoted field show the kinds of columns.
    """

    def __init__(self, line: str, row: Sequence[str]):
        self.parts = line.strip("\r\n").split(",")
        self.columns = [Column.of(field) for field in row]
        # A quote behind a space is an ordinary character, so only the first field can be quoted in this style.
        self.has_spaces = "\n" in row[0] and all(field.startswith(" ") for field in row[1:])

    def is_row(self) -> bool:
        """Return True if the commas split the line into one field for each column."""
        starts = {0}
        for number in range(len(self.columns)):
            starts = {end + 1 for start in starts for end in self._ends(number, start) if self._may_end(number, end)}
        return len(self.parts) in starts

    def _ends(self, number: int, start: int) -> Iterator[int]:
        """Yield the index of each part at which column `number` can end if it begins at part `start`."""
        parts, column = self.parts, self.columns[number]
        if start == len(parts):
            return
        n_words, is_end = len(parts[start].split()), start + 1 == len(parts)
        if not n_words:
            # prose often has a comma at the end of a line, so few empty fields there count
            if (not is_end and column is not Column.TEXT) or (column is Column.EMPTY and len(self.columns) > 2):
                yield start
            return
        if column is Column.CODE:
            if n_words == 1:
                yield start
            return
        for end in range(start, len(parts)):
            if parts[end].strip():
                yield end
            if end + 1 < len(parts) and self._separates(end):
                return

    def _may_end(self, number: int, end: int) -> bool:
        """Return True if column `number` can end after part `end`. The last column ends at the end of the line."""
        is_last_column, is_last_part = number + 1 == len(self.columns), end + 1 == len(self.parts)
        if is_last_column or is_last_part:
            return is_last_column and is_last_part
        if not self.parts[end].strip() or not self.parts[end + 1].strip():
            # `_ends` refuses an empty field in a column of texts.
            return True
        if self._is_in_number(end):
            # The text "1,2 and 3" begins as a code and a text do, so a second code must stand before or after.
            first, second = self.columns[number : number + 2]
            return first is Column.CODE and (second is Column.CODE or number > 0)
        return self._separates(end)

    def _separates(self, end: int) -> bool:
        """Return True if the comma after part `end` separates two texts."""
        left, right = self.parts[end], self.parts[end + 1]
        is_tight = left[-1:].strip() != "" and right[:1].strip() != ""
        return (is_tight or (self.has_spaces and right.strip() != "")) and not self._is_in_number(end)

    def _is_in_number(self, end: int) -> bool:
        """Return True if digits stand on both sides of the comma after part `end`."""
        return self.parts[end][-1:].isdigit() and self.parts[end + 1][:1].isdigit()
