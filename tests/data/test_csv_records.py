"""CSV and TSV files: correct rows, or an error with file and line."""

import csv

import pytest

from recurrent_bart.data.csv_records import csv_records

HEAD = "document,summary\n"


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode(encoding))
    return path


def read(path, **options):
    return [
        (place.rsplit("/")[-1], record["document"], record["summary"]) for place, record in csv_records(path, **options)
    ]


FAULTS = {
    "a field more than columns": ("The roof leaks, the council met.,Repair.\nb,c\n", "x.csv:2: 3 fields, .* 2 columns"),
    "a field less than columns": ("a,b\nc\n", "x.csv:3: 1 fields, .* 2 columns"),
    "an empty field more": ("a,b,\n", "x.csv:2: 3 fields"),
    "text after a closing quote": ('"a" b,c\n', "x.csv:2: text follows the closing quote"),
    "a space after a closing quote": ('"a" ,c\n', "x.csv:2: text follows the closing quote"),
    "a backslash in front of a quote": ('"He said \\"no, never\\" to it","No."\n', "x.csv:2: text follows the closing"),
    "a quote that closes in a later row": (
        '"The roof leaks,Repair.\nThe bridge.,Review.\nShe said "yes",Agreed.\nd,e\n',
        "x.csv:2: text follows the closing quote of a field, on line 4",
    ),
    "a quote that closes before a comma": (
        '"The roof leaks,Repair.\nThe bridge.,Review.\nThe park.",Open.\nd,e\n',
        "x.csv:2: a quoted field has 3 lines, .* a quote seems to be missing",
    ),
    "a last field that closes later": ('a,"b\nc,d"\n', "x.csv:2: a quoted field has 2 lines"),
    "a quote that never closes": ('a,b\n"c,d\ne,f\n', "x.csv:3: a quote has no closing quote up to line 4"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_row_is_refused_with_file_and_line(tmp_path, name):
    rows, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, HEAD + rows))


LOST_QUOTES = [
    'id,year,document,summary\n1,2020,"A text,Sum one.\n2,2021,B text",Sum two.\n',
    'id,year,document,summary\n1,2020,"A text, and more,Sum one.\n2,2021,5 texts, 1,000 words",Sum two.\n',
    'id,day,n,document,summary\na1,2020-01-02,3,"A text,Sum one.\nb2,,4,B text",Sum two.\n',
    'id,note,document,summary\n1,,"A text,Sum one.\n2,,B text",Sum two.\n',
    'id,note,document,summary\n1,,"A text,Sum one.\n2,,B text,Sum two.\n3,see there,C text",Sum three.\n',
    'document,summary,note\n"A text,Sum one.,\nB text",Sum two.,\n',
    'document,year,n,summary\n"A text,2020,7,Sum one.\nB text",2021,8,Sum two.\n',
    'year,n,summary,document\n2020,7,Sum one.,"A text\n2021,8,Sum two.,B text"\n',
    'document, summary\n"A text, Sum one.\nB text", Sum two.\n',
    'document, year, summary\n"A text, 2020, Sum one.\nB text", 2021, Sum two.\n',
    'id, year, document, summary\n"1, 2020, A text, Sum one.\n2", 2021, B text, Sum two.\n',
]


@pytest.mark.parametrize("text", LOST_QUOTES)
def test_a_lost_quote_beside_numbers_empty_fields_or_spaces_is_refused(tmp_path, text):
    lines = text.count("\n") - 1
    with pytest.raises(ValueError, match=f"x.csv:2: a quoted field has {lines} lines, .* a quote seems to be missing"):
        list(csv_records(write(tmp_path, text)))


TEXTS = [
    "It costs 1,000 yen\n20,000 people paid it",
    "Rooms 1,2 are open\nRooms 3,4 are not",
    "2,3 are primes\n4,6 are not",
    "Buy milk, eggs, bread\nand tea, or coffee, please",
    "- a, b\n- c, d\n",
    "first,second\nthird,fourth\n",
    "Paris, 2020\nRome, 2021",
    "x = f(a,b)\ny = g(c, d)\n",
    "yes,\nno, or not\n",
    "1, 2, 3\n4, 5, 6",
    ", \n,,",
    "Dear Sir,\nthank you",
]


