"""Both ways write the same of deltas that chance made: cut anywhere, broken off, left by their reader, resumed."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.protocol import Finish
from front_proxy.request.events import Emit
from front_proxy.request.generation import GenerationDelta
from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureKind
from tests.front_proxy.conftest import Served
from tests.front_proxy.openai_api.delta_script import CHAT, COMPLETION, Answer, Step, both, quiet, same
from tests.support import request_flow as flow_play

# The tokens of the tiny model are single bytes, so each letter beyond ASCII is split over tokens. Those of the demo
# model are words, or single bytes of what its training never saw.
EXAMPLES = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHOICES_MAX = 3
TOKENS_MAX = 1000
# Ids that both models have: of letters, of single bytes, of special tokens.
IDS_MAX = 259
KEEP_ALIVE_S = 1
PIECES = [
    "one two",
    " three",
    "汉字",
    "äöü ß",
    "\U0001f600\U0001f1e9\U0001f1ea",
    '"\\/',
    "\n\t\r\x00\x7f\u2028",
    "<eos>",
    "%d%%",
]
STOPS = ["e", "ne t", "wo t", "字", "ö", "\U0001f1e9", '"', "\ufffd", "%", "never said"]

Said = list[str | list[int]]
"""What a model says: texts, and ids that need not make sense."""
SAID: st.SearchStrategy[Said] = st.lists(
    st.sampled_from(PIECES) | st.lists(st.integers(0, IDS_MAX), max_size=4), max_size=6
)
LENGTHS = st.lists(st.integers(0, 5), max_size=12)
FINISHES = st.sampled_from([Finish("stop"), Finish("stop", 7), Finish("length")])
FAILURES = st.sampled_from([FailureKind.UNAVAILABLE, FailureKind.INTERNAL, FailureKind.EXHAUSTED]).map(
    lambda kind: Failure(kind=kind, message="It broke.", retry_after_s=1.0)
)
USAGES = [
    None,
    {"include_usage": True},
    {"include_usage": True, "continuous_usage_stats": True},
    {"continuous_usage_stats": True},
]


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    """What a client may say of its answer's text."""
    stop = draw(st.lists(st.sampled_from(STOPS), max_size=3, unique=True))
    body: dict[str, Any] = {
        "stream": True,
        "max_tokens": TOKENS_MAX,
        "stream_options": draw(st.sampled_from(USAGES)),
        "skip_special_tokens": draw(st.booleans()),
        "spaces_between_special_tokens": draw(st.booleans()),
        "include_stop_str_in_output": draw(st.booleans()),
        "min_tokens": draw(st.sampled_from([0, 0, 5])),
    }
    if draw(st.booleans()):
        body |= {"messages": [{"role": "user", "content": "Say."}]}
    else:
        body |= {"prompt": draw(st.sampled_from(["x", [5, 6, 7]]))}
    return body | ({"stop": stop} if stop else {})


class Model:
    """One of the two, and how it is asked."""

    def __init__(self, served: Served, name: str) -> None:
        self.served, self.name = served, name

    def tokens(self, said: Said) -> list[int]:
        encode = self.served.source.encode
        return [token for piece in said for token in (encode(piece) if isinstance(piece, str) else piece)]

    def deltas(self, said: Said, lengths: list[int], finish: Finish, landed_at: int) -> list[GenerationDelta]:
        """Cut as ``lengths`` say, the rest in one. Some hold no token, perhaps even the last one."""
        tokens, parts = self.tokens(said), []
        for length in lengths:
            parts.append(tokens[:length])
            tokens = tokens[length:]
        parts += [tokens] if tokens else []
        landed_at = min(landed_at, len(parts))
        return [
            GenerationDelta(
                token_ids=part,
                finish=finish if number == len(parts) else None,
                cached_tokens=3 if number == 0 else None,
                decode_worker="decode-0" if number == landed_at else None,
            )
            for number, part in enumerate([*parts, []])
        ]

    async def compared(self, body: dict[str, Any], steps: list[Step], *, leaves: bool = False) -> Answer:
        path = CHAT if "messages" in body else COMPLETION
        fast, plain = await both(self.served, path, {"model": self.name, **body}, steps, leaves=leaves)
        same(fast, plain, body)
        return fast


@pytest.fixture(params=["demo", "tiny"])
def model(request: pytest.FixtureRequest, demo: Served, served: Served) -> Model:
    return Model(demo if request.param == "demo" else served, request.param)


@EXAMPLES
@given(asked(), SAID, LENGTHS, FINISHES, st.lists(st.integers(1, 4), max_size=8))
async def test_one_choice(
    model: Model, body: dict[str, Any], said: Said, lengths: list[int], finish: Finish, together: list[int]
) -> None:
    """``together``: how many deltas wait at once, as they do for a client that reads slowly. Both ways join those."""
    deltas = model.deltas(said, lengths, finish, 0)
    steps: list[Step] = []
    for count in [*together, len(deltas)]:
        steps.append((0, deltas[:count]))
        deltas = deltas[count:]
    answer = await model.compared(body, [step for step in steps if step[1]])
    assert answer.status == 200 and answer.events.endswith("data: [DONE]\n\n")


@st.composite
def families(draw: st.DrawFn) -> tuple[list[tuple[Said, list[int], Finish]], int, list[int]]:
    """Several choices, the first one's delta that says where its prompt lies, and whose turn it is."""
    choices = draw(st.lists(st.tuples(SAID, LENGTHS, FINISHES), min_size=1, max_size=CHOICES_MAX))
    turns = draw(st.lists(st.integers(0, CHOICES_MAX - 1), max_size=40))
    return choices, draw(st.integers(0, 2)), turns


