"""Claims tables: what a notebook shows is what the command line collects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frlkit import KitError
from frlkit.report import claims
from frlkit.report.claims import Claim

ROWS = [
    Claim("errors differ between classes (the paper)", "3.1 ± 0.2 % against 40.5 ± 1.0 %", "confirmed"),
    Claim("the gap <grows>", "seen & measured", "partly"),
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `display` was given, as the outputs of an executed notebook's cell."""
    outputs: list[dict[str, Any]] = []

    def display(data: dict[str, Any], *, raw: bool) -> None:
        assert raw
        outputs.append({"output_type": "display_data", "metadata": {}, "data": json.loads(json.dumps(data))})

    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_show_and_collect(shown: list[dict[str, Any]]) -> None:
    claims.show("Disparity", ROWS)
    claims.show("Theory", ROWS[:1])
    cells = [
        {"cell_type": "markdown", "source": "# Title"},
        {"cell_type": "code", "outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}, shown[0]]},
        {"cell_type": "code", "outputs": []},
        {"cell_type": "code", "outputs": [{"output_type": "error", "ename": "E"}, shown[1]]},
    ]
    found = claims.from_notebook(cells)
    assert [table["title"] for table in found] == ["Disparity", "Theory"]
    assert [Claim(**row) for row in found[0]["claims"]] == ROWS
    assert [Claim(**row) for row in found[1]["claims"]] == ROWS[:1]


def test_html_and_text_show_every_word(shown: list[dict[str, Any]]) -> None:
    long = Claim("a claim of many words " * 10, "numbers " * 30, "not tested")
    claims.show("Disparity", [*ROWS, long])
    plain, html = shown[0]["data"]["text/plain"], shown[0]["data"]["text/html"]
    for claim in (*ROWS, long):
        for word in (claim.claim, claim.evidence, claim.verdict):
            assert word in plain
            assert word.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "..." not in html


def test_a_notebook_without_tables_has_none() -> None:
    assert claims.from_notebook([]) == []
    assert claims.from_notebook([{"cell_type": "code", "outputs": [{"data": {"text/plain": "3"}}]}]) == []


@pytest.mark.parametrize("verdict", ["Confirmed", "true", "", None, True])
def test_unknown_verdicts_are_refused(verdict: Any) -> None:
    with pytest.raises(KitError, match="use one of confirmed, partly, not established, refuted, not tested"):
        Claim("x", "y", verdict)
