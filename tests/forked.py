"""Scripts in new processes that do not have to import torch and transformers, which takes seconds for each of them.

The processes are forks of a server that has imported the package and computed nothing. They do not show what happens
while packages are imported, such as warnings, nor follow environment variables that are read then.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["probabilistic_sam.evaluation", "probabilistic_sam.training.loop", "probabilistic_sam.data.build"]


def _run(command: list[str], directory: str | None, environment: dict[str, str], outputs: list[str]) -> None:
    """In the new process: run a script as `python SCRIPT ...` does, with one thread."""
    import torch

    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if directory:
        os.chdir(directory)
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """A script with arguments, started in one process or, as torchrun does it, in several."""

    def __init__(self, command, directory=None, environment=None, processes: int = 1):
        CONTEXT.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [str(Path(self.folder.name, name)) for name in ("stdout", "stderr")]
        for path in self.outputs:
            Path(path).touch()
        environment = dict(os.environ if environment is None else environment)
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        self.processes = []
        for rank in range(processes):
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if processes > 1 else {}
            given = (list(map(str, command)), directory and str(directory), environment | ranks, self.outputs)
            self.processes.append(CONTEXT.Process(target=_run, args=given))
            self.processes[-1].start()

    def codes(self) -> list[int | None]:
        """Exit codes, None of a process that runs and negative if a signal ended it."""
        return [process.exitcode for process in self.processes]

    def wait(self, timeout: float = 570) -> SimpleNamespace:
        """Returns `returncode`, `stdout` and `stderr`. A process that fails ends the others."""
        end = time.monotonic() + timeout
        while None in self.codes() and not any(self.codes()) and time.monotonic() < end:
            time.sleep(0.01)
        failed = list(filter(None, self.codes()))
        self.kill()
        stdout, stderr = (Path(path).read_text() for path in self.outputs)
        self.folder.cleanup()
        return SimpleNamespace(returncode=next(filter(None, failed + self.codes()), 0), stdout=stdout, stderr=stderr)

    def kill(self) -> None:
        """Kill the processes that still run."""
        for process in self.processes:
            process.kill()
            process.join()


def run_forked(*command, **options) -> SimpleNamespace:
    """Run a script and wait for its end."""
    return Forked(command, **options).wait()
