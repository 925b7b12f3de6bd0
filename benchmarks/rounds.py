"""Contenders take turns: each in a process of its own, one at work at a time, in rounds.

A contender is a function of ``(problem, turn)`` that works for ever and calls ``turn(value, done)`` after each piece of
work, until that returns False. In between it waits for its next turn, so that whatever slows the machine down hits all
contenders of a round, and none has the caches, threads or compilers of another in its process. A turn starts with a
piece of work that is not timed, unless the contender's work is long.
"""

import importlib
import math
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

__all__ = ["PRELOAD", "Contender", "Turn", "growth", "measure", "peak_megabytes", "pin", "ratios", "spread"]

#: Slow to import: done once, for all processes. No JAX and no compiler, which start threads.
PRELOAD = ["torch._dynamo", "sklearn.cluster", "sklearn.datasets", "sklearn.mixture", "benchmarks.rivals.problems"]


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        name: in tables.
        function: ``"module:function"``, imported in the contender's process alone.
        problem: what it is given.
        first: pieces of work before the first turn, for compilation and whatever else happens once.
        warm: pieces of work at the start of each turn that are not timed.
    """

    name: str
    function: str
    problem: Any
    first: int = 1
    warm: int = 1


class Turn:
    """Called by a contender after each piece of work: counts, takes the clock, and waits for the next turn."""

    def __init__(self, connection: Any, first: int, warm: int = 1) -> None:
        self.connection, self.untimed, self.warm, self.wanted = connection, first, warm, 0
        self.done, self.clock = 0, 0.0

    def __call__(self, value: Any = 0.0, done: int = 1) -> bool:
        """Whether to go on. ``done`` counts in the contender's unit; ``value``, such as a loss, is read at the end."""
        self.done += done
        if self.done < (self.untimed or self.wanted):
            return True
        value = float(value)  # JAX and CUDA compute in the background until someone looks
        if self.untimed and self.wanted:
            self.untimed, self.done, self.clock = 0, 0, time.perf_counter()
            return True
        seconds = time.perf_counter() - self.clock
        self.connection.send(("turn", seconds / self.done, self.done, value) if self.wanted else ("ready",))
        self.wanted = self.connection.recv()
        self.untimed, self.done, self.clock = self.warm, 0, time.perf_counter()
        return self.wanted > 0


def _serve(connection: Any, contender: Contender) -> None:
    """What the process of a contender does."""
    try:
        module, name = contender.function.split(":")
        function = getattr(importlib.import_module(module), name)
        result = function(contender.problem, Turn(connection, contender.first, contender.warm))
        connection.send(("end", result))
    except ImportError as error:
        connection.send(("left out", f"{error.name} is not installed"))
    except Exception:
        connection.send(("left out", traceback.format_exc()))


@dataclass(eq=False)
class _Process:
    """A contender at work."""

    contender: Contender
    rounds: list[float] = field(default_factory=list)
    left_out: str = ""
    value: float = math.nan
    notes: Any = None
    size: int = 1  # pieces of work a turn

    def start(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.contender), daemon=False)
        self.process.start()
        theirs.close()  # so that a process that dies is noticed

    def receive(self) -> tuple[Any, ...]:
        """The next message; ``("left out", reason)`` where the process has died."""
        try:
            message: tuple[Any, ...] = self.connection.recv()
        except EOFError:
            message = ("left out", "its process died")
        if message[0] == "left out":
            self.left_out = message[1]
        return message

    def turn(self, size: int) -> tuple[float, int]:
        """Seconds of a piece of work, and how many there were."""
        self.connection.send(size)
        message = self.receive()
        if self.left_out:
            return math.nan, 0
        _, seconds, done, self.value = message
        return seconds, done

    def stop(self) -> None:
        """Let it end, and take what it returns."""
        if not self.left_out:
            self.connection.send(0)
            message = self.receive()
            self.notes = message[1] if message[0] == "end" else None
        self.process.join()


def measure(contenders: Sequence[Contender], rounds: int, turn_seconds: float) -> dict[str, dict[str, Any]]:
    """Times of all contenders, by name.

    Args:
        contenders: at most one of a name.
        rounds: turns of each, and one more before them, which finds out how much is done in a turn; with none, a
            contender only does what comes before its first turn.
        turn_seconds: about how long a turn lasts; it has one piece of work at least.

    Returns:
        For each contender ``rounds`` (seconds of a piece of work, one number a round), ``value`` (at the end of its
        last turn), ``notes`` (what the function returned) and ``left_out`` (empty, or why there are no times).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [_Process(contender) for contender in contenders]
    for process in processes:
        process.start(context)
    for process in processes:
        process.receive()
    for number in range(rounds + 1 if rounds else 0):
        start = number % len(processes)
        for process in processes[start:] + processes[:start]:
            if process.left_out:
                continue
            seconds, done = process.turn(process.size)
            if number == 0 and done:
                process.size = max(1, math.ceil(turn_seconds / seconds))
            elif done:
                process.rounds.append(seconds)
    for process in processes:
        process.stop()
    return {
        process.contender.name: {
            "rounds": [] if process.left_out else process.rounds,
            "value": process.value,
            "notes": process.notes,
            "left_out": process.left_out,
        }
        for process in processes
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, middle, upper = quantiles(values, method="inclusive") if len(values) > 1 else [median(values)] * 3
    return {"median": middle, "lower": lower, "upper": upper}


def ratios(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of what was divided round by round."""
    return spread([a / b for a, b in zip(top, bottom, strict=True)])


def pin() -> int:
    """Keep this process, and those that it starts, to as many cores as OMP_NUM_THREADS says; returns their number.

    Without it JAX would use all cores, whatever the others do.
    """
    cores = sorted(os.sched_getaffinity(0))
    threads = min(int(os.environ.get("OMP_NUM_THREADS", len(cores))), len(cores))
    os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def peak_megabytes() -> float:
    """The most memory that this process has held so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def growth(work: Callable[[], object]) -> float:
    """By how much the peak of memory rises, in 10^6 bytes, above what was held before."""
    before = peak_megabytes()
    work()
    return peak_megabytes() - before
