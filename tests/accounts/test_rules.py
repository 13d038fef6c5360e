"""What an operator may write about prices, teams and limits, and the sentence that anything else gets."""

from __future__ import annotations

import pytest

from accounts.rules import NANO, Budget, Limits, Price, budget, read
from runtime.configuration import BadConfiguration
from runtime.priority_class import PriorityClass

WHOLE = """
currency = "USD"
timezone = "Europe/Berlin"

[prices."demo"]
prompt_per_million = 0.15
cached_per_million = 0.015
output_per_million = 0.6
batch_factor = 0.5

[cluster]
budgets = ["1000/month"]

[teams.search]
weight = 2.5
requests_per_minute = 600
budgets = ["2.50/day", "50/month"]
on_empty = {default = "wait", batch = "refuse"}
"""


def test_a_file_is_read_as_it_is_written() -> None:
    rules = read(WHOLE, "rules.toml", model="demo")
    assert rules.price("demo") == Price(prompt=150, cached=15, output=600, batch_permille=500)
    assert rules.cluster == Limits(budgets=(Budget(amount=1000 * NANO, window="month"),))
    search = rules.teams["search"]
    assert search.weight == 2.5 and search.waits == {PriorityClass.DEFAULT}
    assert search.limits.requests_per_minute == 600
    assert search.limits.budgets[0] == budget("2.50/day")
    assert rules.shown(2_500_000_000) == "2.5 USD"


def test_of_batch_half_is_paid_and_parts_are_rounded_up() -> None:
    price = Price(prompt=3, cached=1, output=5, batch_permille=500)
    assert price.amount(1, 0, 0, "default") == 3
    assert price.amount(1, 0, 0, "batch") == 2
    assert price.amount(10, 10, 10, "batch") == 45


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ("x = 1", "x", "not known"),
        ("teams = 3", "teams", "must be dict"),
        ('timezone = "Mars/Base"', "timezone", "no time zone"),
        ("[prices.demo]\nprompt_per_million = 1", "prices.demo.cached_per_million", "is missing"),
        (
            "[prices.demo]\nprompt_per_million = 0.0001\ncached_per_million = 0\noutput_per_million = 1",
            "prices.demo.prompt_per_million",
            "multiple of 0.001",
        ),
        (
            "[prices.demo]\nprompt_per_million = 1\ncached_per_million = 2\noutput_per_million = 1",
            "prices.demo.cached_per_million",
            "not be more",
        ),
        ('[teams.a]\nbudgets = ["50/year"]', "teams.a.budgets[0]", "such as 50/month"),
        ('[teams.a]\nbudgets = ["-1/day"]', "teams.a.budgets[0]", "at least 0"),
        ('[teams.a]\nbudgets = ["much/day"]', "teams.a.budgets[0]", "must be a number"),
        ("[teams.a]\nrequests_per_minute = 0", "teams.a.requests_per_minute", "at least 1"),
        ("[teams.a]\nrequests_per_minute = true", "teams.a.requests_per_minute", "must be int"),
        ("[teams.a]\nweight = 0", "teams.a.weight", "above 0"),
        ('[teams."a b"]', "teams.a b", "letters, digits"),
        ('[teams.a]\non_empty = {urgent = "wait"}', "teams.a.on_empty.urgent", "priority class"),
        ("", "prices", "has no price"),
    ],
)
def test_bad_input_gets_a_sentence_with_its_path(text: str, path: str, why: str) -> None:
    with pytest.raises(BadConfiguration) as caught:
        read(text, "rules.toml", model="demo")
    assert (caught.value.path, caught.value.source) == (path, "rules.toml")
    assert why in str(caught.value)
