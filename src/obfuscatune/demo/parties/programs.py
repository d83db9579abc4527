"""Programs on the demo's machines: commands that end, and servers that run until they are stopped."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from obfuscatune.demo.parties.machines import Machine
from obfuscatune.errors import ConnectionLost

COMMAND = (sys.executable, "-P", "-m", "obfuscatune")
START_SECONDS = 120.0
_STOP_SECONDS = 40.0
_COMMAND_SECONDS = 240.0
_TAIL_CHARS = 1500
_READ_BYTES = 64 * 1024


class CommandFailed(ConnectionLost):
    """A command of a party's ended with an error. `reason` is the line that it said."""

    def __init__(self, what: str, said: str) -> None:
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        self.reason = errors[-1] if errors else lines[-1] if lines else "no word of why"
        super().__init__(f"{what}: {self.reason}")


def run(machine: Machine, *arguments: object, module: Sequence[str] = COMMAND, log: Path | None = None) -> str:
    """Run `obfuscatune ARGUMENTS` on a machine to its end; what it printed on stdout.

    Args:
        log: a file that both its outputs are added to.

    Raises:
        CommandFailed: it ended with another exit code than 0, or not at all.
    """
    words = [str(it) for it in arguments]
    what = f"{machine.name}: obfuscatune {' '.join(words[:2])}"
    try:
        done = subprocess.run(
            [*machine.prefix, *module, *words],
            capture_output=True,
            text=True,
            env=machine.environment,
            cwd=machine.folder,
            stdin=subprocess.DEVNULL,
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(what, f"not done after {_COMMAND_SECONDS:g} s") from error
    if log is not None:
        with log.open("a") as file:
            file.write(done.stdout + done.stderr)
    if done.returncode:
        raise CommandFailed(what, done.stderr)
    return done.stdout


def run_lines(machine: Machine, *words: str, module: Sequence[str]) -> Iterator[str]:
    """As `run`, but what is printed comes line by line, as it is printed."""
    with Server(machine, "client", *words, module=module) as program:
        yield from program.lines(_COMMAND_SECONDS)
        code = program.wait()
    if code:
        raise CommandFailed(f"{machine.name}: {words[0]}", program.messages())


def run_json(machine: Machine, *arguments: object, log: Path | None = None) -> Any:
    """`run` of a command with --json; what it printed, read."""
    return json.loads(run(machine, *arguments, "--json", log=log))


class Server:
    """A program that runs until `stop`. Its outputs go to files of its machine, which a cloud's owner could read."""

    def __init__(self, machine: Machine, name: str, *arguments: object, module: Sequence[str] = COMMAND) -> None:
        """Start `obfuscatune ARGUMENTS`, or another module of ours.

        Raises:
            CommandFailed: it ended at once.
        """
        self.name, self.machine = name, machine
        self.words = [*module, *(str(it) for it in arguments)]
        self.log = machine.folder / f"{name}.log"
        self.out = machine.folder / f"{name}.out"
        with self.log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*machine.prefix, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=machine.environment,
                cwd=machine.folder,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the program: `ip netns exec` becomes it."""
        return self._process.pid

    def lines_until(self, beginning: str) -> str:
        """What it prints on stdout until there is a line that begins so.

        Raises:
            CommandFailed: it ended, or did not print such a line in time.
        """
        told = b""
        until = time.monotonic() + START_SECONDS
        while not any(it.startswith(beginning) for it in _lines(told)):
            part = self._read(max(0.0, until - time.monotonic()))
            if not part:
                raise CommandFailed(f"{self.machine.name}: {self.name}", self.messages())
            told += part
        return told.decode(errors="replace")

    def lines(self, seconds: float) -> Iterator[str]:
        """What it prints, line by line, until it ends, or for so long."""
        left = b""
        until = time.monotonic() + seconds
        while part := self._read(max(0.0, until - time.monotonic())):
            *whole, left = (left + part).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)

    def wait(self) -> int:
        """Its exit code, once it has ended; one that does not is killed."""
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _read(self, seconds: float) -> bytes:
        """What comes on stdout next; empty when nothing does."""
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], seconds)[0]:
            return b""
        part = os.read(stdout.fileno(), _READ_BYTES)
        with self.out.open("ab") as file:
            file.write(part)
        return part

    def messages(self) -> str:
        """The last of its log."""
        return self.log.read_text(errors="replace")[-_TAIL_CHARS:]

    def kill(self) -> None:
        """As a machine's owner does: no warning."""
        self._process.kill()
        self._end()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL where that does not do. Twice is once."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._end()

    def _end(self) -> None:
        self._process.wait()
        stdout = self._process.stdout
        if stdout is not None and not stdout.closed:
            while self._read(0.0):
                pass
            stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _lines(told: bytes) -> list[str]:
    """Those that have their ends."""
    return told.decode(errors="replace").split("\n")[:-1]
