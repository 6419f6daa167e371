"""What holds for all tests: Ctrl-C is heard, and how long something takes is no failure."""

import signal

from hypothesis import HealthCheck, settings

# The tests press Ctrl-C, so it must not be ignored: a job that a script starts in the background inherits that it is.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# hypothesis fails an example of more than 200 ms, which a busy machine may take for any.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
