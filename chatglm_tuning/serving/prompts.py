"""From what a request says to the token ids that the model reads."""

from collections.abc import Sequence

from chatglm_tuning.data.records import examples_of_row
from chatglm_tuning.model.tokenization import ChatGLMTokenizer
from chatglm_tuning.serving.protocol import Message, Prompt, ProtocolError, shortened

_ANY_ANSWER = {"role": "assistant", "content": "-"}
_SPEAKERS = ("user", "assistant")
_EMPTY = "must not be empty: there is nothing in it that the tokenizer reads"


def chat_prompt(tokenizer: ChatGLMTokenizer, messages: Sequence[Message], most_messages: int) -> str:
    """Return the text that a row of training data with these messages gives.

    most_messages: more of them cannot fit, whatever they say.
    Raises ProtocolError where they are no rounds of question and answer that end with a question, and where the
    tokenizer sees nothing in one.
    """
    if len(messages) > most_messages:
        raise too_long(f"more than {most_messages} messages", most_messages, param="messages")
    _check_turns(messages)
    for index, message in enumerate(messages):
        if message.role in _SPEAKERS and not tokenizer.encode_text(message.content.strip()):
            raise _refusal(_EMPTY, f"messages[{index}].content")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    _, examples = examples_of_row({"messages": [*turns, _ANY_ANSWER]}, "")
    return examples[-1].prompt


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise ProtocolError where a row of training data might not have these turns, or has an answer to the last."""
    opening = next((index for index, message in enumerate(messages) if message.role in _SPEAKERS), len(messages))
    for index, message in enumerate(messages[opening:], start=opening):
        expected = _SPEAKERS[(index - opening) % 2]
        if message.role not in _SPEAKERS:
            raise _refusal("a system text may only come before the first question", f"messages[{index}].role")
        if message.role != expected:
            raise _refusal(f"questions and answers alternate: {expected!r} was expected", f"messages[{index}].role")
    if messages[-1].role != "user":
        place = f"messages[{len(messages) - 1}].role"
        raise _refusal(f"the last message must be the user's, not the {messages[-1].role}'s", place)


def encode_prompt(tokenizer: ChatGLMTokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a text or of token ids, with [gMASK] <sop> behind them.

    In a text, a control token is a plain word. Token ids may end with [gMASK] <sop> already.
    Raises ProtocolError for ids that are no pieces of text, and where nothing is left to read.
    """
    ending = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    ids = _ids_of_text(tokenizer, prompt, ending)
    if not ids:
        raise _refusal(_EMPTY, "prompt")
    return [*ids, *ending]


def _ids_of_text(tokenizer: ChatGLMTokenizer, prompt: Prompt, ending: list[int]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode_text(prompt)
    ids = prompt[:-2] if prompt[-2:] == ending else prompt
    model = tokenizer.sp_model
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            what = f"there is no token {shortened(str(token))}; ids go from 0 to {tokenizer.vocab_size - 1}"
            raise _refusal(what, "prompt")
        if model.is_control(token) or model.is_unknown(token):
            raise _refusal(f"token {token} ({model.id_to_piece(token)}) is no piece of text", "prompt")
    return ids


def too_long(what: str, max_length: int, *, param: str) -> ProtocolError:
    """Return the protocol's error for a prompt that leaves no room; nothing of it is dropped to make it fit."""
    return ProtocolError(
        400,
        f"This model's maximum context length is {max_length} tokens of prompt and answer together, and this request "
        f"has {what}",
        code="context_length_exceeded",
        param=param,
    )


def _refusal(message: str, param: str) -> ProtocolError:
    return ProtocolError(400, f"Invalid {param!r}: {message}", code="invalid_value", param=param)