@pytest.mark.parametrize(
    "columns", [["document", "s"], ["id", "document"], ["id", "document", "s"], [*"ab", "document", "c"]]
)
@pytest.mark.parametrize("others", [["1", "2020", "3"], ["", "", ""], ["A text.", "B, or C", "Sum."], ["k1", "", "x"]])
def test_texts_with_commas_numbers_and_lists_beside_any_column_are_read_unchanged(tmp_path, columns, others):
    path = tmp_path / "x.csv"
    values = iter(others)
    fixed = {name: next(values) for name in columns if name != "document"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(fixed | {"document": text} for text in TEXTS)
    assert [record for _, record in csv_records(path)] == [fixed | {"document": text} for text in TEXTS]


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_row_between_tabs_is_refused_too(tmp_path, name):
    rows, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, (HEAD + rows).replace(",", "\t")), delimiter="\t")


def test_fields_between_tabs_may_have_commas_and_quoted_tabs(tmp_path):
    path = write(tmp_path, 'document\tsummary\na,b, c\t1,000\n"d\te"\t"f ""g""\nh"\n')
    assert read(path, delimiter="\t") == [("x.csv:2", "a,b, c", "1,000"), ("x.csv:3", "d\te", 'f "g"\nh')]


@pytest.mark.parametrize("rows", ["a,b,c\n", '"a" b,c\n', "a\n", '"a\\"b","c"\n'])
def test_a_faulty_row_of_one_line_may_be_skipped(tmp_path, rows):
    path = write(tmp_path, HEAD + "first,one\n" + rows + "last,two\n")
    errors = []
    assert read(path, on_bad=errors.append) == [("x.csv:2", "first", "one"), ("x.csv:4", "last", "two")]
    assert len(errors) == 1
    assert f"{path}:3: " in str(errors[0])


@pytest.mark.parametrize("name", ["a quote that closes in a later row", "a quote that never closes"])
def test_a_faulty_row_of_several_lines_is_never_skipped(tmp_path, name):
    rows, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, HEAD + rows), on_bad=lambda error: None)


def test_two_columns_with_the_same_name_are_refused(tmp_path):
    path = write(tmp_path, "document,document,summary\na,b,c\n")
    with pytest.raises(ValueError, match=r"x.csv:1: two columns are named 'document'"):
        read(path, on_bad=lambda error: None)
    # No flag can select a column without a name.
    assert read(write(tmp_path, ",document,,summary\n0,a,,c\n")) == [("x.csv:2", "a", "c")]


def test_fields_with_commas_quotes_and_lines_are_read_unchanged(tmp_path):
    fields = [
        "one\ntwo, three",
        'she said "yes"',
        "a, b\nc, d",
        "1,000\n2,000",
        "\n\n",
        "x\r\ny",
        "foo(a, b)\n\nbar(c)",
        "é",
    ]
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["document", "summary"])
        writer.writerows(zip(fields, reversed(fields), strict=True))
    assert [record[1:] for record in read(path)] == list(zip(fields, reversed(fields), strict=True))


def test_a_record_has_the_number_of_its_first_line_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path, HEAD + '"a\nb",c\n\n\nd,e\n')
    assert read(path) == [("x.csv:2", "a\nb", "c"), ("x.csv:6", "d", "e")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "shift_jis"])
def test_a_file_is_read_in_its_encoding(tmp_path, encoding):
    text = "日本語" if encoding == "shift_jis" else "café"
    path = write(tmp_path, f"{HEAD}{text},s\n", encoding)
    assert read(path, encoding=encoding) == [("x.csv:2", text, "s")]


def test_an_undecodable_byte_is_named_with_its_line_and_may_be_skipped(tmp_path):
    path = write(tmp_path, f"{HEAD}a,b\ncafé,c\nd,e\n", "latin-1")
    with pytest.raises(
        ValueError, match=r"x.csv:3: byte 0xe9 is not utf-8; give the encoding of the file with --encoding"
    ):
        read(path)
    assert [place for place, *_ in read(path, on_bad=lambda error: None)] == ["x.csv:2", "x.csv:4"]


def test_semicolons_instead_of_commas_are_named(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text('document;summary\n"A text; with more";A summary\n')
    with pytest.raises(ValueError, match=r"f\.csv:1: the header is one column 'document;summary'; if its delimiter is"):
        list(csv_records(path))
