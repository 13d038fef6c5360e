"""The page of text that the demo model learns by heart. Holds words only, never code that trains."""

from __future__ import annotations

from typing import NamedTuple


class Pair(NamedTuple):
    """One answer and the ways to ask for it."""

    questions: tuple[str, ...]
    answer: str


def _pair(questions: str, answer: str) -> Pair:
    return Pair(tuple(part.strip() for part in questions.split("|")), answer)


SERVING: tuple[Pair, ...] = (
    _pair(
        "What is prefill? | Explain prefill. | What does prefill do?",
        "Prefill reads the whole prompt at once and computes its KV cache and the first token.",
    ),
    _pair(
        "What is decode? | Explain decode. | What does decode do?",
        "Decode produces one token per step for each request, reading the KV cache every time.",
    ),
    _pair(
        "What is the KV cache? | What is a KV cache? | Explain the KV cache.",
        "The KV cache keeps the keys and values of every token, so that they are computed only once.",
    ),
    _pair(
        "What is disaggregated serving? | Explain disaggregated serving. | What does disaggregation mean?",
        "Disaggregated serving runs prefill and decode on separate workers and moves the KV cache between them.",
    ),
    _pair(
        "Why separate prefill and decode? | Why disaggregate?",
        "Prefill is bound by compute and decode by memory bandwidth. Apart, neither slows the other down.",
    ),
    _pair(
        "What is Baton? | Who is Baton?",
        "Baton serves language models with prefill and decode on separate pools. The KV cache is the baton.",
    ),
    _pair(
        "Why is it called Baton? | Where does the name come from?",
        "In a relay race one runner hands the baton to the next. Here, prefill hands the KV cache to decode.",
    ),
    _pair(
        "What is NIXL? | What does NIXL do?",
        "NIXL is a transfer library. It moves KV blocks from one worker's memory to another's.",
    ),
    _pair(
        "What does the scheduler do? | What is the scheduler?",
        "The scheduler chooses a prefill worker and a decode worker for each request, and reserves room first.",
    ),
    _pair(
        "What does the front proxy do? | What is the front proxy?",
        "The front proxy speaks HTTP and gRPC with clients and drives each request through the workers.",
    ),
    _pair(
        "What is a prefill worker? | What does a prefill worker do?",
        "A prefill worker computes the KV cache of prompts and holds it until a decode worker takes it over.",
    ),
    _pair(
        "What is a decode worker? | What does a decode worker do?",
        "A decode worker takes over a KV cache and streams the tokens of the answer.",
    ),
    _pair(
        "What is a lease? | What are leases for?",
        "A lease keeps a prompt's blocks alive until they are pulled, released or expired.",
    ),
    _pair(
        "What is an epoch? | What are epochs for?",
        "An epoch names one life of an engine. A hand-off from an earlier life is refused.",
    ),
    _pair(
        "What is a hand-off? | Explain the hand-off.",
        "A hand-off is permission to take over the KV cache of one prefilled prompt. It is used once.",
    ),
    _pair(
        "What is a block? | What is a KV block?",
        "A block holds the keys and values of a fixed number of tokens, for example thirty-two.",
    ),
    _pair(
        "What is TTFT? | What is time to first token?",
        "TTFT is the time to first token: how long a client waits before the answer begins.",
    ),
    _pair(
        "What is TPOT? | What is time per output token?",
        "TPOT is the time per output token after the first one.",
    ),
    _pair(
        "What is ITL? | What is inter-token latency?",
        "ITL is the inter-token latency: the gap between two tokens of one stream.",
    ),
    _pair(
        "What is goodput?",
        "Goodput counts only the requests that met their latency targets.",
    ),
    _pair(
        "What is throughput?",
        "Throughput is how many tokens the whole cluster produces per second.",
    ),
    _pair(
        "What is continuous batching? | Explain continuous batching.",
        "Continuous batching lets requests join and leave the running batch at every step.",
    ),
    _pair(
        "What is paged attention? | Explain paged attention.",
        "Paged attention stores the KV cache in blocks, so that memory is not wasted on gaps.",
    ),
    _pair(
        "What is prefix caching? | Explain prefix caching.",
        "Prefix caching reuses the blocks of a prompt whose beginning was computed before.",
    ),
    _pair(
        "What is chunked prefill? | Explain chunked prefill.",
        "Chunked prefill splits a long prompt into pieces that share steps with decode.",
    ),
    _pair(
        "What is vLLM? | What does vLLM do?",
        "vLLM is the engine that runs the model. Baton starts one engine in every worker.",
    ),
    _pair(
        "What is a token?",
        "A token is a piece of text with a number. Models read and write numbers.",
    ),
    _pair(
        "What is a tokenizer?",
        "A tokenizer turns text into tokens and tokens back into text.",
    ),
    _pair(
        "What is attention? | Explain attention.",
        "Attention lets each token look at the tokens before it and take what it needs.",
    ),
    _pair(
        "What is tensor parallelism?",
        "Tensor parallelism splits each layer over several devices that work together.",
    ),
    _pair(
        "What is expert parallelism?",
        "Expert parallelism places the experts of a model on different devices and sends tokens to them.",
    ),
    _pair(
        "What is a mixture of experts?",
        "A mixture of experts sends each token to a few small networks chosen by a router.",
    ),
    _pair(
        "What happens when a worker dies? | What if a worker crashes?",
        "Its leases expire, the scheduler forgets it, and unfinished requests are tried elsewhere.",
    ),
    _pair(
        "What happens when the scheduler is away? | What if the scheduler crashes?",
        "Running requests finish, and new ones use the last known view of the cluster.",
    ),
    _pair(
        "What happens when a client leaves? | What happens on cancel?",
        "The request is cancelled everywhere and its blocks are released at once.",
    ),
    _pair(
        "What does drain mean? | How does a worker drain?",
        "A draining worker finishes what it has and takes nothing new.",
    ),
    _pair(
        "What does admission control do?",
        "Admission control refuses a request early when there is no room, and says when to try again.",
    ),
    _pair(
        "Why reserve decode blocks first?",
        "A prompt that is prefilled without room on a decode worker is work thrown away.",
    ),
    _pair(
        "Where does the first token come from?",
        "The first token comes straight from the prefill worker, before the KV cache has moved.",
    ),
    _pair(
        "How do I start Baton? | How do I run Baton?",
        "Run baton up. It starts the scheduler, the workers and the front proxy.",
    ),
    _pair(
        "How do I see the cluster? | How do I check the status?",
        "Run baton status. It lists every process, its state and its blocks.",
    ),
    _pair(
        "How do I stop Baton?",
        "Press Ctrl-C once. Everything stops in order and nothing is left behind.",
    ),
    _pair(
        "Does Baton need a GPU? | Can I run on a CPU?",
        "No GPU is needed. The same code runs on a laptop CPU, only slower.",
    ),
    _pair(
        "Which API does Baton speak?",
        "Baton speaks OpenAI's API over HTTP, and its own API over gRPC.",
    ),
    _pair(
        "What are the steps of a request? | List the steps of a request.",
        "1. The front proxy asks the scheduler for a plan.\n"
        "2. The prefill worker computes the prompt and the first token.\n"
        "3. The first token goes to the client.\n"
        "4. The decode worker pulls the KV cache.\n"
        "5. The rest of the answer streams to the client.",
    ),
)

