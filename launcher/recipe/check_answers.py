"""Checks of what answers: the checkpoint, the files of `generate`, the address of `serve`."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from checkpoints.adapters import find_bases
from checkpoints.beside import beside
from checkpoints.folder import CheckpointError
from checkpoints.recognise import checkpoint_in, recognise
from launcher.recipe.check_checkpoint import another_model
from launcher.recipe.check_run import existing, writable
from launcher.recipe.inference import describes_model
from launcher.recipe.problem import Case, Problem

_EXAMPLE = '{"query": "What is a list?"}'


def checkpoint(case: Case) -> Iterator[Problem]:
    """generate.load names a checkpoint, and of adapters the weights that they stand beside are there too."""
    if case.recipe.generate.load is None:
        return
    try:
        found = checkpoint_in(Path(case.recipe.generate.load))
        if not (found / "recipe.yaml").is_file():
            config = case.recipe.convert.hf_config
            said = beside(recognise(found), Path(config) if config else None)
            if said.model is not None and describes_model(case):
                yield from another_model(case, said, "generate.load")
        find_bases(found)
    except CheckpointError as error:
        yield Problem(str(error), case.at("generate.load"), error.fix or "generate.load=RUN_OR_CHECKPOINT")


def files(case: Case) -> Iterator[Problem]:
    """There are prompts, and the answers have a place that is not theirs."""
    from data_tools.errors import InputError
    from data_tools.sources import check_readable

    options = case.recipe.generate
    if options.input is None:
        yield Problem("generate.input is not given", "command line", f"--input FILE.jsonl, with {_EXAMPLE} on each line")
    else:
        try:
            check_readable(Path(options.input))
            if Path(options.input).stat().st_size == 0:
                yield Problem("the input is empty", case.at("generate.input"), f"write {_EXAMPLE} on each line")
        except InputError as error:
            yield Problem(error.what, case.at("generate.input"), error.fix)
    output = Path(options.output)
    if output.is_dir():
        yield Problem(f"{output} is a folder", case.at("generate.output"), "give the name of a file")
    elif not writable(there := existing(output.parent)):
        yield Problem(f"the answers cannot be written: {there} takes no files", case.at("generate.output"), "give another --output")
    elif options.input is not None and output.resolve() == Path(options.input).resolve():
        yield Problem("the answers would replace the prompts", case.at("generate.output"), "give another --output")


def address(case: Case) -> Iterator[Problem]:
    """serve.host is an address of this machine, and serve.port a free port there."""
    host, port = case.recipe.serve.host, case.recipe.serve.port
    if port > 65535:
        yield Problem(f"serve.port must be at most 65535, not {port}", case.at("serve.port"), "serve.port=8000")
    if not 1 <= port <= 65535 or (fault := _refusal(host, port)) is None:
        return
    if isinstance(fault, socket.gaierror) or fault.errno == errno.EADDRNOTAVAIL:
        what, fix = f"{host} is no address of this machine", "serve.host=127.0.0.1, or 0.0.0.0 for every one of its addresses"
        yield Problem(what, case.at("serve.host"), fix)
        return
    free = next((other for other in range(max(port + 1, 8000), 65536) if _refusal(host, other) is None), None)
    what = f"port {port} is taken by another process" if fault.errno == errno.EADDRINUSE else f"port {port}: {fault.strerror}"
    yield Problem(what, case.at("serve.port"), f"serve.port={free}, which is free" if free else "end the process that has it")


def _refusal(host: str, port: int) -> OSError | None:
    """Why this address cannot be listened on now; None where it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does, past connections that just ended
            listener.bind(address)
    except OSError as error:
        return error
    return None
