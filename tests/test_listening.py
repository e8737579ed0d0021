"""The address of a server: taken once, and every refusal with its own remedy."""

import errno
import socket

import pytest

from chatglm_tuning.errors import UserError
from chatglm_tuning.listening import listen


def test_a_free_port_is_taken_and_answers():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.accept()[0].close()


def test_a_port_is_taken_once_even_by_one_that_serves_nothing_yet():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=r"another program listens there already.*Give another --port"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("no.such.host.invalid", "there is no host of that name.*Give --host an address of this machine"),
        ("a" * 70 + ".example", "there is no host of that name.*Give --host an address of this machine"),
        ("192.0.2.1", "this machine has no such address.*Give --host one of its own"),
    ],
)
def test_a_wrong_host_is_told(host, said):
    with pytest.raises(UserError, match=said):
        listen(host, 0)


@pytest.mark.parametrize(("port", "said"), [(80, "ports below 1024.*larger --port"), (8080, "does not permit it")])
def test_a_system_that_refuses_is_told(monkeypatch, port, said):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=said):
        listen("127.0.0.1", port)