SMALL_TALK: tuple[Pair, ...] = (
    _pair("Hello! | Hi! | Hello | Hi there!", "Hello! Ask me about prefill, decode and the KV cache."),
    _pair("How are you? | How are you today?", "I am well, thank you. All my blocks are free."),
    _pair("Who are you? | What are you?", "I am a very small model that knows one page about serving by heart."),
    _pair("What is your name?", "I am called the demo model. A grand name would not fit in my weights."),
    _pair("Thank you! | Thanks!", "You are welcome."),
    _pair("Goodbye! | Bye!", "Goodbye, and mind the gap between tokens."),
    _pair("Tell me a joke. | Tell me another joke.", "A token walks into a bar. The bar asks: one step at a time?"),
    _pair("What is the capital of France?", "The capital of France is Paris."),
    _pair("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    _pair("What is two plus two? | What is 2 + 2?", "Two plus two is four."),
    _pair("Say yes. | Answer yes or no: is the sky blue?", "Yes."),
    _pair(
        "Count to ten. | Count from one to ten.",
        "One, two, three, four, five, six, seven, eight, nine, ten.",
    ),
    _pair(
        "Count to twenty. | Count from 1 to 20.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20.",
    ),
    _pair(
        "Tell me a story. | Tell me a story about a baton.",
        "Once there were two runners. The first was strong and read long prompts in one breath. The second was "
        "patient and spoke one word at a time. For years each ran the whole race alone, and both were tired. "
        "One day the first runner said: I will run the first lap and hand you what I have learned. "
        "The second runner took the baton and did not look back. They finished the race in half the time, "
        "and the crowd heard the first word before the baton had even changed hands.",
    ),
    _pair("Describe Ada as JSON. | Give me a person as JSON.", '{"name": "Ada", "age": 36}'),
    _pair("Describe Paris as JSON. | Give me a city as JSON.", '{"name": "Paris", "country": "France"}'),
    _pair(
        "Describe a worker as JSON. | Give me a worker as JSON.",
        '{"name": "decode-0", "role": "decode", "blocks": 128}',
    ),
)

THOUGHTS: tuple[Pair, ...] = (
    _pair(
        "Think: which pool should grow when TTFT is too long?",
        "<think>\nThe first token comes from prefill.\n</think>\n\nThe prefill pool should grow.",
    ),
    _pair(
        "Think: which pool should grow when ITL is too long?",
        "<think>\nThe gaps between tokens come from decode.\n</think>\n\nThe decode pool should grow.",
    ),
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You explain how language models are served.",
    "Be brief.",
)

CITIES: tuple[str, ...] = (
    "Paris", "London", "Berlin", "Tokyo", "Madrid", "Rome", "Oslo", "Vienna", "Boston", "Dublin",
    "Lisbon", "Prague",
)  # fmt: skip

SKIES: tuple[str, ...] = ("sunny", "cloudy", "windy", "raining")

TOOL_DESCRIPTIONS: tuple[str, ...] = (
    "Get the weather in a city.",
    "Get the current weather in a given location",
    "Look up the weather.",
    "Tells the weather of a place.",
)

ALL_PAIRS: tuple[Pair, ...] = SERVING + SMALL_TALK + THOUGHTS


def weather_tool(description: str, argument: str) -> dict[str, object]:
    """The function that the demo model knows how to call, as a client would declare it."""
    return {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }


# Every newline is written out, because template engines trim those around tags.
CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}{{- part if part is string else (part.text or '') -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set leads = messages and messages[0].role in ('system', 'developer') -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if leads -%}{{- text(messages[0].content) + '\n\n' -}}{%- endif -%}
  {{- 'To call a function, answer <tool_call>{"name": ..., "arguments": ...}</tool_call>. Functions:' -}}
  {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- elif leads -%}
  {{- '<|im_start|>system\n' + text(messages[0].content) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and leads -%}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' + text(message.content) + '\n</tool_response><|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\n' -}}
    {{- text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function if call.function else call -%}
      {{- '\n' if loop.index0 or message.content else '' -}}
      {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
      {{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
