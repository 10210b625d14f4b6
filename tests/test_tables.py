import pytest

from cnn_cases import tables

ROWS = [["name", "error %"], ["a", "12.50"], ["longer", "3"]]


def test_words_stand_to_the_left_and_figures_to_the_right():
    assert tables.aligned(ROWS, words=[0]) == "name    error %\na         12.50\nlonger        3\n"


def test_markdown_says_so_by_its_rule():
    assert tables.markdown(ROWS, words=[0]).splitlines()[:2] == ["| name | error % |", "| :--- | ---: |"]


def test_csv_quotes_what_needs_it():
    assert tables.comma_separated([["a, b", 1.5], ["", 2]]) == '"a, b",1.5\n,2\n'


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([2.0], "2.00"), ([1.0, 3.0], "2.00 ± 1.41"), ([1, 1, 1], "1.00 ± 0.00")]
)
def test_a_spread_is_the_sample_deviation(values, text):
    assert tables.mean_and_deviation(values, digits=2) == text


def test_a_bar_in_a_cell_of_markdown_ends_no_column():
    assert tables.markdown([["frozen"], ["conv[1|2]*"]]).splitlines()[2] == r"| conv[1\|2]* |"
