"""What holds for all tests: Ctrl-C is heard, and how long something takes is no failure."""

import multiprocessing
import signal

import pytest
from hypothesis import HealthCheck, settings

# The tests press Ctrl-C, so it must not be ignored: a job that a script starts in the background inherits that it is.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# hypothesis fails an example of more than 200 ms, which a busy machine may take for any.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="module")
def apart(request):
    """Runs a function in a process of its own, and gives its exit code; a new process takes 10 ms."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])

    def run(function, *arguments) -> int:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    return run
