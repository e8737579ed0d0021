"""The OpenAI protocol as data: what a request may say, what an answer looks like, and the shape of every error.

A parameter that would change the answer and is not supported is refused, never passed over: whoever sends it would
take the answer for something that it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

MOST_CHOICES = 8
_MOST_STOPS, _LONGEST_STOP = 4, 256
_SEED_BOUND = 2**63
_RETRY_SECONDS = "1"

# They say something about the caller or the bill, and nothing about the answer.
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Not supported; in each case the values that ask for nothing. null asks for nothing anywhere.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
_UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = _UNSUPPORTED | {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = _UNSUPPORTED | {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}

_HALF = "half of a surrogate pair is no character"
# What pydantic finds, in words of the protocol, and the codes of what is no wrong value.
_SAID = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such parameter",
    "string_type": "must be a text",
    "string_unicode": _HALF,
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "value_error": "{error}",
    "invalid": "{said}",
    "unsupported": "{said}",
}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}


class ProtocolError(Exception):
    """A request that is answered with an error. kind: the protocol's name for this family of errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as the protocol writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def overloaded(message: str, code: str) -> ProtocolError:
    """Return a 503 that asks to come again soon."""
    return ProtocolError(503, message, code=code, kind="server_error", headers={"Retry-After": _RETRY_SECONDS})


def shutting_down() -> ProtocolError:
    """Return the answer to what comes while the server ends."""
    return overloaded("The server is shutting down", "shutting_down")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _mistake(kind: str, said: str, *place: str | int) -> PydanticCustomError:
    """Return a mistake for pydantic to report; kind: as in `_CODES`; place: from the value that is validated on."""
    return PydanticCustomError(kind, "{said}", {"said": said, "place": place})  # pyright: ignore[reportArgumentType]


def _as_text(content: Any) -> Any:
    """Return a message's content as one text: it may come in parts, which are lines of it."""
    if content is None:
        raise ValueError("must be a text, not null: a turn without words, as one with a tool call, cannot be read")
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise _mistake("invalid", "only parts of the type text can be read", index)
        for name in part:
            if name not in ("type", "text"):
                raise _mistake("extra_forbidden", _SAID["extra_forbidden"], index, shortened(name))
    return "\n".join(part["text"] for part in content)


