"""Short prompts are rendered here and long ones in vLLM's thread, to the same tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams, renderer_from_config

from engine.config import EngineConfig
from front_proxy.config import ServingConfig
from front_proxy.engine_client.rendering import SHORT_CHARACTERS_MAX, render_short_here
from front_proxy.engine_client.vllm_config import render_config, serve_args

TEXTS = ["", "one two", " \x00<eos>äöü 汉字 \U0001f1e9\U0001f1ea\n", "y" * (SHORT_CHARACTERS_MAX + 1)]
LIMITS: list[dict[str, Any]] = [
    {"max_total_tokens": 4096},
    {"max_total_tokens": None},
    {"max_total_tokens": 16},
    {"max_total_tokens": 4096, "truncate_prompt_tokens": 5},
    {"max_total_tokens": 4096, "truncate_prompt_tokens": 5, "truncation_side": "left"},
    {"max_total_tokens": 4096, "add_special_tokens": False},
    {"max_total_tokens": 4096, "return_token_offsets": True},
]


@pytest.fixture(scope="module")
def args(tiny_model_folder: Path) -> Any:
    return serve_args(EngineConfig(model=str(tiny_model_folder), dtype="float32"), ServingConfig())


@pytest.fixture(scope="module")
def plain(args: Any) -> BaseRenderer[Any]:
    return renderer_from_config(render_config(args))


@pytest.fixture(scope="module")
def quick(args: Any) -> BaseRenderer[Any]:
    renderer = renderer_from_config(render_config(args))
    render_short_here(renderer, chats=True)
    return renderer


async def outcome(rendering: Any) -> Any:
    """What came of it, without times."""
    try:
        rendered = await rendering
    except Exception as error:  # noqa: BLE001 the words are compared
        return type(error), str(error)
    prompts = rendered[1] if isinstance(rendered, tuple) else rendered
    for prompt in prompts:
        del prompt["arrival_time"]
    return rendered


def handed_over(renderer: BaseRenderer[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes to vLLM's thread from now on."""
    names: list[str] = []
    submit = renderer._executor.submit

    def note(work: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(work))
        return submit(work, *args, **kwargs)

    monkeypatch.setattr(renderer._executor, "submit", note)
    return names


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("text", TEXTS)
async def test_the_tokens_are_vllms(
    plain: BaseRenderer[Any], quick: BaseRenderer[Any], text: str, limits: dict[str, Any]
) -> None:
    options = TokenizeParams(**limits)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    params = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tools": None, "tokenize": False})
    for prompts in ([{"prompt": text}], [{"prompt": text, "cache_salt": "a"}]):
        one, other = [
            await outcome(renderer.render_cmpl_async(copy.deepcopy(prompts), options)) for renderer in (plain, quick)
        ]
        assert one == other
    one, other = [await outcome(renderer.render_chat_async([chat], params, options)) for renderer in (plain, quick)]
    assert one == other


async def test_short_prompts_stay_on_the_loop(quick: BaseRenderer[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = handed_over(quick, monkeypatch)
    message = {"role": "user", "content": "one"}
    plain_options = {"add_generation_prompt": True, "tools": None, "tokenize": False}
    await quick.render_chat_async([[message]], ChatParams(chat_template_kwargs=plain_options))
    await quick.render_cmpl_async([{"prompt": "one"}])
    assert not names


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ({"content": "y" * (SHORT_CHARACTERS_MAX + 1)}, {}),
        ({"content": [{"type": "text", "text": "one"}]}, {}),
        ({"content": "one", "tool_calls": []}, {}),
        ({"content": "one"}, {"rounds": 1_000_000}),
        ({"content": "one"}, {"documents": [{"text": "two"}]}),
    ],
)
async def test_what_may_take_long_goes_to_the_thread(
    quick: BaseRenderer[Any], monkeypatch: pytest.MonkeyPatch, message: dict[str, Any], options: dict[str, Any]
) -> None:
    names = handed_over(quick, monkeypatch)
    await quick.render_chat_async(
        [[{"role": "user", **message}]],
        ChatParams(chat_template_kwargs={"tokenize": False, **options}),
        TokenizeParams(max_total_tokens=4096),
    )
    assert names


async def test_a_template_of_the_request_goes_to_the_thread(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = renderer_from_config(render_config(args))
    render_short_here(renderer, chats=False)
    names = handed_over(renderer, monkeypatch)
    await renderer.render_chat_async([[{"role": "user", "content": "one"}]], ChatParams(chat_template="{{ 1 }}"))
    assert names


CHAT_OPTIONS = {"add_generation_prompt": True, "tools": None, "tokenize": False}
CHATS = [
    [("user", "one two")],
    [("system", "Be brief."), ("user", ""), ("assistant", " a\n"), ("user", " \x00<eos>\u00e4 \u6c49\u5b57 {{ 1 }}\n")],
    [("assistant", "one"), ("system", "late")],
]


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in chat]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("content_format", ["auto", "string", "openai"])
async def test_plain_chats_become_vllms_tokens(
    plain: BaseRenderer[Any], quick: Any, content_format: Any, limits: dict[str, Any]
) -> None:
    params = ChatParams(chat_template_kwargs=CHAT_OPTIONS, chat_template_content_format=content_format)
    options = TokenizeParams(**limits)
    tokens_of = quick.plain_chats(params, options)
    assert (tokens_of is None) == ("truncate_prompt_tokens" in limits)
    for chat in CHATS if tokens_of is not None else []:
        rendered = await outcome(plain.render_chat_async([messages(chat)], params, options))
        if isinstance(rendered[0], type):
            continue  # vLLM refuses its length, and its caller knows the context
        assert tokens_of(messages(chat)) == rendered[1][0]["prompt_token_ids"]


def test_what_is_not_a_plain_chat_is_vllms(quick: Any) -> None:
    options = TokenizeParams(max_total_tokens=4096)
    tokens_of = quick.plain_chats(ChatParams(chat_template_kwargs=CHAT_OPTIONS), options)
    assert tokens_of(messages([("user", "y" * (SHORT_CHARACTERS_MAX + 1))])) is None
    # vLLM takes this line out.
    assert tokens_of(messages([("system", "x-anthropic-billing-header: cch=1\nBe brief."), ("user", "one")])) is None
    others: list[dict[str, Any]] = [{"documents": [{"text": "two"}]}, {"tools": [{}]}, {"continue_final_message": True}]
    for more in others:
        assert quick.plain_chats(ChatParams(chat_template_kwargs={**CHAT_OPTIONS, **more}), options) is None
    refusing = ChatParams(chat_template="{{ raise_exception('no') }}", chat_template_kwargs=CHAT_OPTIONS)
    refused = quick.plain_chats(refusing, options)
    assert refused is None or refused(messages([("user", "one")])) is None
