"""`chatglm-tuning serve`: the OpenAI protocol on one base with many adapters."""

import ipaddress
import json
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from chatglm_tuning.cli.log import log_to_stderr
from chatglm_tuning.config.serve import API_KEY_VARIABLE, ServeArguments, parse_serve_arguments
from chatglm_tuning.listening import listen
from chatglm_tuning.optional import require

if TYPE_CHECKING:
    from chatglm_tuning.serving.service import Service

_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")
_ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C, and return the exit code: 0 after those under way have their answers.

    Raises UserError, before the base is loaded, for wrong flags, an address that is taken and an adapter that is none.
    """
    arguments = parse_serve_arguments(argv)
    for module in _LIBRARIES:
        require(module, "serve")
    _log_requests()

    from chatglm_tuning.serving.server import DrainingServer
    from chatglm_tuning.serving.service import load_service

    with closing(listen(arguments.host, arguments.port)) as listener:
        _warn_of_strangers(arguments)
        service = load_service(arguments, show_progress=sys.stdout.isatty())
        try:
            server = DrainingServer(service, lambda: print(_announcement(service, listener), flush=True))
            server.run(sockets=[listener])
        finally:
            service.engine.close()
    return 0


def _log_requests() -> None:
    log_to_stderr(logging.WARNING, "%(asctime)s %(message)s")
    logging.getLogger("chatglm_tuning.serving").setLevel(logging.INFO)


def _warn_of_strangers(arguments: ServeArguments) -> None:
    if arguments.api_key is None and not _is_loopback(arguments.host):
        print(
            f"warning: --host {arguments.host} lets other machines ask, and no key is wanted of them; "
            f"set {API_KEY_VARIABLE} to want one",
            file=sys.stderr,
            flush=True,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _announcement(service: "Service", listener: socket.socket) -> str:
    """Return the lines that say where the server is, what it has, and how to try it."""
    arguments = service.arguments
    port = listener.getsockname()[1]
    host = _ALL_ADDRESSES.get(arguments.host, arguments.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    body = {"model": arguments.model_names[-1], "messages": [{"role": "user", "content": "你好"}]}
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if arguments.api_key is not None else ""
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return "\n".join(
        [
            f"serving {', '.join(arguments.model_names)} at {url}",
            f"try: curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'",
        ]
    )