def _refuse_what_no_prompt_has(text: str) -> str:
    """Return `text`; JSON can spell half of a surrogate pair, which is no character, and NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(_HALF) from None
    if "\0" in text:
        raise ValueError("must not have a NUL character")
    return text


def _refuse_unless_empty(value: Any, info: ValidationInfo) -> Any:
    if value not in (None, [], ""):
        raise _mistake("unsupported", f"this server does not support {info.field_name!r} in a message")
    return value


# What an answer of this server has too, empty, so that it can be sent back as it came.
_Empty = Annotated[Any, AfterValidator(_refuse_unless_empty)]


class _Part(BaseModel):
    """Nothing is converted: "1", true and 1.0 are no whole numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(_Part):
    """One turn of a conversation. name: of who speaks, which the model is not told."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text), AfterValidator(_refuse_what_no_prompt_has)]
    name: str | None = None
    annotations: _Empty = None
    audio: _Empty = None
    function_call: _Empty = None
    refusal: _Empty = None
    tool_calls: _Empty = None


class StreamOptions(_Part):
    """How a stream is written. include_obfuscation: protects a line that this server does not have."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class GenerationBody(_Part):
    """What both kinds of requests have. What is None was not given; what has no field here was looked at before."""

    model_config = ConfigDict(extra="ignore")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-_SEED_BOUND, lt=_SEED_BOUND)
    stop: Annotated[list[Stop], Field(max_length=_MOST_STOPS), BeforeValidator(_as_list)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _refuse_options_of_no_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it is only allowed with 'stream': true")
        return value

    @property
    def output_limit(self) -> int | None:
        """How many tokens an answer may have."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The name under which that was said."""
        return "max_tokens"

    @property
    def choices_for_each(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @field_validator("max_completion_tokens")
    @classmethod
    def _refuse_two_limits(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if None not in (value, other) and value != other:
            raise ValueError(f"'max_tokens' is given too, and differs ({shortened(str(other))})")
        return value

    @property
    def output_limit(self) -> int | None:
        """How many tokens an answer may have, under whichever name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        """The name under which that was said."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


Prompt = str | list[int]
Body = TypeVar("Body", bound=GenerationBody)


def _as_prompts(value: Any) -> Any:
    """Return the four forms of a prompt (a text, token ids, several of either) as several."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")
    return [value] if _are_ids(value) else value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _text_or_ids(value: Any) -> Any:
    if not (_are_ids(value) or (isinstance(value, str) and value)):
        raise ValueError("a prompt must be a text or a list of token ids, and not empty")
    return _refuse_what_no_prompt_has(value) if isinstance(value, str) else value


class CompletionBody(GenerationBody):
    """The body of /v1/completions. prompt: always several."""

    prompt: Annotated[
        list[Annotated[Prompt, BeforeValidator(_text_or_ids)]], Field(min_length=1), BeforeValidator(_as_prompts)
    ]


def read_chat(values: Mapping[str, Any]) -> ChatBody:
    """Return the chat request that `values` is; raises ProtocolError where it is none, or asks for too much."""
    _refuse_unsupported(values, ChatBody, _UNSUPPORTED_IN_CHAT)
    return _validate(ChatBody, values)


def read_completion(values: Mapping[str, Any]) -> CompletionBody:
    """Return the completion request that `values` is; raises ProtocolError as `read_chat` does."""
    _refuse_unsupported(values, CompletionBody, _UNSUPPORTED_IN_COMPLETIONS)
    return _validate(CompletionBody, values)


def _refuse_unsupported(
    values: Mapping[str, Any], body: type[GenerationBody], unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
    for name, value in values.items():
        if name in body.model_fields or name in _IGNORED:
            continue
        if name not in unsupported:
            raise ProtocolError(
                400, f"Unknown parameter: {shortened(name)!r}", code="unknown_parameter", param=shortened(name)
            )
        if value is not None and not any(_is_same(value, neutral) for neutral in unsupported[name]):
            raise ProtocolError(400, f"This server does not support {name!r}", code="unsupported_parameter", param=name)


def _is_same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def shortened(text: str) -> str:
    """Return the beginning of what a client wrote, so that an error can show it."""
    return text.encode("utf-8", errors="replace").decode()[:64]


def _validate(body: type[Body], values: Mapping[str, Any]) -> Body:
    try:
        return body.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    location, said = _place_of(first, values), _said(first)
    param = _path(location)
    raise ProtocolError(400, f"Invalid {param!r}: {said}", code=_CODES.get(first["type"], "invalid_value"), param=param)


def _place_of(mistake: ErrorDetails, values: Mapping[str, Any]) -> tuple[int | str, ...]:
    location = (*mistake["loc"], *mistake.get("ctx", {}).get("place", ()))
    is_one_text = isinstance(values.get(str(location[0])), str)  # which was made a list of one
    return location[:1] if is_one_text else location


def _said(mistake: ErrorDetails) -> str:
    return _SAID.get(mistake["type"], "this value cannot be read").format(**mistake.get("ctx", {}))


def _path(location: Sequence[int | str]) -> str:
    """Return `messages[0].role` of the place of a mistake."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" for step in location)
    return "".join(steps).removeprefix(".")


@dataclass(frozen=True)
class Envelope:
    """What all parts of an answer repeat. created: seconds since 1970. fingerprint: of the base's weights."""

    id: str
    kind: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    fingerprint: str

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        return {**self._head(self.kind), "choices": list(choices), "usage": dict(usage)}

    def chunk(
        self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None, *, has_usage: bool
    ) -> dict[str, Any]:
        """Return a piece of a stream; where `has_usage`, every piece says so and only the last one has numbers."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return {**self._head(kind), "choices": list(choices), **({"usage": usage} if has_usage else {})}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._choice(index, said if self.kind == "chat.completion" else {"text": text}, finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice that begins a stream of a chat; None for a completion, which has none."""
        if self.kind != "chat.completion":
            return None
        return self._choice(index, {"delta": {"role": "assistant", "content": "", "refusal": None}}, None)

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """Return a piece of a choice; `text` may be empty at the end."""
        said = {"delta": {"content": text} if text else {}}
        return self._choice(index, said if self.kind == "chat.completion" else {"text": text}, finish_reason)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @staticmethod
    def _choice(index: int, said: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens as the protocol writes them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
