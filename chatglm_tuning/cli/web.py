"""`chatglm-tuning web`: chat in a browser, before and after, with any number of adapters on one base."""

import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatglm_tuning.config.web import WebArguments, parse_web_arguments
from chatglm_tuning.listening import listen
from chatglm_tuning.optional import require

if TYPE_CHECKING:
    from chatglm_tuning.inference.engine import BatchEngine
    from chatglm_tuning.loading import Base
    from chatglm_tuning.web.page import ChatPage

_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def run(argv: Sequence[str]) -> int:
    """Serve the page until the program is told to end, and return 0 after SIGTERM.

    Raises KeyboardInterrupt after Ctrl-C, and UserError for wrong flags and folders and for an address that is taken;
    the adapters are checked before the base is read.
    """
    arguments = parse_web_arguments(argv)
    listener = listen(arguments.host, arguments.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    require("gradio", "web")

    from chatglm_tuning.adapters.served import AdapterSet
    from chatglm_tuning.inference.engine import BatchEngine
    from chatglm_tuning.web.server import serve

    base = _load(arguments)
    engine = BatchEngine(AdapterSet(base.model))
    try:
        page = _make_page(arguments, base, engine)
        _warn_of_other_machines(arguments.host)
        serve(page, listener, lambda: print(f"{_address(listener)} (Ctrl-C ends it)", flush=True))
    finally:
        engine.close()
    return 0


def _load(arguments: WebArguments) -> "Base":
    from chatglm_tuning.base_folder import read_config
    from chatglm_tuning.loading import load_base_for_inference
    from chatglm_tuning.shards import resolve_model_folder
    from chatglm_tuning.web.shelf import check_named_adapter

    model = arguments.model
    config = read_config(resolve_model_folder(model.model_name_or_path))
    for adapter in arguments.adapters:
        check_named_adapter(adapter, config)
    return load_base_for_inference(
        model.model_name_or_path,
        quantization_bit=model.quantization_bit,
        dtype=model.dtype,
        show_progress=sys.stdout.isatty(),
    )


def _make_page(arguments: WebArguments, base: "Base", engine: "BatchEngine") -> "ChatPage":
    from chatglm_tuning.web.conversation import Chat
    from chatglm_tuning.web.page import Beginning, ChatPage
    from chatglm_tuning.web.shelf import AdapterShelf

    shelf = AdapterShelf(base, engine)
    for adapter in arguments.adapters:
        shelf.add(adapter.folder, adapter.name)
    context = base.config.max_sequence_length
    beginning = Beginning(
        language=arguments.language,
        max_length=min(arguments.max_length, context),
        seed=arguments.seed,
        context=context,
    )
    return ChatPage(Chat(engine, base.tokenizer, shelf), beginning)


def _warn_of_other_machines(host: str) -> None:
    if host not in _THIS_MACHINE:
        print(
            f"note: everyone who reaches {host} may use this page, and have it read adapter folders of this machine",
            file=sys.stderr,
        )


def _address(listener: socket.socket) -> str:
    """Return what to type into a browser on this machine."""
    host, port = map(str, listener.getsockname()[:2])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
