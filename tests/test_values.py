"""What a value may be: every limit in one plain sentence, every spelling of a value one value."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from frlkit import KitError, recipes
from frlkit.evaluation import Attack
from frlkit.recipes import Config, FairConfig
from frlkit.values import Count, Share, allowed, checked, fields_of, from_text, to_text

FIELDS = [(kind, name) for kind in (Config, FairConfig, Attack) for name in fields_of(kind)]


def even(value: int) -> int:
    if value % 2:
        raise KitError(f"pair = {value} is odd")
    return value


@checked
class Sample:
    """One field of every sort."""

    word: Literal["left", "right"]
    whole: Annotated[int, Field(ge=-3, le=10**6)] = 0
    above: Annotated[float, Field(gt=0, lt=2.5)] = 1.0
    below: Annotated[float, Field(le=1e6)] = 0.0
    inner: Annotated[Count, Field(le=10)] = 1
    flag: bool = False
    either: int | None = None
    listed: list[Share] = Field(default_factory=list)
    pair: Annotated[int, AfterValidator(even)] = 0
    lent: Literal["none"] | Annotated[str, Field(pattern=r"^id-[0-9a-f]{4}$")] = "none"


class TestSentences:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("word", "one of left, right"),
            ("whole", "a whole number from -3 to 1,000,000"),
            ("above", "a number above 0 below 2.5"),
            ("below", "a number of at most 1,000,000"),
            ("flag", "True or False"),
            ("either", "a whole number or nothing"),
            ("listed", "a list whose items are each a number from 0 to 1"),
            ("lent", "one of none or id- and 4 hexadecimal digits"),
        ],
    )
    def test_by_hand(self, name: str, words: str) -> None:
        assert allowed(fields_of(Sample)[name]) == words

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({}, "word is missing: give one of left, right"),
            ({"word": "up"}, "word = 'up' is unknown: use one of left, right"),
            ({"word": "left", "whole": 4.0}, "whole = 4.0 is not allowed: use a whole number from -3 to 1,000,000"),
            ({"word": "left", "whole": True}, "whole = True is not allowed: use a whole number from -3 to 1,000,000"),
            ({"word": "left", "above": math.nan}, "above = nan is not allowed: use a number above 0 below 2.5"),
            ({"word": "left", "flag": 1}, "flag = 1 is not allowed: use True or False"),
            ({"word": "left", "pair": 3}, "pair = 3 is odd"),
            ({"word": "left", "lent": "id-12"}, "lent = 'id-12' is unknown: use one of none or id- and 4 hexadecimal"),
            ({"word": "left", "colour": 3}, "'colour' is no field of Sample: use word, whole, above"),
            ({"word": "left", "whole": 1 << 20_000}, "whole = a number of thousands of digits is not allowed"),
            ({"word": "left", "whole": [[[10 * ["deep"]]]]}, "whole = [[[['deep', 'deep', 'deep', 'deep', 'deep', "),
            ({"word": "left", "listed": [0.5, 2.0]}, "listed = 2.0 is not allowed: use a list whose items are each"),
        ],
    )
    def test_a_refusal(self, values: dict[str, Any], said: str) -> None:
        with pytest.raises(KitError, match=f"^{re.escape(said)}"):
            Sample(**values)

    @pytest.mark.parametrize("value", ["x" * 10**6, [["x" * 200] * 100] * 100], ids=["long", "wide"])
    def test_a_refusal_is_no_page(self, value: Any) -> None:
        with pytest.raises(KitError, match=r"^word = .*\.\.\..* is unknown: use one of left, right$") as caught:
            Sample(value)
        assert len(str(caught.value)) < 10_000

    def test_values_given_in_order_are_named(self) -> None:
        for values, name in ((("up",), "word"), (("left", 0.5), "whole"), (("left", 1, -1.0), "above")):
            with pytest.raises(KitError, match=f"^{name} = {values[-1]!r} is "):
                Sample(*values)
        with pytest.raises(KitError, match=r"^'value number 11' is no field of Sample"):
            Sample("left", 0, 1.0, 0.0, 1, False, None, [], 0, "none", 5)

    @pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
    def test_every_field_of_the_kit(self, kind: type, name: str) -> None:
        """Plain words: no article before a type, no 1e+06, nothing of pydantic; both ends of every range are valid."""
        field, rest = fields_of(kind)[name], {} if kind is Attack else {"method": "pgd_at"}
        words = allowed(field)
        assert re.fullmatch(r"(a|one of|True or|text)[\w ,.:-]*", words)
        assert not re.search(r"\b(int|float|str|bool)\b|e[+-]?\d|inf|nan|Annotated|Literal|typing", words)
        with pytest.raises(KitError, match=rf"^{name} = <object object at .*> is "):
            kind(**{**rest, name: object()})
        for number in re.findall(r"(?:from|to|at most) (-?[\d,.]+)", words):
            value = float(number.replace(",", "")) if field.annotation is float else int(number.replace(",", ""))
            assert getattr(kind(**{**rest, name: value}), name) == value
            with pytest.raises(KitError, match=re.escape(words)):
                step = max(1, abs(value))
                kind(**{**rest, name: value - step if re.search(rf"from {number}\b", words) else value + step})

    def test_it_stays_as_it_was_made(self) -> None:
        with pytest.raises(AttributeError):
            Sample("left").whole = 5


class TestSpelling:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(5, "5"), (5.0, "5"), (0.5, "0.5"), (1e6, "1000000"), (-3.0, "-3"), (-0.0, "0"), (1e-3, "0.001")]
        + [(0.00123456789, "0.00123456789"), (True, "True"), ("own", "own")],
    )
    def test_by_hand(self, value: Any, text: str) -> None:
        assert to_text(value) == text

    @given(st.floats(0, 1e6))
    def test_a_number_comes_back(self, value: float) -> None:
        field = fields_of(Config)["beta"]
        text = to_text(value)
        assert from_text("beta", text, field) == value
        assert "e+" not in text
        assert to_text(from_text("beta", text, field)) == text

    @pytest.mark.parametrize("text", ["epochs=3", "epochs=03", "epochs=3.0", "epochs=+3"])
    def test_one_run_has_one_name(self, text: str) -> None:
        assert recipes.spelled(f"uniform,{text}") == "uniform,epochs=3"
        assert recipes.configure(f"uniform,{text}", "digits", 0) == recipes.configure("uniform", "digits", 0, epochs=3)

    @pytest.mark.parametrize("text", ["epochs=3,epochs=4", "epochs=3,beta=1,epochs=3"])
    def test_a_field_is_given_once(self, text: str) -> None:
        with pytest.raises(KitError, match=r"^epochs is given twice in 'uniform,epochs=.*': give it once"):
            recipes.configure(f"uniform,{text}", "digits", 0)

    @pytest.mark.parametrize("text", ["yes", "1", "0", "true", "on", ""])
    def test_only_true_and_false_are_flags(self, text: str) -> None:
        with pytest.raises(KitError, match=f"^accumulate = {text!r} is not allowed: use True or False"):
            recipes.spelled(f"uniform,accumulate={text}")

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_a_recipe_without_variations_is_spelled_as_it_is(self, name: str) -> None:
        assert recipes.spelled(name) == name
