"""Ports for the ranks to meet at."""

import random
import socket

# Below those that Linux and macOS give to clients (32768 and 49152 on): any connection on the
# machine could take one of those before the first rank listens, seconds later.
MEETING_PORTS = range(10000, 20000)
# For runs under Slurm, whose ranks meet on another machine, where no port can be tried.
UNTRIED_PORTS = range(20000, 30000)


def free_port() -> int:
    """A TCP port that nothing listens on here, and that nobody is given unasked.

    Another program may still ask for it before rank 0 does; the ranks then say "address already in
    use".

    Raises:
        OSError: if all are taken.
    """
    for port in random.SystemRandom().sample(MEETING_PORTS, len(MEETING_PORTS)):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {MEETING_PORTS[0]} to {MEETING_PORTS[-1]}")
