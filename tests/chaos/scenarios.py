"""What may happen to a server: each scenario does it to a running one, checks what must hold, returns what it measured.

Used small by ``test_chaos.py`` and large by ``python -m tests.chaos.run``.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import Any

import psutil

from tests.chaos.client import Answer, Call, ask, completion
from tests.chaos.process import WAIT_S, ServerProcess

Figures = dict[str, float]


async def all_streams(server: ServerProcess, count: int, max_tokens: int, **more: Any) -> list[Answer]:
    return list(await asyncio.gather(*(stream(server, index, max_tokens, **more) for index in range(count))))


async def stream(server: ServerProcess, index: int, max_tokens: int, on_event: Any = None, **more: Any) -> Answer:
    call = await Call.send(server.port, "/v1/completions", completion(index, max_tokens, **more))
    return await call.answer(on_event)


def check_complete(answers: list[Answer]) -> None:
    for index, answer in enumerate(answers):
        assert answer.status == 200, f"stream {index}: {answer.status} {answer.error}"
        assert answer.error is None and answer.is_complete, f"stream {index}: {answer.error}"
        assert answer.finish_reason == "length", f"stream {index}: {answer.finish_reason}"


async def kill_under_streams(server: ServerProcess, count: int, max_tokens: int, kills: int = 1) -> Figures:
    """kill -9 of the engine while streams run: every text as if nothing had happened, greedy and seeded."""
    # Sampled ones among few tokens: where 49,000 are about equally likely, the last bit of a sum decides.
    sampling: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7, "top_k": 4},
        {"temperature": 0.8, "seed": 8, "top_k": 4, "presence_penalty": 1.0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 0, "min_tokens": max_tokens - 3, "stop": ["e"], "ignore_eos": False},
    ]
    usage = {"stream_options": {"include_usage": True}}

    async def run(on_event: Any = None) -> list[Answer]:
        mix = [sampling[index % len(sampling) if index % 3 == 0 else 0] for index in range(count)]
        tasks = [stream(server, index, max_tokens, on_event, **mix[index], **usage) for index in range(count)]
        return list(await asyncio.gather(*tasks))

    undisturbed = await run()
    await server.until_idle()
    num_events = 0
    restarts = await server.gauge("octavo:engine_restarts_total")

    def count_event(_answer: Answer) -> None:
        nonlocal num_events
        num_events += 1

    running = asyncio.create_task(run(count_event))
    gap_s = 0.0
    total = sum(len(answer.events) for answer in undisturbed)
    for kill in range(kills):
        while num_events < total * (kill + 1) / (kills + 2) and not running.done():
            await asyncio.sleep(0.005)
        await server.kill_engine()
        died_s = time.monotonic()
        await server.until(503, "/readyz")  # tokens that were on their way still come before it is noticed
        await server.until(200, "/readyz")
        gap_s = max(gap_s, time.monotonic() - died_s)
    disturbed = await running
    for index, (was, now) in enumerate(zip(undisturbed, disturbed, strict=True)):
        assert now.error is None and now.is_complete, f"stream {index}: {now.error}"
        assert now.text == was.text, f"stream {index}: {was.text!r} became {now.text!r}"
        assert now.finish_reason == was.finish_reason
        assert usage_of(now) == usage_of(was), f"stream {index}: {usage_of(was)} became {usage_of(now)}"
        assert logprob_tokens(now) == logprob_tokens(was), f"stream {index}"
    await server.until_idle()
    async with asyncio.timeout(WAIT_S):  # a sibling of the process that counts hears of it once a second
        while (seen := await server.gauge("octavo:engine_restarts_total")) < restarts + kills:
            await asyncio.sleep(0.1)
    assert seen == restarts + kills
    assert await server.gauge("octavo:requests_replayed_total") > 0
    return {
        "streams": count,
        "longest gap of a stream, s": max(answer.longest_gap_s for answer in disturbed),
        "until ready again, s": gap_s,
    }


def usage_of(answer: Answer) -> tuple[int, int]:
    usage = answer.events[-1]["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"]


def logprob_tokens(answer: Answer) -> list[str]:
    found: list[str] = []
    for event in answer.events:
        if event.get("choices") and event["choices"][0].get("logprobs"):
            found += event["choices"][0]["logprobs"]["tokens"]
    return found


async def vanishing_clients(server: ServerProcess, count: int, max_tokens: int, seed: int = 0) -> Figures:
    """Clients that go at random moments: streaming or not, alone or n = 3, waiting or running, within the body."""
    rng = random.Random(seed)
    good = asyncio.create_task(all_streams(server, 3, max_tokens))

    async def vanish(index: int) -> None:
        await asyncio.sleep(rng.random() * 0.5)
        body = completion(index, max_tokens, stream=rng.random() < 0.6, n=rng.choice([1, 1, 3]))
        path, data = "/v1/completions", body
        if rng.random() < 0.3:
            del data["prompt"]
            path, data = "/v1/chat/completions", {**data, "messages": [{"role": "user", "content": f"Hi {index}"}]}
        if rng.random() < 0.1:
            call = await Call.send(server.port, path, b'{"model": "m", ', headers={"Expect": "100-continue"})
        else:
            call = await Call.send(server.port, path, data)
        await asyncio.sleep(rng.random() ** 2 * 2)
        await call.vanish()

    await asyncio.gather(*(vanish(index) for index in range(count)))
    check_complete(await good)
    freed_s = await server.until_idle()
    answer = await ask(server.port, "/load")
    assert answer.json == {"server_load": 0}
    return {"clients": count, "until every block is back, s": freed_s}


async def sigterm_under_load(server: ServerProcess, count: int, max_tokens: int) -> Figures:
    """SIGTERM while streams run and others are about to come: all that was accepted is finished, the rest told so."""
    begun = asyncio.Event()
    streams = asyncio.create_task(all_streams(server, count, max_tokens, on_event=lambda _: begun.set()))
    await begun.wait()
    sent_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await server.until(503, "/readyz")
    late = await ask(server.port, "/v1/completions", completion(999, 5))
    assert late.status == 503 and int(late.headers["retry-after"]) >= 1, late
    assert (await ask(server.port, "/livez")).status == 200
    check_complete(await streams)
    done_s = time.monotonic()
    assert await asyncio.to_thread(server.wait) == 0, server.tail()
    return {"streams": count, "drain, s": done_s - sent_s, "exit after the last token, s": time.monotonic() - done_s}


async def more_connections_than_files(server: ServerProcess, max_files: int) -> Figures:
    """Clients open twice as many connections as the server may have files: it takes what it can, tells the others at
    once, goes on with the stream that runs, and is well when they have gone."""
    running = asyncio.create_task(stream(server, 0, 200))
    held: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    refused = accepted = 0
    try:
        for _ in range(2 * max_files):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            held.append((reader, writer))
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")  # and stays
        for reader, _ in held:
            try:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            except (asyncio.IncompleteReadError, ConnectionError):
                head = b"HTTP/1.1 503 the connection was closed\r\nretry-after: 1"
            accepted += head.startswith(b"HTTP/1.1 200")
            if head.startswith(b"HTTP/1.1 503"):
                refused += 1
                assert b"retry-after" in head.lower()
        check_complete([await running])
    finally:
        for _, writer in held:
            writer.transport.abort()
    assert accepted >= max_files / 4, f"{accepted} of {len(held)} connections were taken"
    assert refused >= len(held) - max_files and accepted + refused == len(held), (accepted, refused)
    await server.until(200, "/livez")
    check_complete(await all_streams(server, 20, 10))
    assert "Traceback" not in server.log.read_text() and "Too many open files" not in server.log.read_text()
    return {"connections taken": accepted, "told that there are too many": refused}


async def second_sigterm(server: ServerProcess) -> Figures:
    """The second signal ends what the first let run."""
    begun = asyncio.Event()

    async def endless(index: int) -> None:
        try:
            answer = await stream(server, index, 1500, lambda _: begun.set())
            assert not answer.is_complete or answer.error is not None
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    streams = asyncio.gather(*(endless(index) for index in range(4)))
    await begun.wait()
    server.process.send_signal(signal.SIGTERM)
    await server.until(503, "/readyz")
    sent_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(server.wait)
    assert status == 128 + signal.SIGTERM, server.tail()
    await streams
    return {"exit after the second signal, s": time.monotonic() - sent_s}


async def hung_engine(server: ServerProcess, count: int, max_tokens: int) -> Figures:
    """SIGSTOP of the engine: noticed, told, described in the log, ended; streams go on with the next one."""
    undisturbed = await all_streams(server, count, max_tokens)
    begun = asyncio.Event()
    streams = asyncio.create_task(all_streams(server, count, max_tokens, on_event=lambda _: begun.set()))
    await begun.wait()
    stopped_s = time.monotonic()
    pid = await server.kill_engine(signal.SIGSTOP)
    noticed_s = await server.until(503, "/health")
    health = await ask(server.port, "/health")
    assert health.status == 503 and health.error is not None and "no step has finished" in health.error["message"]
    assert (await ask(server.port, "/livez")).status == 200
    disturbed = await streams
    check_complete(disturbed)
    assert [answer.text for answer in disturbed] == [answer.text for answer in undisturbed]
    assert not psutil.pid_exists(pid)
    log = server.log.read_text()
    assert "has finished no step for" in log and "most recent call first" in log and "stopped" in log
    return {"streams": count, "until /health says so, s": noticed_s, "until all done, s": time.monotonic() - stopped_s}


async def three_deaths(server: ServerProcess) -> Figures:
    """The third death within ten minutes is the last: status 70, the cause as last line, streams told."""
    endless = asyncio.gather(*(stream(server, index, 1500) for index in range(3)), return_exceptions=True)
    for death in range(3):
        if death:
            await server.until_ready()
        await server.kill_engine()
        if death < 2:
            await server.until(503, "/readyz")
    died_s = time.monotonic()
    assert await asyncio.to_thread(server.wait) == 70, server.tail()
    for answer in await endless:
        assert isinstance(answer, Exception) or answer.error is not None, answer
    last = server.log.read_text().strip().splitlines()[-1]
    assert "3 times within 10 minutes" in last and "signal 9" in last, last
    return {"exit after the third death, s": time.monotonic() - died_s}


async def idle_cpu(server: ServerProcess, seconds: float) -> Figures:
    """CPU time of all processes of a server that nobody asks anything, as a share of one core."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    await asyncio.sleep(1.0)

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    before, begin = used(), time.monotonic()
    await asyncio.sleep(seconds)
    return {"idle CPU, % of one core": 100 * (used() - before) / (time.monotonic() - begin)}


