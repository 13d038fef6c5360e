"""Sessions of several turns share their beginnings as asked."""

from __future__ import annotations

import itertools

from bench.live.sessions import Sessions

SESSIONS = Sessions(requests=80, per_s=10.0)


def test_planners_get_prompts_of_one_shape_and_none_of_the_same_text() -> None:
    ours, other = SESSIONS.prompts(1, "baton"), SESSIONS.prompts(1, "round_robin")
    assert [(each.due_s, len(each.token_ids)) for each in ours] == [(each.due_s, len(each.token_ids)) for each in other]
    assert not {tuple(each.token_ids[:32]) for each in ours} & {tuple(each.token_ids[:32]) for each in other}


def test_prompts_come_in_time_share_beginnings_and_grow() -> None:
    prompts = SESSIONS.prompts(1, "baton")
    dues = [each.due_s for each in prompts]
    assert dues == sorted(dues)
    assert dues[0] == 0.0
    beginnings = {tuple(each.token_ids[: SESSIONS.shared_tokens]) for each in prompts}
    assert 1 < len(beginnings) <= SESSIONS.shared_prompts
    continued = [
        (one, later)
        for one, later in itertools.combinations(prompts, 2)
        if len(later.token_ids) > len(one.token_ids) and later.token_ids[: len(one.token_ids)] == one.token_ids
    ]
    assert continued
    assert all(later.due_s > one.due_s + 1.0 for one, later in continued)
