#!/usr/bin/env python3
"""Load for as long as wanted: streams, short requests and clients that vanish, then the way back to the baseline.

    python3 .ci/soak.py            the long form: 1,000 streams for a minute, 20,000 connections, 500 that vanish, and
                                   five minutes of mixed traffic with drops and faults
    python3 .ci/soak.py --short    a tenth of it, and six seconds
    python3 .ci/soak.py --mixed    the mixed traffic alone

It fails when a healthy request fails, when a fault of the upstream does not arrive as one, when an abandoned call
upstream is not closed within a second, or when memory, threads or descriptors of the gateway do not come back; those
of the mixed traffic are compared with what they were after its first fifth.
"""
from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from bench import Target, many_streams, read_answer, start_gateway, start_upstream, status_of


def figures(pid: int) -> tuple[float, int, int]:
    """Memory in MB, threads, descriptors."""
    return status_of(pid, "VmRSS") / 1024, status_of(pid, "Threads"), len(os.listdir("/proc/%d/fd" % pid))


async def one_after_the_other(target: Target, count: int) -> None:
    for _ in range(count):
        reader, writer = await target.connect()
        writer.write(target.request("bench:plain", False))
        assert b"quick" in await read_answer(reader)
        writer.close()


async def vanishing(target: Target, count: int, dice: random.Random) -> None:
    async def client() -> None:
        reader, writer = await target.connect()
        data = target.request(dice.choice(["bench:hold", "bench:silent", "bench:drip 50 0.1"]), dice.random() < 0.7)
        writer.write(data[:dice.choice([10, len(data) // 2, len(data), len(data)])])
        await asyncio.sleep(dice.random())
        writer.transport.abort()
    await asyncio.gather(*(client() for _ in range(count)))


# what a client may ask for in the mixed traffic: the order, whether as a stream, and what the answer must hold
HEALTHY = (("bench:plain", False, b"quick"), ("bench:plain", True, b"[DONE]"), ("bench:burst 200", True, b"[DONE]"),
           ("bench:drip 20 0.02", True, b"[DONE]"), ("bench:drip 5 0.02", False, b"quick"))
FAULTY = (("bench:refuse 500", False), ("bench:refuse 529", True), ("bench:refuse 999", True), ("bench:junk", False),
          ("bench:junk", True), ("bench:cut", False), ("bench:cut", True))


async def mixed(target: Target, clients: int, seconds: float, seed: int) -> list[int]:
    """Clients that ask, stay or vanish until the time is up; how many answers were whole, failed and left behind."""
    dice, until, counts = random.Random(seed), time.monotonic() + seconds, [0, 0, 0]

    async def asked(order: str, stream: bool) -> bytes:
        reader, writer = await target.connect()
        try:
            writer.write(target.request(order, stream, "x" * dice.choice([0, 0, 1_000, 100_000])))
            return await asyncio.wait_for(read_answer(reader), 60)
        finally:
            writer.close()

    async def client() -> None:
        while time.monotonic() < until:
            turn = dice.random()
            if turn < 0.2:
                await vanishing(target, 1, dice)
                counts[2] += 1
            elif turn < 0.4:
                order, stream = dice.choice(FAULTY)
                try:
                    assert b'"error"' in await asked(order, stream), order
                except RuntimeError as failure:         # a status that is not 200
                    assert '"error"' in str(failure), failure
                counts[1] += 1
            else:
                order, stream, wanted = dice.choice(HEALTHY)
                assert wanted in await asked(order, stream), order
                counts[0] += 1
    await asyncio.gather(*(client() for _ in range(clients)))
    return counts


def long_traffic(target: Target, pid: int, seconds: float) -> None:
    """The mixed traffic, and the figures after a fifth of it and at its end."""
    figures_then = []
    for share, seed in ((0.2, 1), (0.8, 2)):
        counts = asyncio.run(mixed(target, 20, seconds * share, seed))
        time.sleep(2)
        figures_then.append(figures(pid))
    before, after = figures_then
    assert after[1] <= before[1] + 3 and after[2] <= before[2] + 10, "threads or descriptors grow: %s to %s" % (
        before, after)
    assert after[0] <= before[0] * 1.1 + 5, "memory grows: %s to %s" % (before, after)
    print("soak: mixed traffic for %d s, in its last part %d whole, %d failed as they should, %d left; memory "
          "%.0f -> %.0f MB, threads %d -> %d, descriptors %d -> %d" % (
              seconds, *counts, *(each for pair in zip(before, after) for each in pair)))


def established(port: int) -> int:
    """Connections to the upstream that are still open."""
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return sum(row[3] == "01" and int(row[2].split(":")[1], 16) == port for row in rows)


def main() -> None:
    short, mixed_only = "--short" in sys.argv, "--mixed" in sys.argv
    share = 10 if short else 1
    fake, port = start_upstream(None)
    gateway, url, _ = start_gateway("http://127.0.0.1:%d" % port, None)
    target = Target(url, False)
    try:
        long_traffic(target, gateway.pid, 6 if short else 300)
        if mixed_only:
            return
        asyncio.run(one_after_the_other(target, 200))
        asyncio.run(many_streams(target, 50, 5, 0.01))
        time.sleep(1)
        before = figures(gateway.pid)
        result = asyncio.run(many_streams(target, 1000 // share, 600 // share, 0.1))
        assert result["whole"] == 1000 // share, "only %d streams arrived whole" % result["whole"]
        asyncio.run(one_after_the_other(target, 20_000 // share))
        asyncio.run(vanishing(target, 500 // share, random.Random(7)))
        time.sleep(1)
        left = established(port)
        # the pool keeps 32 idle ones
        assert left <= 40, "%d calls upstream are open a second after their clients left" % left
        asyncio.run(one_after_the_other(target, 20))
        until = time.monotonic() + 20
        while True:
            after = figures(gateway.pid)
            if after[1] <= before[1] + 3 and after[2] <= before[2] + 45:
                break
            assert time.monotonic() < until, "threads and descriptors did not come back: %s to %s" % (before, after)
            time.sleep(0.2)
        assert after[0] <= before[0] * 1.5 + 30, "memory did not come back: %s to %s" % (before, after)
        print("soak: %d streams whole (p99 delay %.0f ms), %d connections, %d vanished; memory %.0f -> %.0f MB, "
              "threads %d -> %d, descriptors %d -> %d" % (result["whole"], 1000 * result["p99_delay"], 20_000 // share,
                                                  500 // share, before[0], after[0], before[1], after[1], before[2],
                                                  after[2]))
    finally:
        for process in (gateway, fake):
            process.send_signal(signal.SIGTERM)
            process.wait(35)


if __name__ == "__main__":
    main()