def interleaved(model: Model, family: tuple[list[tuple[Said, list[int], Finish]], int, list[int]]) -> list[Step]:
    """The steps of several choices. The others begin when the first one's prompt lies on a decode worker."""
    choices, landed_at, turns = family
    left = [model.deltas(*choice, landed_at) for choice in choices]
    first = next(number for number, delta in enumerate(left[0]) if delta.decode_worker)
    order = [0] * (first + 1) + [turn % len(left) for turn in turns]
    order += [index for index, deltas in enumerate(left) for _ in deltas]
    return [(index, [left[index].pop(0)]) for index in order if left[index]]


@EXAMPLES
@given(asked(), families())
async def test_several_choices(model: Model, body: dict[str, Any], family: Any) -> None:
    """Each delta comes by itself: those of several choices that wait at once are joined by who reads first."""
    answer = await model.compared(body | {"n": len(family[0]), "temperature": 1.0}, interleaved(model, family))
    assert answer.events.endswith("data: [DONE]\n\n")


@EXAMPLES
@given(asked(), families(), st.integers(0, 40), FAILURES)
async def test_a_stream_that_breaks(model: Model, body: dict[str, Any], family: Any, at: int, failure: Failure) -> None:
    """Whichever of its choices are not complete by then."""
    breaks: list[Step] = [(index, failure) for index in range(len(family[0]))]
    await model.compared(body | {"n": len(family[0]), "temperature": 1.0}, [*interleaved(model, family)[:at], *breaks])


@EXAMPLES
@given(asked(), families(), st.integers(0, 40))
async def test_a_client_that_leaves_got_the_same_until_then(
    model: Model, body: dict[str, Any], family: Any, at: int
) -> None:
    body |= {"n": len(family[0]), "temperature": 1.0}
    await model.compared(body, interleaved(model, family)[:at], leaves=True)


class Clock:
    """The loop's time, which stands still until it is moved on. What waits for it then goes on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._now_s = loop.time()

    def time(self) -> float:
        return self._now_s

    async def skip(self, seconds: float) -> None:
        """Let so much time pass."""
        self._now_s += seconds
        await quiet()


@EXAMPLES
@given(asked(), SAID, LENGTHS, FINISHES, st.lists(st.integers(0, 2), max_size=4))
async def test_a_stream_in_which_nothing_comes_for_a_while(
    model: Model, body: dict[str, Any], said: Said, lengths: list[int], finish: Finish, idle: list[int]
) -> None:
    """``idle``: how often the connection is kept alive before each delta."""
    clock, kept_alive = Clock(asyncio.get_running_loop()), 0

    async def pause() -> None:
        nonlocal kept_alive
        kept_alive += 1
        await clock.skip(KEEP_ALIVE_S)

    steps: list[Step] = []
    for delta, pauses in zip(
        model.deltas(said, lengths, finish, 0), itertools.chain(idle, itertools.repeat(0)), strict=False
    ):
        steps += [(0, pause)] * pauses
        steps.append((0, [delta]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "time", clock.time)
        patch.setattr(model.served.app.state.args, "sse_keep_alive_interval", KEEP_ALIVE_S)
        patch.setattr(model.served.app.fast_path, "_keep_alive_s", KEEP_ALIVE_S)
        answer = await model.compared(body, steps)
    assert answer.events.count(": keep-alive\n\n") * 2 == kept_alive


ATTEMPTS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 4), max_size=5)), min_size=1, max_size=4)
"""Of each: whether another worker computes the prompt, and how many tokens come at once until it breaks."""


def resumed(
    tokens: list[int], finish: Finish, attempts: list[tuple[bool, list[int]]], *, continuing: bool
) -> list[GenerationDelta]:
    """What the machine that tries again delivers. ``continuing``: behind what was delivered, not from the start."""
    bounds = {"attempts_max": len(attempts), "resumes_max": len(attempts), "output_tokens_max": TOKENS_MAX}
    play = flow_play.Play(continuing=continuing, **bounds)
    for attempt, (split, lengths) in enumerate(attempts, start=1):
        left = tokens[len(play.tokens) if continuing else 0 :]
        prefill = flow_play.P0 if split and len(left) > 1 else None
        play.tell(flow_play.planned(attempt, prefill=prefill))
        if prefill is not None:
            play.tell(flow_play.prefilled(attempt, left[0], lease=f"lease-{attempt}"))
            # Otherwise the decode worker computes it again.
            left = left[1:] if continuing else left
        last = attempt == len(attempts)
        for length in [*lengths, len(left)] if last else lengths:
            part, left = left[:length], left[length:]
            if part and (left or last):
                play.tell(flow_play.decoded(*part, attempt=attempt, finish=None if left else finish, external=8))
        if not last:
            play.tell(flow_play.failed(Stage.DECODE, attempt=attempt))
    assert play.tokens == tokens
    return [emit.delta for emit in play.all(Emit)]


@EXAMPLES
@given(asked(), SAID, FINISHES, ATTEMPTS, st.booleans())
async def test_a_stream_that_is_resumed(
    model: Model,
    body: dict[str, Any],
    said: Said,
    finish: Finish,
    attempts: list[tuple[bool, list[int]]],
    continuing: bool,
) -> None:
    deltas = resumed([*model.tokens(said), 9], finish, attempts, continuing=continuing)
    answer = await model.compared(body, [(0, [delta]) for delta in deltas])
    assert answer.events.endswith("data: [DONE]\n\n")
