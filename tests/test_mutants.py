"""The seeded faults of ``make mutants`` still fit the source; the campaign itself takes minutes."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, PROJECT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_every_mutant_is_a_program(mutant: Mutant) -> None:
    source = mutated(mutant)
    compile(source, mutant.module, "exec")
    assert source != (PROJECT / "frlkit" / mutant.module).read_text(encoding="utf-8")
    assert (PROJECT / "tests" / mutant.tests).exists()


def test_a_text_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="is 0 times in data.py: adapt it"):
        mutated(MUTANTS[0]._replace(module="data.py"))
