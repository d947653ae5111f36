"""A real `mma serve` process and OpenAI's own client library."""

from __future__ import annotations

import asyncio
import io
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from pipeline.serving.model import MultimodalModel, load_model
from tests.pipeline.server.helpers import Served, data_url, eventually, make_model, messages, served
from tests.pipeline.serving.helpers import CONVERSATIONS, assistant, picture, user

pytestmark = pytest.mark.slow

KEY = "a-secret"
NEW = 24
REQUESTS = int(os.environ.get("SERVE_REQUESTS", "200"))
"""Requests of the test of memory; SERVE_REQUESTS=1000 runs it longer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_model(folder)
    (folder / "key.txt").write_text(f"{KEY}\n")
    (folder / "pictures").mkdir()
    (folder / "pictures/one.png").write_bytes(picture(1).read())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> MultimodalModel:
    return load_model(folder / "export")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    flags = ["--images", str(folder / "pictures"), "--api-key-file", str(folder / "key.txt"), "--name", "tiny"]
    limits = ["--max-images", "3", "--max-image-mb", "1", "--max-body-mb", "3", "--max-megapixels", "1"]
    with served(folder / "export", *flags, *limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def asked(number: int, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": messages(CONVERSATIONS[number]), "max_tokens": NEW, **options}


def metric(server: Served, name: str) -> float:
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def idle(server: Served) -> bool:
    return metric(server, "mma_requests_running") + metric(server, "mma_requests_waiting") == 0


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_answers_equal_those_of_generate(number: int, client: openai.OpenAI, model: MultimodalModel) -> None:
    prompt = model.prompt(CONVERSATIONS[number])
    ids = model.generate_ids([prompt], max_new_tokens=NEW)[0].tolist()
    whole = client.chat.completions.create(**asked(number, logprobs=True))
    choice = whole.choices[0]
    assert choice.message.content == model.answer_text(ids)
    assert [entry.id for entry in choice.logprobs.content] == ids[: len(choice.logprobs.content)]  # type: ignore
    assert choice.finish_reason == ("length" if len(ids) == NEW else "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt.encoded), len(ids))  # type: ignore
    chunks = list(client.chat.completions.create(**asked(number), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert len(chunks) > 5 and chunks[-1].usage == whole.usage


def test_log_probabilities_are_those_of_the_training_forward(client: openai.OpenAI, model: MultimodalModel) -> None:
    answer = client.chat.completions.create(**asked(1, logprobs=True, top_logprobs=5, max_tokens=1))
    (first,) = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    wanted = torch.log_softmax(model.logits(model.prompt(CONVERSATIONS[1]))[-1], -1)
    assert abs(first.logprob - wanted.max()) <= 1e-5
    assert [entry.id for entry in first.top_logprobs] == wanted.topk(5).indices.tolist()  # type: ignore[attr-defined]


def test_sampling_follows_its_seed_and_stop_strings_end_answers(client: openai.OpenAI) -> None:
    options = {"temperature": 1.2, "top_p": 0.9}
    texts = [
        client.chat.completions.create(**asked(1, seed=seed, **options)).choices[0].message.content or ""
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    stop = texts[0][5:7]
    ended = client.chat.completions.create(**asked(1, seed=1, stop=stop, **options)).choices[0]
    assert ended.finish_reason == "stop"
    assert ended.message.content == texts[0][: texts[0].index(stop)].rstrip()


def test_sixteen_clients_at_once_get_their_own_answers(server: Served, model: MultimodalModel) -> None:
    questions = [(user(picture(number), "left " * (1 + number % 5)),) for number in range(1, 17)]
    wanted = [model.generate([model.prompt(turns)], max_new_tokens=60)[0] for turns in questions]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def ask(turns: Any) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=messages(turns), max_tokens=60, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(ask, questions)))

    assert asyncio.run(ask_all()) == wanted
    assert len(set(wanted)) > 8


def test_a_client_that_leaves_is_cancelled(server: Served, client: openai.OpenAI) -> None:
    long = asked(0, max_tokens=4000, extra_body={"ignore_eos": True})
    with client.chat.completions.create(**long, stream=True) as stream:
        next(iter(stream))
        assert metric(server, "mma_requests_running") == 1
    eventually(lambda: idle(server))
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**long, timeout=1)
    eventually(lambda: idle(server))
    assert metric(server, "mma_answers_total") >= 2 and metric(server, "mma_generated_tokens_total") < 7000


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        (f"data:image/png;base64,{'A' * (2 << 20)}", 413, "image 1 of the request has more than 1 MiB"),
        (f"data:image/png;base64,{'A' * (12 << 20)}", 413, "the request has more than 3 MiB"),
        ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==", 400, "image 1 of the request cannot be used"),
        ("file:../key.txt", 400, "not a readable file"),
        ("https://example.com/cat.png", 400, "does not fetch from"),
    ],
    ids=["large-image", "large-body", "broken", "outside", "remote"],
)
def test_bad_images_are_refused(url: str, status: int, words: str, client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [image]}])  # type: ignore
    error = caught.value
    assert error.status_code == status and words in error.message
    assert error.type == "invalid_request_error"


def test_too_many_pixels_and_images_are_refused(client: openai.OpenAI) -> None:
    large = io.BytesIO()
    Image.new("L", (2000, 1000)).save(large, "PNG")
    turns = (user(*[picture(1)] * 4, "left"),)
    with pytest.raises(openai.APIStatusError, match="4 images, the limit is 3"):
        client.chat.completions.create(model="tiny", messages=messages(turns))  # type: ignore[arg-type]
    turns = (user(type(picture(1))("large", data=large.getvalue()), "left"),)
    with pytest.raises(openai.APIStatusError, match="more than 1 megapixels"):
        client.chat.completions.create(model="tiny", messages=messages(turns))  # type: ignore[arg-type]


def test_a_file_of_the_folder_is_an_image_like_any_other(client: openai.OpenAI) -> None:
    texts = [
        client.chat.completions.create(
            model="tiny",
            max_tokens=NEW,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": "what colour"},
                    ],
                }
            ],
        )
        .choices[0]
        .message.content
        for url in ("file:one.png", data_url(picture(1)))
    ]
    assert texts[0] == texts[1]


def test_a_wrong_key_is_refused(server: Served) -> None:
    for key in ("wrong", KEY + "x", "schlüssel"):
        request = urllib.request.Request(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 401
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    for call in (lambda: stranger.models.list(), lambda: stranger.chat.completions.create(**asked(2))):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            call()
    for path in ("/health", "/metrics", "/"):
        assert urllib.request.urlopen(server.url + path, timeout=10).status == 200


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model 'gpt-4o' does not exist; this server has 'tiny'"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens=5000 exceeds this server's 4096"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty=1 is not supported"),
        ({"messages": messages([user("left " * 9000)])}, openai.BadRequestError, "more than the model's 8192"),
        ({"messages": messages([user("a"), assistant("b")])}, openai.BadRequestError, "last message must be the user"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    options: dict[str, Any], error: type[openai.APIStatusError], words: str, client: openai.OpenAI
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**asked(2, **options))
    assert words in str(caught.value) and "Traceback" not in str(caught.value)
    assert caught.value.body["message"].count("\n") == 0  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "method", "kind", "body", "status"),
    [
        ("/v1/chat/completions", "POST", "text/plain", b"{}", 415),
        ("/v1/chat/completions", "POST", "application/json", b"{", 400),
        ("/v1/chat/completions", "GET", "application/json", None, 405),
        ("/v1/embeddings", "POST", "application/json", b"{}", 404),
        ("/docs", "GET", "", None, 404),
        ("/v1/models/other", "GET", "", None, 404),
    ],
)
def test_other_requests_get_an_error_of_the_same_shape(
    path: str, method: str, kind: str, body: bytes | None, status: int, server: Served
) -> None:
    headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == status
    assert caught.value.read().startswith(b'{"error":{"message":"')


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").mask_policy == "mma"  # type: ignore[attr-defined]


def test_memory_stays_flat(server: Served, client: openai.OpenAI) -> None:
    """After a warm-up, many requests of all kinds leave the server's memory as it was."""
    questions = [asked(number % 4, stream=number % 2 == 0, max_tokens=4) for number in range(8)]

    def ask(share: int, requests: int) -> None:
        for number in range(share, requests, 8):
            answer = client.chat.completions.create(**questions[number % 8])
            if number % 2 == 0:
                list(answer)

    def memory_after(requests: int) -> float:
        threads = [threading.Thread(target=ask, args=(share, requests)) for share in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: idle(server))
        return server.resident_mib()

    warm = memory_after(REQUESTS // 4)
    after = memory_after(REQUESTS)
    print(f"resident memory: {warm:.1f} MiB, after {REQUESTS} more requests {after:.1f} MiB")
    assert after - warm < 8


def test_a_full_server_asks_to_come_back_and_a_stopped_one_finishes(folder: Path) -> None:
    with served(folder / "export", "--batch", "1", "--queue", "1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        long = {**asked(0, max_tokens=400, extra_body={"ignore_eos": True}), "model": name, "stream": True}
        streams = [client.chat.completions.create(**long)]
        next(iter(streams[0]))
        texts: list[list[Any]] = []
        waiting = threading.Thread(target=lambda: texts.append(list(client.chat.completions.create(**long))))
        waiting.start()
        eventually(lambda: metric(server, "mma_requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError, match="busy") as full:
            client.chat.completions.create(**{**long, "messages": messages([user(picture(1), "left")])})
        assert int(full.value.response.headers["retry-after"]) >= 1
        server.stop()
        eventually(lambda: urllib_status(f"{server.url}/health") == 503)
        with pytest.raises(openai.InternalServerError, match="stopping"):
            client.chat.completions.create(**long)
        chunks = list(streams[0])
        waiting.join()
        assert [one[-1].choices[0].finish_reason for one in (chunks, *texts)] == ["length", "length"]
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None and server.process.stderr.read() == ""


def urllib_status(url: str) -> int:
    try:
        return int(urllib.request.urlopen(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_server_out_of_grace_says_so(folder: Path) -> None:
    with served(folder / "export", "--grace", "0.1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            **{**asked(0, max_tokens=4000, extra_body={"ignore_eos": True}), "model": "export"}, stream=True
        )
        next(iter(stream))
        server.stop()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert server.process.wait(20) == 0
