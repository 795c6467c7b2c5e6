"""`NAME[:key=value,...]` builds the policy that a constructor would, and says what there is where it cannot."""

from __future__ import annotations

from typing import Literal

import pytest

from ambient_sd.guard import by_name, policies
from ambient_sd.guard.policies.base import Policy
from ambient_sd.utils.errors import UserError


class Invented(Policy):
    """Stand for a policy with every kind of setting."""

    def __init__(
        self,
        scale: float,
        kind: Literal["a", "b"] = "a",
        until: int | None = 500,
        *,
        hard: bool = False,
        name: str = "x",
    ) -> None:
        self.values = (scale, kind, until, hard, name)


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "Invented", Invented, raising=False)
    monkeypatch.setattr(policies, "__all__", [*policies.__all__, "Invented"])


def test_values_come_in_the_kinds_of_the_constructor() -> None:
    made = by_name.make("invented:scale=2,kind=b,until=none,hard=true,name=y")
    assert isinstance(made, Invented) and made.values == (2.0, "b", None, True, "y")
    assert isinstance(made.values[0], float)
    assert by_name.make("Invented:scale=1e-3").values == (0.001, "a", 500, False, "x")  # type: ignore[attr-defined]
    for name in ("prompt_optimization", "PromptOptimization", "prompt-optimization"):
        assert isinstance(by_name.make(f"{name}:target=3"), policies.PromptOptimization)


def test_bases_are_no_policies_and_the_list_shows_how_to_ask() -> None:
    assert not {"policy", "scale_policy", "step", "sampling_start"} & by_name.available().keys()
    kinds = by_name.available()
    assert by_name.usage("invented", kinds.pop("invented")) == "invented:scale=FLOAT,kind=a,until=500,hard=false,name=x"
    for name, kind in kinds.items():
        assert name in by_name.listing() and by_name.usage("", kind) in by_name.listing()
    assert set(by_name.SHORT.values()) == kinds.keys()
    assert "invented" not in by_name.listing(), "control: the listing reads the source"


def test_short_names_ask_for_the_same_policies() -> None:
    made = by_name.make("og:until=600 + STP".replace(" ", ""))
    assert [type(part).__name__ for part in made.policies] == ["OppositeGuidance", "StaticTransition"]  # type: ignore[attr-defined]
    assert by_name.canonical("STP: until=400") == by_name.canonical("static-transition:until=400")
    assert by_name.canonical("STP") != by_name.canonical("DTP")


def test_policies_joined_by_a_plus_are_composed_in_their_order_each_with_its_own_settings() -> None:
    made = by_name.make("opposite_guidance:scale=-1,until=600+static_transition:until=5e+2")
    assert isinstance(made, policies.Compose)
    first, second = made.policies
    assert isinstance(first, policies.OppositeGuidance) and (first.opposite, first.until) == (-1, 600)
    assert isinstance(second, policies.StaticTransition) and second.until == 500
    assert isinstance(by_name.make("invented:scale=+2"), Invented)  # a sign joins nothing
    assert "compose" not in by_name.available() and "joined with +" in by_name.listing()


@pytest.mark.parametrize(
    ("text", "named"),
    [("nothing", "--help lists all"), ("static_transiton", "nearest known one is static_transition"), ("invented", "needs scale"), ("invented:scale=big", "scale is 'big'"),
     ("invented:scale=1,kind=c", r"a\|b"), ("invented:scale=1,until=2.5", "until"), ("invented:scale=1,hard=2", "hard"),
     ("invented:scale=1,scale=2", "each once"), ("invented:scale", "key=value"), ("invented:colour=1", "colour"),
     ("prompt_optimization:target=-1", "target -1.0"), ("static_transition+", "policy is ''"), ("compose", "policy is 'compose'"),
     ("static_transition+nothing", "policy is 'nothing'"), ("random_numbers+random_tokens", "RandomTokens after RandomNumbers")],
)  # fmt: skip
def test_errors_say_what_there_is(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        by_name.make(text)


def test_published_forms_and_ours_are_asked_for_by_name() -> None:
    made = by_name.make("reanchoring:threshold=1,rule=all")
    assert isinstance(made, policies.Reanchoring) and made.rule == "all"
    made = by_name.make("attention_guard:threshold=0.1,decay=none,orthogonalize=false")
    assert isinstance(made, policies.AttentionGuard)
    assert (made.threshold, made.decay, made.orthogonalize) == (0.1, "none", False)
    made = by_name.make("SAIL:target=8.2,objective=code")
    assert isinstance(made, policies.SAIL) and (made.objective, made.alpha) == ("code", 0.05)
    made = by_name.make("prompt_optimization:target=3,serve=last,freeze_bos=false")
    assert isinstance(made, policies.PromptOptimization) and (made.serve, made.freeze_bos) == ("last", False)
    assert by_name.make("dynamic_transition:norm=noise").norm == "noise"  # type: ignore[attr-defined]
    assert by_name.make("gaussian_embedding_noise:halves=cond").halves == "cond"  # type: ignore[attr-defined]
    assert "decay=cosine,orthogonalize=true" in by_name.listing()
