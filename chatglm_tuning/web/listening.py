"""The address that the page is served at, taken before anything slow is loaded."""

import socket

from chatglm_tuning.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """Take an address; port 0 is any free one. Raises UserError where it is taken or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            remedy="Give a free port with --port (0 takes one), or another address with --host",
        ) from error
    return listener
