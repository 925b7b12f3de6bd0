"""Kills training while it writes checkpoints and at random moments, and compares what resumes with what was not killed.

A program of its own with one thread, so that it can fork: `test_killed_runs.py` runs it. Prints one line of JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which every child would import for itself

import pyro_lvm as lvm
import pyro_lvm._files as files

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
STEPS = 16
KILLED = -signal.SIGKILL


def digest(result: lvm.FitResult) -> str:
    """Of the parameters, the batch statistics and the losses."""
    found = hashlib.sha256()
    tensors = [*result.params.values(), result.losses, *(b for module in result.modules for b in module.buffers())]
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def train(path: Path, resume: bool) -> str:
    torch.manual_seed(0)
    model = lvm.models.LinearGaussian(2, 5)
    encoder = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1))
    encoder.append(torch.nn.Linear(8, 4))
    guide = lvm.guides.DiagonalNormal(2, encoder=encoder)
    schedule = lvm.callbacks.Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99))
    callbacks = [lvm.callbacks.Checkpoint(path, every=5), schedule]
    options: dict[str, Any] = {"num_steps": STEPS, "batch_size": 16, "seed": 3, "callbacks": callbacks}
    return digest(lvm.fit(model, guide, X, resume=path if resume else None, **options))


def in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Status and what the work returned, of a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.write(writer, work().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


class Watched:
    """A file that reports each call before it is made."""

    def __init__(self, file: Any, report: Callable[[str], None]) -> None:
        self.file, self.report = file, report

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.report("close")
        self.file.close()

    def write(self, content: Any) -> int:
        self.report("write")
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()  # half of it is on disk
        self.report("half")
        return half + self.file.write(content[half:])

    def flush(self) -> None:
        self.report("flush")
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watch(report: Callable[[str], None]) -> None:
    """Report every call with which a checkpoint is written."""

    def opened(*args: Any, **options: Any) -> Watched:
        report("open")
        return Watched(open(*args, **options), report)  # noqa: SIM115

    class System:
        def __getattr__(self, name: str) -> Any:
            if name in ("fsync", "replace"):
                report(name)
            return getattr(os, name)

    files.open = opened  # type: ignore[attr-defined]
    files.os = System()  # type: ignore[assignment]


def killed_at(point: int, work: Callable[[], Any]) -> Callable[[], str]:
    """Work that is killed at its n-th call."""

    def killed() -> str:
        calls = [0]

        def report(_: str) -> None:
            if calls[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1

        watch(report)
        return str(work())

    return killed


def counted(work: Callable[[], Any]) -> list[str]:
    """The calls of some work."""

    def reported() -> str:
        calls: list[str] = []
        watch(calls.append)
        work()
        return json.dumps(calls)

    found: list[str] = json.loads(in_child(reported)[1])
    return found


def chosen(calls: list[str]) -> list[int]:
    """All calls of a run but those of writes, of which the first, one in the middle and the last of each file."""
    writes: list[int] = []
    points = []
    for point, call in enumerate(calls):
        if call in ("write", "half"):
            writes.append(point)
        else:
            points += [point, *(writes[:1] + writes[len(writes) // 2 :: len(writes)] + writes[-1:] if writes else [])]
            writes = []
    return sorted(points)


def killed_while_writing(folder: Path) -> dict[str, Any]:
    """One file in the place of another, killed at every call: the one or the other is there, whole."""
    path = folder / "file.pt"
    old, new = ({"tensors": [torch.full((100,), float(i)) for i in range(20)], "step": step} for step in (1, 2))
    found = {1: 0, 2: 0}
    calls = counted(lambda: files.write_tensors(path, "test", new))
    for point in range(len(calls)):
        files.write_tensors(path, "test", old)
        status, _ = in_child(killed_at(point, lambda: files.write_tensors(path, "test", new)))
        assert status == KILLED
        found[files.read_tensors(path, "test")["step"]] += 1
    files.write_tensors(path, "test", new)
    return {"calls": sorted(set(calls)), "points": len(calls), "old": found[1], "new": found[2]}


def killed_after(seconds: float, path: Path) -> int:
    """A run that is killed at a moment of its own choosing by nobody in it."""
    child = os.fork()
    if not child:
        train(path, resume=False)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_inside_a_write(number: int, path: Path) -> int:
    """A run that is killed from outside while its n-th write, which takes its time, is under way."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        writes = [0]

        def report(call: str) -> None:
            writes[0] += call == "half"
            if call == "half" and writes[0] == number:
                os.write(writer, b"!")
                time.sleep(60)

        watch(report)
        train(path, resume=False)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def unreadable(folder: Path) -> list[str]:
    """Files that do not load."""
    found = []
    for path in folder.iterdir():
        try:
            torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001 - a damaged file may raise anything
            found.append(path.name)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    _, expected = in_child(lambda: train(folder / "whole.pt", resume=False))
    calls = counted(lambda: train(folder / "counted.pt", resume=False))
    started = time.perf_counter()
    in_child(lambda: train(folder / "timed.pt", resume=False))
    seconds = time.perf_counter() - started
    report: dict[str, Any] = {"killed": 0, "same": 0, "resumed": 0}

    def goes_on(path: Path, status: int) -> None:
        report["killed"] += status == KILLED
        report["resumed"] += path.exists()
        _, again = in_child(lambda: train(path, resume=True))
        report["same"] += again == expected

    points = chosen(calls)
    for point in points:
        path = folder / f"point{point}.pt"
        goes_on(path, in_child(killed_at(point, lambda path=path: train(path, resume=False)))[0])
    random.seed(0)
    for run in range(15):
        path = folder / f"random{run}.pt"
        while (status := killed_after(random.uniform(0.1, 0.9) * seconds, path)) != KILLED:  # noqa: S311
            path.unlink()  # it had ended
        goes_on(path, status)
    for run in range(5):
        path = folder / f"inside{run}.pt"
        goes_on(path, killed_inside_a_write(random.randrange(1, calls.count("half")), path))  # noqa: S311
    report["file"] = killed_while_writing(folder)
    print(json.dumps(report | {"points": len(points), "files": calls.count("open"), "unreadable": unreadable(folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
