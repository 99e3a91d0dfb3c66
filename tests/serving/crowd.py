"""Clients of a server, many at once, some of them rude: they leave, read nothing, send half, ask for what cannot be.

Who asks properly must get the answer that is expected; the others what they deserve.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

Body = dict[str, Any]
KINDS = {
    "polite": 60,
    "grammar": 5,
    "leaves": 20,
    "malformed": 5,
    "long": 5,
    "reads nothing": 3,
    "sends half": 2,
}  # of 100
MALFORMED = [
    b"{",
    b"[]",
    b'{"model": "MODEL"}',
    b'{"model": "MODEL", "prompt": 5}',
    b'{"model": "MODEL", "prompt": [-1]}',
    b'{"model": "MODEL", "prompt": "a", "max_tokens": 1e400}',
    b'{"model": "MODEL", "prompt": "a", "structured_outputs": {"regex": "("}}',
    b"\xff\xfe",
]


class Crowd:
    """Clients, forty at a time, and what they found.

    polite: makes a question up, and its answer. The model's context holds 200 to 300 tokens.
    """

    def __init__(self, url: str, model: str, polite: Callable[[random.Random], tuple[Body, str]]) -> None:
        self.url = url
        self._model = model
        self._ask = polite
        self.found = Counter[str]()

    async def run(self, count: int, key: int) -> None:
        rng = random.Random(key)
        gate = asyncio.Semaphore(40)
        kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=count)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http, asyncio.TaskGroup() as group:
            for kind in kinds:
                group.create_task(self._client(gate, http, kind, random.Random(rng.random())))

    async def _client(
        self, gate: asyncio.Semaphore, http: aiohttp.ClientSession, kind: str, rng: random.Random
    ) -> None:
        act = {
            "polite": self._polite, "grammar": self._grammar, "leaves": self._leaves, "malformed": self._malformed,
            "long": self._long, "reads nothing": self._reads_nothing, "sends half": self._sends_half,
        }[kind]  # fmt: skip
        async with gate:
            while not await act(http, rng):  # the queue was full
                self.found["429"] += 1
                await asyncio.sleep(rng.uniform(0.02, 0.1))
            self.found[kind] += 1

    def _body(self, rng: random.Random, **more: object) -> Body:
        prompt = "".join(rng.choices("abc def", k=rng.randrange(1, 60)))
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": rng.randrange(1, 40),
            "stream": rng.random() < 0.5,
        } | more

    async def _post(self, http: aiohttp.ClientSession, body: Body | bytes) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url, headers = f"{self.url}/v1/completions", {"Content-Type": "application/json"}
        async with http.post(url, data=data, headers=headers) as reply:
            if reply.status == 429:
                assert int(reply.headers["Retry-After"]) >= 1
            return reply.status, await reply.text()

    async def _polite(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        asked, answer = self._ask(rng)
        body = asked | {"model": self._model, "stream": rng.random() < 0.5}
        status, text = await self._post(http, body)
        if status == 200:
            assert answer_of(text, body["stream"]) == answer, body
        return self._is_served(status, text)

    async def _grammar(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        body = self._body(rng, structured_outputs={"regex": "(ab|c){3}"})
        body["max_tokens"] = 9
        status, text = await self._post(http, body)
        if status == 200:
            assert re.fullmatch("(ab|c){3}", answer_of(text, body["stream"]))
        return self._is_served(status, text)

    async def _malformed(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        status, text = await self._post(http, rng.choice(MALFORMED).replace(b"MODEL", self._model.encode()))
        assert status == 400 and json.loads(text)["error"]["message"]
        return True

    async def _long(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        status, text = await self._post(http, self._body(rng, prompt="x y " * rng.randrange(200, 2000)))
        assert (status, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")
        return True

    async def _leaves(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        body = self._body(rng, stream=True, max_tokens=130, ignore_eos=True, n=rng.randrange(1, 3))
        async with http.post(f"{self.url}/v1/completions", json=body) as reply:
            for _ in range(rng.randrange(6)):
                await reply.content.readline()
            reply.close()
            return reply.status == 200

    async def _reads_nothing(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        """The answers are megabytes, more than lies in any buffer on the way: the server must give the client up."""
        body = self._body(rng, stream=True, max_tokens=130, ignore_eos=True, n=8, logprobs=20)
        reader, writer = await self._raw(body, whole=True)
        try:
            status = int((await reader.readline()).split()[1])
            await asyncio.sleep(1.0)
            if status == 200:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await reader.readexactly(2**26)
            return status == 200
        finally:
            writer.close()

    async def _sends_half(self, http: aiohttp.ClientSession, rng: random.Random) -> bool:
        reader, writer = await self._raw(self._body(rng), whole=False)
        assert b" 408 " in await reader.readline()
        writer.close()
        return True

    async def _raw(self, body: Body, *, whole: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
        data = json.dumps(body).encode()
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + (data if whole else data[: len(data) // 2]))
        return reader, writer

    @staticmethod
    def _is_served(status: int, text: str) -> bool:
        assert status in (200, 429), text
        return status == 200


def answer_of(text: str, stream: bool) -> str:
    if not stream:
        return json.loads(text)["choices"][0]["text"]
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2])
