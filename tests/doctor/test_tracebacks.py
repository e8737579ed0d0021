"""A pasted traceback: each known error is found, whatever is around it, and an unknown one is said to be unknown."""

import io
import sys
import textwrap
from types import SimpleNamespace

import pytest

from chatglm_tuning.doctor.known import known_errors
from chatglm_tuning.doctor.pages import codes
from chatglm_tuning.doctor.tracebacks import explain, read_pasted
from chatglm_tuning.errors import UserError
from tests.doctor.excerpts import EXCERPTS

CASES = [
    pytest.param(name, text, id=f"{name}-{number}")
    for name, texts in EXCERPTS.items()
    for number, text in enumerate(texts)
]
TORCHRUN = """\
[rank0]:[W Utils.hpp:106] Warning: Environment variable NCCL_BLOCKING_WAIT is deprecated
{ranked}
[rank1]:[E ProcessGroupNCCL.cpp:828] [Rank 1] Watchdog caught collective operation timeout
W1124 23:30:01.1 torch/distributed/elastic/multiprocessing/api.py:891] Sending process 77 closing signal SIGTERM
Traceback (most recent call last):
  File "/opt/bin/torchrun", line 8, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""


def boxed(text: str, width: int = 30) -> str:
    """The text as rich draws it in a narrow terminal: folded between two lines, in colours."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_long_words=False)]
    body = "\n".join(f"\x1b[31m│\x1b[0m {line:<{width}} \x1b[31m│\x1b[0m" for line in lines)
    return f"╭{'─' * width}──╮\n{body}\n╰{'─' * width}──╯\n"


def test_there_are_many_and_each_has_an_excerpt():
    names = [known.name["en"] for known in known_errors()]
    assert len(names) == len(set(names)) >= 60
    assert set(names) == set(EXCERPTS)
    assert len({known.name["zh"] for known in known_errors()}) == len(names)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_known_error_is_found(name, text):
    explanation = explain(text, "en")
    assert explanation.is_known
    assert explanation.lines[0] == name
    assert explanation.lines[1].startswith("Cause: ")
    assert explanation.lines[2].startswith("Fix: ")


@pytest.mark.parametrize(("name", "text"), CASES)
def test_it_is_found_among_what_torchrun_and_people_write(name, text):
    ranked = "\n".join(f"[rank0]: {line}" for line in text.splitlines())
    around = f"大家好，我按照教程微调，报错如下，请问怎么解决？\n```\n{TORCHRUN.format(ranked=ranked)}```\n谢谢！"
    first = explain(around, "zh").lines
    expected = next(known for known in known_errors() if known.name["en"] == name)
    assert first[0] == expected.name["zh"] or expected.follows
    assert first[1].startswith("原因: ")


@pytest.mark.parametrize(("name", "text"), CASES)
def test_it_is_found_in_a_box_that_folds_lines(name, text):
    assert explain(boxed(text), "en").lines[0] == name


@pytest.mark.parametrize("known", known_errors(), ids=lambda known: known.name["en"])
def test_what_is_known_is_whole_in_both_languages(known):
    assert known.code is None or known.code in codes()
    for language, stop in (("en", "."), ("zh", "。")):
        for text in (known.cause[language], known.fix[language]):
            assert text.endswith(stop)
            assert "{" not in text
            assert not text.endswith(("..", ".。"))


def test_an_error_of_ours_is_explained_by_its_page():
    text = "error [M115]: a.bin: this is a Git LFS pointer. Run `git lfs pull`. (chatglm-tuning doctor M115 explains)"
    explanation = explain(text, "en")
    assert explanation.is_known
    assert explanation.lines[0].startswith("M115 A Git LFS pointer")
    assert explain(text, "zh").lines[0].startswith("M115 是 Git LFS 指针")
    assert explain("error [M115]", "en").is_known


def test_the_cause_is_told_before_what_follows_and_the_others_are_named():
    text = TORCHRUN.format(ranked="[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    lines = explain(text, "en").lines
    assert lines[0] == "the GPU's memory is used up"
    assert "More: chatglm-tuning doctor X107" in lines
    assert lines[-1] == "Also in it: processes of the run lost each other; a process of torchrun ended"


def test_an_error_goes_before_a_warning_beside_it():
    text = "Failed to load cpm_kernels:name 'CPUKernel' is not defined\nRuntimeError: CUDA out of memory."
    assert explain(text, "en").lines[0] == "the GPU's memory is used up"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_unknown_error_is_said_to_be_unknown(language):
    text = 'Traceback (most recent call last):\n  File "a.py", line 1\nZeroDivisionError: division by zero\n'
    explanation = explain(text, language)
    assert not explanation.is_known
    assert "ZeroDivisionError: division by zero" in explanation.lines[1]
    assert "chatglm-tuning doctor" in explanation.lines[-1]


def test_text_without_an_error_is_unknown_too():
    assert not explain("step 10, loss 2.3\nstep 20, loss 2.1", "en").is_known


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_files_in_the_usual_encodings_are_read(tmp_path, encoding):
    path = tmp_path / "log.txt"
    path.write_bytes("报错：CUDA out of memory".encode(encoding))
    assert "报错：CUDA out of memory" in read_pasted(str(path))


def test_of_a_long_log_the_end_is_read(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("step\n" * 4_000_000 + "the end", encoding="utf-8")
    text = read_pasted(str(path))
    assert text.endswith("the end")
    assert len(text) < 10_000_000


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"MemoryError")))
    assert read_pasted("-") == "MemoryError"


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), ("\n \n", "is empty")])
def test_what_cannot_be_read_is_told(tmp_path, content, says):
    path = tmp_path / "log.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says) as raised:
        read_pasted(str(path))
    assert raised.value.code == "X108"
