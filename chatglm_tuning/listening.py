"""The address that a server is reached at, taken before anything slow is loaded."""

import errno
import socket

from chatglm_tuning.errors import UserError

_BACKLOG = 2048
_LAST_PRIVILEGED_PORT = 1023


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, on any free port where `port` is 0.

    Who connects before anything is served waits for it. Raises UserError where the address cannot be had.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {host}: there is no host of that name ({_reason(error)})",
            code="S103",
            where=where,
            remedy="Give --host an address of this machine: 127.0.0.1 for itself alone, 0.0.0.0 for its network",
        ) from error
    try:
        # Without it the port could not be used for a minute after another server's end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # With it two sockets may be bound to one port: only the first one that listens has it.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refusal(host, port, error, where) from error
    return listener


def _refusal(host: str, port: int, error: OSError, where: str) -> UserError:
    code = "S103"
    if error.errno == errno.EADDRINUSE:
        code = "S102"
        what, remedy = "another program listens there already", "Give another --port (0 takes a free one), or end it"
    elif error.errno == errno.EADDRNOTAVAIL:
        what = "this machine has no such address"
        remedy = "Give --host one of its own: 127.0.0.1 for itself alone, 0.0.0.0 for its network"
    elif error.errno in (errno.EACCES, errno.EPERM) and 0 < port <= _LAST_PRIVILEGED_PORT:
        what, remedy = "this user may not take ports below 1024", "Give a larger --port, such as 8080"
    else:
        what, remedy = f"the system does not permit it ({_reason(error)})", "Give another --host or --port"
    return UserError(f"cannot listen on {host} port {port}: {what}", code=code, where=where, remedy=remedy)


def _reason(error: OSError | UnicodeError) -> str:
    return getattr(error, "strerror", None) or str(error)
