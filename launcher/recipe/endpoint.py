"""Where several machines meet: launch.rdzv_endpoint."""

from __future__ import annotations


def host_and_port(endpoint: str | None) -> tuple[str, int] | None:
    """`host:29500` or `[::1]:29500` as host and port; None where it is not of that form."""
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether every machine takes this address for its own."""
    return host in ("localhost", "::1") or host.startswith("127.")
