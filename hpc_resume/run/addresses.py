"""Under which addresses other nodes may reach this one."""

from __future__ import annotations

import socket


def own_addresses(*, one_node: bool) -> list[str]:
    """Return addresses under which other nodes may reach this one, the likeliest first."""
    if one_node:
        return ["127.0.0.1"]
    found: list[str] = []
    name = socket.gethostname()
    for candidate in (name, socket.getfqdn(name)):
        try:
            found += [str(info[4][0]) for info in socket.getaddrinfo(candidate, None, socket.AF_INET)]
        except OSError:
            continue
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which interface a route would take
            found.append(probe.getsockname()[0])
    except OSError:
        pass
    distinct = list(dict.fromkeys(found)) or ["127.0.0.1"]
    return sorted(distinct, key=lambda host: host.startswith("127."))
