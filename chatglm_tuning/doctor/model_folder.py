"""Whether a model's folder is whole and of ChatGLM-6B, by reading small files, headers and sizes: without torch."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from chatglm_tuning.doctor.findings import Finding, ok, problem, warning
from chatglm_tuning.doctor.weight_files import check_weights, looks_like_pointer

# Of the final revision of THUDM/chatglm-6b.
RELEASED_TOKENIZER = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
RELEASED_VOCABULARY = 130528
LATER_ARCHITECTURE_KEYS = ("multi_query_attention", "ffn_hidden_size", "padded_vocab_size", "rmsnorm", "kv_channels")
OLD_REVISION_VOCABULARY = 150528

_TOKENIZER = "ice_text.model"
_DOWNLOAD = "Download all files of THUDM/chatglm-6b into one folder, and give that"
_HALF_DOWNLOADS = ("*.incomplete", "*.part", "*.aria2", "*.crdownload", "*.download", "*.tmp")
_UNSUPPORTED_OPTIONS = ("remove_space", "do_lower_case")


def model_findings(given: str) -> Iterator[Finding]:
    """Yield what is the matter with the folder `given`, and the facts that were checked."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        yield _no_folder(given, folder)
        return
    config = yield from _read_json(folder / "config.json", missing="M103", damaged="M104")
    if config is not None:
        yield from _config_findings(config, folder)
    tokenizer_config = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer_config = yield from _read_json(folder / "tokenizer_config.json", missing="M110", damaged="M110")
    yield from _tokenizer_findings(folder, config or {}, tokenizer_config or {})
    yield from check_weights(folder)
    halves = sorted(path.name for pattern in _HALF_DOWNLOADS for path in folder.glob(pattern))
    if halves:
        yield warning(
            "download",
            f"unfinished files lie in the folder: {', '.join(halves)}",
            code="M114",
            remedy="Finish or repeat the download, then remove them",
        )


def read_shape(given: str | None) -> dict[str, Any]:
    """Return the parsed config.json of the folder; empty where there is none that can be read."""
    path = Path(given or "").expanduser() / "config.json"
    if given is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _no_folder(given: str, folder: Path) -> Finding:
    if folder.exists():
        return problem("model", f"{given} is a file, not a folder", code="M101", remedy="Give the folder that it is in")
    if given.count("/") == 1 and not given.startswith((".", "~", "/")):
        return warning(
            "model",
            f"there is no folder {given}: commands would fetch the repository of that name from Hugging Face",
            code="M102",
            remedy="Give the folder of a downloaded ChatGLM-6B to have it checked",
        )
    return problem("model", f"there is no folder {given}", code="M101", remedy="Check the path")


def _read_json(path: Path, *, missing: str, damaged: str) -> Any:
    """Yield what is the matter with a file; returns its object, None where there is none."""
    name = path.name
    if not path.is_file():
        yield problem(name, "it is missing", code=missing, remedy=_DOWNLOAD)
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield problem(name, f"it is not JSON ({error})", code=damaged, remedy="Download this file again")
        return None
    if not isinstance(content, dict):
        yield problem(name, "it is not a JSON object", code=damaged, remedy="Download this file again")
        return None
    return content


def _config_findings(config: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    later = [key for key in LATER_ARCHITECTURE_KEYS if key in config]
    vocabulary, bits = config.get("vocab_size"), config.get("quantization_bit") or None
    wrong = None
    if later:
        wrong = (f"it is that of ChatGLM2, ChatGLM3 or GLM-4 (it has {later[0]})", "M105")
    elif config.get("model_type") != "chatglm":
        wrong = (f"model_type is {config.get('model_type')!r}, not 'chatglm'", "M105")
    elif vocabulary == OLD_REVISION_VOCABULARY:
        wrong = (f"it is that of the earlier revision (vocab_size {vocabulary})", "M106")
    elif config.get("quantization_embeddings"):
        wrong = ("the embeddings are quantised (chatglm-6b-int4-qe)", "M107")
    elif bits not in (None, 4, 8) or config.get("position_encoding_2d") is False:
        wrong = (f"quantization_bit {bits} or position_encoding_2d false is not supported", "M108")
    if wrong:
        what, code = wrong
        yield problem(
            "config.json", what, code=code, remedy="Give the folder of the first ChatGLM-6B (THUDM/chatglm-6b)"
        )
        return
    form = f"int{bits}" if bits else "full precision"
    yield ok(
        "config.json",
        f"ChatGLM-6B in {form}: {config.get('num_layers')} layers, hidden size {config.get('hidden_size')}, "
        f"vocabulary {vocabulary}, in {folder}",
    )


def _tokenizer_findings(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Finding]:
    path = folder / _TOKENIZER
    if not path.is_file():
        yield problem(_TOKENIZER, "the tokenizer is missing", code="M109", remedy=_DOWNLOAD)
        return
    if looks_like_pointer(path):
        yield problem(_TOKENIZER, "it is a Git LFS pointer", code="M110", remedy="Run `git lfs pull` in the folder")
        return
    digest = sha256(path.read_bytes()).hexdigest()
    if digest == RELEASED_TOKENIZER:
        yield ok(_TOKENIZER, f"the released one (sha256 {digest[:12]})")
    elif config.get("vocab_size") == RELEASED_VOCABULARY:
        yield problem(
            _TOKENIZER,
            f"its sha256 ({digest[:12]}) is not that of the released one ({RELEASED_TOKENIZER[:12]})",
            code="M111",
            remedy="Download ice_text.model again",
        )
    else:
        yield ok(_TOKENIZER, f"sha256 {digest[:12]}, of a model with another vocabulary than the released one")
    on = [name for name in _UNSUPPORTED_OPTIONS if settings.get(name)]
    if on:
        yield problem(
            "tokenizer_config.json", f"{on[0]} is true", code="M111", remedy=f"Set {on[0]} to false, as released"
        )
    if settings.get("num_image_tokens") and config.get("vocab_size") != OLD_REVISION_VOCABULARY:
        yield problem(
            "tokenizer_config.json",
            "it is of the earlier revision (with image tokens), and config.json is not",
            code="M112",
            remedy=_DOWNLOAD,
        )
