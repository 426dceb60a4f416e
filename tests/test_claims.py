"""Claims tables: there and back through a notebook file, and verdicts that are no verdicts."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest
from nbformat import v4

from frlkit import KitError, claims
from frlkit.claims import Claim

ROWS = [
    Claim("Robust error of the worst class < 2x the average", "41.2 % & 30.0 % (PGD-20)", "partly"),
    Claim("Umlaute überleben: φ", "x" * 300, "not tested"),
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `show` hands to the front end, each a mapping from type to content."""
    bundles: list[dict[str, Any]] = []

    def display(bundle: dict[str, Any], *, raw: bool) -> None:
        assert raw
        bundles.append(bundle)

    monkeypatch.setattr(claims, "display", display)
    return bundles


def through_a_file(*bundles: dict[str, Any]) -> list[Any]:
    """The cells of a notebook that was written and read again, one code cell for each output, with others between."""
    cells = [
        v4.new_markdown_cell("# a title"),
        v4.new_code_cell("print(1)", outputs=[v4.new_output("stream", text="1")]),
    ]
    for bundle in bundles:
        cells.append(v4.new_code_cell("show()", outputs=[v4.new_output("display_data", data=bundle)]))
    notebook = v4.new_notebook(cells=cells)
    nbformat.validate(notebook)
    return nbformat.reads(nbformat.writes(notebook), as_version=4).cells


def test_there_and_back(shown: list[dict[str, Any]]) -> None:
    claims.show("First", ROWS)
    claims.show("Second", ROWS[:1])
    found = claims.from_notebook(through_a_file(*shown))
    assert [table["title"] for table in found] == ["First", "Second"]
    assert [Claim(**row) for row in found[0]["claims"]] == ROWS
    assert [Claim(**row) for row in found[1]["claims"]] == ROWS[:1]


def test_a_notebook_without_claims_has_none() -> None:
    assert claims.from_notebook(through_a_file()) == []
    assert claims.from_notebook([]) == []


def test_a_reader_sees_the_whole_text(shown: list[dict[str, Any]]) -> None:
    claims.show("First", ROWS)
    (bundle,) = shown
    assert "x" * 300 in bundle["text/html"]
    assert "x" * 300 in bundle["text/plain"]
    assert "&lt; 2x" in bundle["text/html"]  # escaped, or a browser takes it for a tag
    assert "< 2x" in bundle["text/plain"]


def test_plain_text_has_the_verdict_first() -> None:
    rows = [{"claim": "c", "evidence": "e", "verdict": "partly"}, {"claim": "d", "evidence": "f", "verdict": "refuted"}]
    lines = claims.plain(rows).splitlines()
    assert [line.split("|")[0].strip() for line in lines] == ["partly", "", "refuted", ""]
    assert [line.split("|")[1].strip() for line in lines] == ["c", "e", "d", "f"]
    assert len({line.index("|") for line in lines}) == 1


@pytest.mark.parametrize("verdict", ["Confirmed", "true", "", None, True, ["confirmed"]])
def test_unknown_verdict(verdict: Any) -> None:
    with pytest.raises(KitError, match="use one of confirmed, partly, not established, refuted, not tested") as caught:
        Claim("c", "e", verdict)
    assert f"verdict = {verdict!r}" in str(caught.value)
