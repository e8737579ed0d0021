"""What a user's mistake tells, and that it comes back whole from another process."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import dill
import pytest

from chatglm_tuning.errors import UserError


def fail(_row):
    raise UserError("the row is empty", code="D103", remedy="mend it", where="a.json:1")


def test_the_message_has_place_sentence_and_remedy_and_the_code_is_beside_it():
    error = UserError("the row is empty", code="D103", remedy="mend it", where="a.json:1")
    assert str(error) == "a.json:1: the row is empty. Mend it."
    assert error.code == "D103"
    line = "error [D103]: a.json:1: the row is empty. Mend it. (chatglm-tuning doctor D103 explains)"
    assert error.for_terminal() == line


def test_a_code_is_asked_for():
    with pytest.raises(TypeError, match="code"):
        UserError("no", remedy="do")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("pickler", [pickle, dill], ids=["pickle", "dill"])
@pytest.mark.parametrize("is_derived", [False, True])
def test_it_is_pickled_whole(is_derived, pickler):
    from chatglm_tuning.inference.session import QuestionTooLongError  # not above: the processes below need no torch

    kind = QuestionTooLongError if is_derived else UserError
    error = kind("what", code="S104", remedy="remedy", where="where")
    error.add_note("more")
    copied = pickler.loads(pickler.dumps(error))
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)
    assert copied.__notes__ == ["more"]


def test_it_crosses_processes():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(UserError) as raised:
            pool.submit(fail, {}).result()
        assert raised.value.code == "D103"
        assert pool.submit(len, "pool").result() == 4  # an error that cannot be unpickled breaks the pool


def test_it_crosses_the_processes_of_datasets():
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match=r"^a\.json:1: the row is empty\. Mend it\.$"):
        rows.map(fail, num_proc=2)
