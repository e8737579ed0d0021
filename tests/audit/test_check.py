"""`chatglm-tuning data check`: what it finds in files, and the flags that it gives."""

import errno
import json
import os

import numpy as np
import pytest

from chatglm_tuning.audit.lengths import Lengths, limits_at, limits_that_cut
from chatglm_tuning.audit.report import bins_of
from chatglm_tuning.cli.main import main
from chatglm_tuning.data.audit import ExampleAudit, overlap_of, prompts_with_other_answers
from chatglm_tuning.data.records import Example
from tests.model_folder import EMBEDDED, write_rows

PNG = b"\x89PNG"


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def check(capsys, tmp_path, *argv):
    code = main(["data", "check", "--model_name_or_path", str(EMBEDDED), "--output_dir", str(tmp_path / "out"), *argv])
    return code, capsys.readouterr()


def found_in(capsys, tmp_path, *argv):
    code, output = check(capsys, tmp_path, *argv, "--json")
    content = json.loads(output.out)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == content
    return code, content


@pytest.mark.parametrize("name", ["report.json", "lengths.png"])
def test_a_full_disk_leaves_the_earlier_report_and_nothing_half_written(capsys, tmp_path, monkeypatch, name):
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    assert check(capsys, tmp_path, "--data_path", str(rows))[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"report.json", "lengths.png"}

    def fail(path):
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("chatglm_tuning.evaluation.files.fsync", fail)
    write_rows(rows, 5)
    code, output = check(capsys, tmp_path, "--data_path", str(rows))
    assert (code, output.out) == (2, "")
    assert f"error [O101]: {tmp_path / 'out'}: the results cannot be written (No space left on device)" in output.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_clean_rows_are_fit(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    code, found = found_in(capsys, tmp_path, "--data_path", str(rows))
    assert (code, found["verdict"], found["remarks"]) == (0, "fit to train on", [])
    assert found["trained"]["shapes"] == {"content/summary": 30}
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(PNG)


def test_every_fault_is_found_with_its_place(capsys, tmp_path):
    rows = [{"content": f"类型#{n}", "summary": f"第{n}件很好看。"} for n in range(20)]
    rows += [
        {"content": "类型#0", "summary": "第0件很好看。"},
        {"content": "词", "summary": "写完了<eop>。"},
        {"content": "坏", "summary": "这里�坏了。"},
        {"content": "半", "summary": "说到一半就"},
        {"content": "一样的话。", "summary": "一样的话。"},
        {"prompt": "问", "response": "答。", "history": [["", "好。"]]},
        {"messages": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二。"}]},
        {"messages": [{"role": r, "content": t} for r, t in (("user", "话"), ("assistant", "语。"), ("user", "三"))]},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    with file.open("a", encoding="utf-8") as stream:
        stream.write('\n{"content": "x"}\n')
    code, found = found_in(capsys, tmp_path, "--data_path", str(file))
    trained = found["trained"]
    assert code == 1
    assert found["verdict"] == "not fit to train on"
    assert (trained["bad_rows"], trained["unanswered"]) == (1, 1)
    assert f"{file}:29" in trained["first_bad_rows"][0]
    assert {what: finding["places"] for what, finding in trained["findings"].items()} == {
        "the same prompt and answer again": [f"{file}:21"],
        "control tokens written out": [f"{file}:22"],
        "characters that replace undecodable bytes": [f"{file}:23"],
        "answers that end in mid-sentence": [f"{file}:24"],
        "answers that repeat their prompt": [f"{file}:25"],
        "rounds of the history with an empty question or answer": [f"{file}:26"],
    }
    assert trained["shapes"] == {"content/summary": 25, "messages": 2, "prompt/response/history": 1}
    assert found["flags"][-1] == "--skip_bad_rows"


def test_the_flags_that_it_gives_are_taken_by_training(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    with rows.open("a", encoding="utf-8") as stream:
        stream.write("{}\n")
    _, found = found_in(capsys, tmp_path, "--data_path", str(rows))
    argv = ["train-lora", "--model_name_or_path", str(EMBEDDED), "--data_path", str(rows), "--max_steps", "1"]
    argv += ["--output_dir", str(tmp_path / "run"), "--report_to", "none", *found["flags"]]
    assert main(argv) == 0


def test_what_is_in_both_files_is_counted(capsys, tmp_path):
    trained = [{"content": f"问{n}", "summary": f"答{n}。"} for n in range(5)]
    evaluated = [trained[0], {"content": "问1", "summary": "别的。"}, {"content": "新", "summary": "新。"}]
    paths = write(tmp_path / "a.jsonl", trained), write(tmp_path / "b.jsonl", evaluated)
    code, found = found_in(capsys, tmp_path, "--data_path", str(paths[0]), "--eval_path", str(paths[1]))
    assert code == 0
    assert found["overlap"] == {"pairs": 1, "prompts": 1}
    assert any("scores will be better than the model is" in remark for remark in found["remarks"])


def test_limits_that_cut_much_are_replaced(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 200)
    _, found = found_in(capsys, tmp_path, "--data_path", str(rows), "--max_input_length", "8")
    assert found["limits"]["given"]["cut_prompts"] > 0.5
    advised = dict(zip(found["flags"][::2], map(int, found["flags"][1::2]), strict=True))
    assert advised["--max_input_length"] == found["limits"]["seldom"]["max_input_length"] > 8
    assert found["limits"]["seldom"]["cut"] <= 0.01
    assert found["limits"]["never"]["cut"] == 0


def test_the_printed_report_says_the_same(capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    code, output = check(capsys, tmp_path, "--data_path", str(rows))
    assert code == 0
    for part in ("40 examples, 0 bad rows", "tokens of a prompt", "█", "cut 1 % at most", "verdict: fit to train on"):
        assert part in output.out


def test_a_file_of_nothing_usable_has_no_lengths(capsys, tmp_path):
    code, found = found_in(capsys, tmp_path, "--data_path", str(write(tmp_path / "rows.jsonl", [{"a": 1}])))
    assert (code, found["limits"], found["flags"]) == (1, None, [])
    assert not (tmp_path / "out" / "lengths.png").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--data_path is missing"),
        (["--data_path", "{tmp}/none.jsonl"], "there is no such file"),
        (["--data_path", "{tmp}", "--json"], "this is a folder, not a file"),
        (["--data_path", "{rows}", "--max_input_length", "1"], "at least 4, not '1'"),
        (["--data_path", "{rows}", "--skip_bad_rows"], "bad rows are counted and listed"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(argv, expected, capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    code, output = check(capsys, tmp_path, *(word.format(tmp=tmp_path, rows=rows) for word in argv))
    assert code == 2
    assert expected in output.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["data"], ["data", "chekc"]])
def test_data_without_its_command_is_told(argv, capsys):
    assert main(argv) == 2
    assert "chatglm-tuning data check" in capsys.readouterr().err


def report_of(*pairs):
    audit = ExampleAudit()
    list(audit.watch(Example(query, answer) for query, answer in pairs))
    return audit.report()


def test_whitespace_makes_no_other_example():
    report = report_of(("a  b", "c"), ("a b ", "c\n"), ("a b", "d"))
    assert report.findings["the same prompt and answer again"].count == 1
    assert prompts_with_other_answers(report) == 1
    assert overlap_of(report, report_of(("a b", "c"))).pairs == 1


def test_answers_without_any_stop_are_not_called_cut():
    assert not report_of(*((str(n), "正面") for n in range(10))).findings


def test_long_answers_that_are_mostly_cut_are_told_where_some_are_whole():
    whole, cut = "这件衣服的面料柔软亲肤，穿着舒适。" * 4, "这件衣服的面料柔软亲肤，穿着舒适，" * 4
    answers = [whole, *[cut] * 4]
    report = report_of(*((str(n), answer) for n, answer in enumerate(answers)))
    assert report.findings["answers that end in mid-sentence"].count == 4
    assert not report_of(*((str(n), cut) for n in range(5))).findings


def test_limits_are_the_smallest_that_cut_so_little():
    lengths = Lengths(np.arange(1, 1001), np.arange(1000, 0, -1))
    found = limits_that_cut(lengths, 0.01)
    assert (found.max_input_length, found.max_output_length, found.cut) == (995, 995, 0.01)
    assert limits_that_cut(lengths, 0).max_input_length == 1000
    assert limits_at(lengths, 500, 1000).cut == 0.5


@pytest.mark.parametrize("values", [[5], [3, 3, 3], [1, 2], list(range(100)), [1, 10**6]])
def test_bins_hold_every_value_once(values):
    counts, edges = bins_of(np.array(values))
    assert counts.sum() == len(values)
    assert len(edges) == len(counts) + 1 <= 14
    assert edges[0] == min(values)
    assert edges[-1] > max(values)


def test_every_training_says_the_remarks_in_short(caplog, tmp_path):
    rows = [{"content": f"问{n}", "summary": f"答{n}。"} for n in range(4)]
    files = [
        write(tmp_path / "a.jsonl", [*rows, {"content": "问", "summary": "坏�。"}]),
        write(tmp_path / "b.jsonl", rows[:1]),
    ]
    argv = [
        "train-lora",
        "--model_name_or_path",
        str(EMBEDDED),
        "--data_path",
        str(files[0]),
        "--eval_path",
        str(files[1]),
    ]
    argv += ["--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    assert main(argv) == 0
    logged = caplog.text
    assert f"data: characters that replace undecodable bytes: 1 ({files[0]}:5)" in logged
    assert "data: 1 example of the evaluation can be trained on, too" in logged
    assert "`chatglm-tuning data check` tells more" in logged