async def requests_of_siblings(server: ServerProcess, count: int) -> None:
    """Whichever HTTP process is asked: it tells of the requests of all, and ends them. One id may run in several."""
    shown: dict[int, str] = {}

    async def open_one(index: int, request_id: str, begun: asyncio.Event) -> Answer:
        def on_event(answer: Answer) -> None:
            shown[index] = answer.events[0]["id"]
            begun.set()

        body = completion(1, 2000)
        call = await Call.send(server.port, "/v1/completions", body, headers={"X-Request-Id": request_id})
        return await call.answer(on_event)

    names = [*(f"mine-{index}" for index in range(count)), *["same"] * count]
    events = [asyncio.Event() for _ in names]
    running = [
        asyncio.create_task(open_one(index, name, begun))
        for index, (name, begun) in enumerate(zip(names, events, strict=True))
    ]
    await asyncio.gather(*(begun.wait() for begun in events))
    async with asyncio.timeout(WAIT_S):  # siblings hear of each other once a second
        while (await ask(server.port, "/load")).json["server_load"] < len(names):
            await asyncio.sleep(0.1)
    for name in names[:count]:
        timeline = await ask(server.port, f"/v1/requests/{name}/timeline")
        assert timeline.status == 200, timeline.error
        assert [each["status"] for each in timeline.json["sequences"]] == ["running"]
        aborted = await ask(server.port, f"/v1/requests/{name}/abort", {})
        assert aborted.status == 200, aborted.error
    assert (await ask(server.port, "/v1/requests/mine/abort", {})).status == 404
    left = {"nobody", *shown.values()} - {f"cmpl-{name}" for name in names[:count]}
    while found := (await ask(server.port, "/abort_requests", {"request_ids": sorted(left)})).json["aborted"]:
        assert "nobody" not in found  # again, for a process ends one of its own before a sibling's of that name
    answers = await asyncio.gather(*running)
    assert [(answer.status, answer.finish_reason) for answer in answers] == [(200, "abort")] * len(names)
    await server.until_idle()


async def several_http_processes(server: ServerProcess, count: int, max_tokens: int) -> Figures:
    """The engine dies under all HTTP processes, then one of these does: the others' streams never notice the latter."""
    figures = await kill_under_streams(server, count, max_tokens)
    answers: dict[int, Answer | BaseException] = {}
    begun = asyncio.Semaphore(0)

    async def run(index: int) -> None:
        try:
            answers[index] = await stream(server, index, 4 * max_tokens, lambda _: begun.release())
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            answers[index] = error

    tasks = [asyncio.create_task(run(index)) for index in range(count)]
    for _ in range(count):
        await begun.acquire()
    victim = server.workers()[0]
    os.kill(victim, signal.SIGKILL)
    await asyncio.gather(*tasks)
    lost = [each for each in answers.values() if isinstance(each, BaseException)]
    check_complete([each for each in answers.values() if isinstance(each, Answer)])
    assert len(lost) < count, "all streams were on one process"
    await server.until_ready()
    async with asyncio.timeout(WAIT_S):
        while len(server.workers()) < 2:
            await asyncio.sleep(0.05)
    await server.until_idle()
    check_complete(await all_streams(server, count, 5))
    return {**figures, "streams lost with their HTTP process": len(lost)}
