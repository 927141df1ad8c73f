"""Runs in the machine: the official SDKs, unmodified, with nothing but the environment that the
machine gave them. Usage: drive.py talk | drive.py exhaust"""

import asyncio
import os
import sys

import anthropic
import openai

ASK = [{"role": "user", "content": "say something"}]
GPT = {"model": "gpt-test", "messages": ASK}
CLAUDE = {"model": "claude-test", "messages": ASK, "max_tokens": 64}
RESPONSE = {"model": "gpt-test", "input": "say something"}


def check(what, said, tokens):
    """An answer has words and tells of its tokens."""
    assert said.split()[:2] == ["a", "vendor"], (what, said)
    assert tokens is not None and tokens > 0, what
    print(f"{what}: {len(said.split())} words, {tokens} tokens")


def chat(client):
    whole = client.chat.completions.create(**GPT, max_completion_tokens=64)
    check("chat", whole.choices[0].message.content, whole.usage.total_tokens)

    said, usage = "", None
    with client.chat.completions.create(
        **GPT, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
    check("chat, streamed", said, usage.total_tokens)

    # Who does not ask for usage gets no chunk of it, though the host does.
    stream = client.chat.completions.create(**GPT, stream=True)
    chunks = list(stream)
    assert chunks and all(chunk.choices and chunk.usage is None for chunk in chunks)


def responses(client):
    whole = client.responses.create(**RESPONSE, max_output_tokens=64)
    check("response", whole.output_text, whole.usage.total_tokens)

    with client.responses.stream(**RESPONSE) as stream:
        said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == said
    check("response, streamed", said, final.usage.total_tokens)


def messages(client):
    whole = client.messages.create(**CLAUDE)
    check("message", whole.content[0].text, whole.usage.output_tokens)

    with client.messages.stream(**CLAUDE) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == said
    check("message, streamed", said, final.usage.output_tokens)

    kinds = [event.type for event in client.messages.create(**CLAUDE, stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds


async def at_once():
    """Several at a time, of both vendors."""
    async with openai.AsyncOpenAI() as gpt, anthropic.AsyncAnthropic() as claude:
        answers = await asyncio.gather(
            *(gpt.chat.completions.create(**GPT) for _ in range(4)),
            *(claude.messages.create(**CLAUDE) for _ in range(4)),
        )
    assert len(answers) == 8
    print("eight at once")


def refusals(gpt, claude):
    """What the host does not allow is the vendor's own exception."""
    for ask, kind in [
        (lambda: gpt.chat.completions.create(model="other", messages=ASK), openai.NotFoundError),
        (lambda: gpt.responses.create(model="other", input="x"), openai.NotFoundError),
        (lambda: claude.messages.create(model="other", messages=ASK, max_tokens=9), anthropic.NotFoundError),
    ]:
        try:
            ask()
        except kind as error:
            print(f"{kind.__module__}.{kind.__name__}: {error}")
        else:
            raise AssertionError("a model that nobody allowed")


def exhaust(gpt, claude):
    """Asks in every way until nothing is left, and looks how that is said."""
    first = True
    for ask, kind in [
        (lambda: gpt.chat.completions.create(**GPT, max_completion_tokens=100), openai.RateLimitError),
        (lambda: gpt.chat.completions.create(**GPT, stream=True), openai.RateLimitError),
        (lambda: gpt.responses.create(**RESPONSE), openai.RateLimitError),
        (lambda: gpt.responses.create(**RESPONSE, stream=True), openai.RateLimitError),
        (lambda: claude.messages.create(**CLAUDE), anthropic.RateLimitError),
        (lambda: claude.messages.create(**CLAUDE, stream=True), anthropic.RateLimitError),
    ]:
        calls = 0
        try:
            # What is too little for one way may do for another.
            while calls < 1000:
                answer = ask()
                # A stream is spent when it is read.
                for _ in answer if hasattr(answer, "response") else []:
                    pass
                calls += 1
        except kind as error:
            assert error.status_code == 429, error
            said = error.body["error"]["type"] if kind is anthropic.RateLimitError else error.code
            assert said in ("insufficient_quota", "rate_limit_error"), error.body
            assert calls > 0 or not first, "nothing was left from the beginning"
            print(f"after {calls} calls {kind.__module__}.{kind.__name__}: {error}")
        else:
            raise AssertionError("there is no end to this budget")
        first = False


def main():
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}")
    for name in ["OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"]:
        print(f"{name}={os.environ[name]}")
    gpt, claude = openai.OpenAI(), anthropic.Anthropic()
    if sys.argv[1] == "talk":
        chat(gpt)
        responses(gpt)
        messages(claude)
        refusals(gpt, claude)
        asyncio.run(at_once())
    elif sys.argv[1] == "exhaust":
        exhaust(gpt, claude)
    else:
        raise SystemExit(__doc__)


main()
