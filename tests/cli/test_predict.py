"""`predict` as users run it: its files, kills at any moment, and what is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import chatglm_tuning.loading
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.evaluation.predict import META_NAME, PART_NAME
from tests.evaluation.places import make_place
from tests.model_folder import REPOSITORY

PREDICTIONS = "predictions.jsonl"
HOT = ["--do_sample", "--temperature", "3", "--top_p", "1", "--top_k", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("predict"))


def lines(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def predict(place, folder, *more):
    return run_command("predict", place.flags(folder, *more))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "predictions"
    assert predict(place, folder) == 0
    return folder


def test_one_line_a_prompt_in_the_order_of_the_data(place, whole):
    rows = [json.loads(line) for line in place.rows.read_text(encoding="utf-8").splitlines()]
    found = lines(whole)
    assert [line["prompt"] for line in found[:-1]] == list(dict.fromkeys(row["prompt"] for row in rows[:-1]))
    assert found[-1]["prompt"] == "[Round 0]\n问：谁？\n答：我。\n[Round 1]\n问：你好\n答："
    assert found[0]["references"] == [rows[0]["response"], "好看的衣服。", "很好。"]
    assert sum(len(line["references"]) for line in found) == len(rows) == len(found) + 6
    assert all(set(line) == {"prompt", "references", "prediction", "finish_reason"} for line in found)
    assert {line["finish_reason"] for line in found} <= {"stop", "length"}
    assert set(contents(whole)) == {PREDICTIONS, META_NAME}


def test_every_flag_changes_the_answers(place, whole, tmp_path):
    found = {"base": [line["prediction"] for line in lines(whole)]}
    changes = {
        "lora": ["--lora_checkpoint", place.lora],
        "prefix": ["--ptuning_checkpoint", place.prefix],
        "int4": [*HOT, "--quantization_bit", "4"],
        "shorter": ["--max_output_length", "6"],
        "cut": ["--max_input_length", "8"],
        "drawn": HOT,
        "another seed": [*HOT, "--seed", "1"],
        "colder": ["--do_sample", "--temperature", "1", "--top_p", "1", "--top_k", "0"],
        "fewer": [*HOT[:-2], "--top_k", "3"],
        "narrower": ["--do_sample", "--temperature", "3", "--top_p", "0.5", "--top_k", "0"],
        "more at once": [*HOT, "--batch_size", "5"],
    }
    for name, flags in changes.items():
        assert predict(place, tmp_path / name, *flags) == 0
        found[name] = [line["prediction"] for line in lines(tmp_path / name)]
    assert len({json.dumps(answers) for answers in found.values()}) == len(found)
    again = tmp_path / "again"
    assert predict(place, again, *HOT) == 0
    assert contents(again) == contents(tmp_path / "drawn")


def test_a_whole_result_is_used_as_it_is(place, whole, caplog, monkeypatch, capsys):
    before = contents(whole)
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    with caplog.at_level("INFO"):
        assert predict(place, whole) == 0
    assert "are there already, whole" in caplog.text
    assert capsys.readouterr().out == f"{whole / PREDICTIONS}\n"
    assert contents(whole) == before


@pytest.mark.parametrize("noted", ["nothing", None, {"adapter": 3, "base": "b"}], ids=str)
def test_what_an_earlier_version_left_is_told_whose_it_is(place, whole, tmp_path, monkeypatch, caplog, noted):
    folder = shutil.copytree(whole, tmp_path / "earlier")
    expected = json.loads((whole / META_NAME).read_text(encoding="utf-8"))
    changed = {key: value for key, value in expected.items() if key != "answered_by"}
    if noted != "nothing":
        changed["answered_by"] = noted
    (folder / META_NAME).write_text(json.dumps(changed), encoding="utf-8")
    stamp = (folder / PREDICTIONS).stat().st_mtime_ns
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    with caplog.at_level("INFO"):
        assert predict(place, folder) == 0
    assert json.loads((folder / META_NAME).read_text(encoding="utf-8")) == expected
    assert contents(folder).keys() == contents(whole).keys()
    assert (folder / PREDICTIONS).read_bytes() == (whole / PREDICTIONS).read_bytes()
    assert (folder / PREDICTIONS).stat().st_mtime_ns == stamp
    assert "which adapter and base the answers are of is noted in it now" in caplog.text
    completed = contents(folder)
    assert predict(place, folder) == 0
    assert contents(folder) == completed


def test_the_identity_of_a_base_that_is_loaded_is_not_read_again(place, whole, tmp_path, monkeypatch):
    from chatglm_tuning.evaluation import task as module

    monkeypatch.setattr(module, "read_identity", lambda _folder: pytest.fail("the base was read again"))
    assert predict(place, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_another_run_is_refused_unless_it_may_overwrite(place, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "copy")
    before = contents(folder)
    for flags, says in [
        (["--do_sample"], "do_sample was False and is now True"),
        (["--max_output_length", "11"], "max_output_length was 12 and is now 11"),
        (["--quantization_bit", "8"], "quantization_bit was not set and is now 8"),
        (["--lora_checkpoint", place.lora], "method was not set and is now lora; another adapter"),
    ]:
        assert predict(place, folder, *flags) == 2
        message = capsys.readouterr().err
        assert f"{folder}: it holds predictions of another run ({says}" in message
        assert message.endswith("or --overwrite to give them up. (chatglm-tuning doctor O105 explains)\n")
    assert contents(folder) == before
    assert predict(place, folder, "--do_sample", "--overwrite") == 0
    assert contents(folder)[PREDICTIONS] != before[PREDICTIONS]


def test_other_data_and_another_base_are_noticed(place, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "copy")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(place.rows.read_text(encoding="utf-8").replace("很好。", "很好！"), encoding="utf-8")
    flags = place.flags(folder)
    flags[flags.index("--data_path") + 1] = str(rows)
    assert run_command("predict", flags) == 2
    assert "another run (other data)" in capsys.readouterr().err
    model = shutil.copytree(place.model, tmp_path / "model")
    shard = model / "pytorch_model-00001-of-00002.bin"
    weights = bytearray(shard.read_bytes())
    weights[len(weights) // 2] ^= 1
    shard.write_bytes(weights)
    flags = place.flags(folder)
    flags[flags.index("--model_name_or_path") + 1] = str(model)
    assert run_command("predict", flags) == 2
    assert "another run (another base)" in capsys.readouterr().err


def test_a_result_that_was_changed_is_not_taken_for_a_whole_one(place, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "copy")
    text = (folder / PREDICTIONS).read_text(encoding="utf-8")
    (folder / PREDICTIONS).write_text(text[:-2], encoding="utf-8")
    assert predict(place, folder) == 2
    assert "predictions.jsonl is not of this run, or was changed after it" in capsys.readouterr().err
    (folder / PREDICTIONS).write_bytes(b"\xff\xfe{")
    assert predict(place, folder) == 2
    assert "predictions.jsonl is not of this run, or was changed after it" in capsys.readouterr().err
    assert predict(place, folder, "--overwrite") == 0
    assert contents(folder) == contents(whole)


def test_overwriting_gives_up_another_run_alone(place, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    assert predict(place, folder, "--overwrite") == 0
    assert contents(folder) == contents(whole)


def test_two_runs_never_write_into_one_folder(place, tmp_path, capsys, monkeypatch):
    from chatglm_tuning.evaluation import predict as module

    folder = tmp_path / "out"
    codes, answering = [], []

    def start_another(*arguments):
        answering.append(arguments)
        if len(answering) > 1:
            raise KeyboardInterrupt
        # In another thread, since one process may take the lock again.
        thread = threading.Thread(target=lambda: codes.append(predict(place, folder)))
        thread.start()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "answer_batch", start_another)
    assert predict(place, folder) == 130
    assert codes == [2]
    assert f"error [O106]: {folder}: another run is writing here. Wait for its end" in capsys.readouterr().err


def test_prompts_alone_are_answered(place, whole, tmp_path, capsys, caplog):
    rows = [json.loads(line) for line in place.rows.read_text(encoding="utf-8").splitlines()]
    asked = [{"content": row["prompt"]} for row in rows[:-1]]
    asked.append(
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(["user", "assistant", "user"], ["谁？", "我。", "你好"], strict=True)
            ]
        }
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    flags = place.flags(tmp_path / "out")
    flags[flags.index("--data_path") + 1] = str(path)
    with caplog.at_level("INFO"):
        assert run_command("predict", flags) == 0
    count = len(lines(whole))
    told = f"{len(asked)} rows have no answer: {count} of {count + 1} prompts have no reference, and eval cannot"
    assert told in caplog.text
    found = {line["prompt"]: line for line in lines(tmp_path / "out")}
    expected = lines(whole)
    # The first turn of the messages is a prompt with an answer, the last one has none.
    assert found.pop("谁？")["references"] == ["我。"]
    assert {line["prompt"] for line in expected} == set(found)
    assert all(line["references"] == [] for line in found.values())
    assert run_command("eval", ["--predictions", str(tmp_path / "out" / PREDICTIONS)]) == 2
    told = capsys.readouterr().err
    assert ':1: "references" is empty: there is nothing to score the prediction against' in told
    assert "have no answer: add it or leave them out, and run chatglm-tuning predict again" in told


def test_a_full_disk_leaves_nothing_half_written(place, whole, tmp_path, monkeypatch, capsys):
    from chatglm_tuning.evaluation import files

    folder = tmp_path / "full"
    sync = files.fsync

    def fail_at_the_result(path):
        if path.name == f".{PREDICTIONS}.part":
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", fail_at_the_result)
        assert predict(place, folder) == 2
    assert "the results cannot be written (No space left on device)" in capsys.readouterr().err
    assert set(contents(folder)) == {PART_NAME}
    assert predict(place, folder) == 0
    assert contents(folder) == contents(whole)


DAMAGES = {
    "no answers": b'{"batch": 2}\n',
    "answers are no list": b'{"batch": 2, "answers": 4}\n',
    "an answer is no pair": b'{"batch": 2, "answers": [["a", "stop"], 5, ["a", "stop"], ["a", "stop"]]}\n',
    "an unknown reason": b'{"batch": 2, "answers": [["a", "b"], ["a", "b"], ["a", "b"], ["a", "b"]]}\n',
    "no UTF-8": b'{"batch": 2, "answers": [%s]}\n' % b",".join([b'["\\ud800", "stop"]'] * 4),
}


@pytest.mark.parametrize("damage", ["nothing", "torn line", "zeros", "no header", *DAMAGES])
def test_what_a_kill_left_is_gone_on_with(place, whole, tmp_path, damage, monkeypatch, caplog):
    from chatglm_tuning.evaluation import predict as module

    calls = []
    answer = module.answer_batch

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*arguments)

    folder = tmp_path / "killed"
    monkeypatch.setattr(module, "answer_batch", stop_at_the_third)
    assert predict(place, folder) == 130
    assert "interrupted after 8 of 23 prompts; the same command goes on" in caplog.text
    assert [path.name for path in folder.iterdir()] == [PART_NAME]
    part = folder / PART_NAME
    if damage == "torn line":
        part.write_bytes(part.read_bytes()[:-5])
    elif damage == "zeros":
        part.write_bytes(part.read_bytes() + b"\0" * 50 + b"\n")
    elif damage == "no header":
        part.write_bytes(part.read_bytes()[:20])
    elif damage in DAMAGES:
        part.write_bytes(part.read_bytes() + DAMAGES[damage])
    calls.extend([None] * 3)
    with caplog.at_level("INFO"):
        assert predict(place, folder) == 0
    done = {"torn line": 1, "no header": 0}.get(damage, 2)
    assert len(calls) == 6 + 6 - done
    assert ("going on after" in caplog.text) == (done > 0)
    assert contents(folder) == contents(whole)


def test_a_kill_between_the_result_and_its_description_is_mended(place, whole, tmp_path, monkeypatch):
    from chatglm_tuning.evaluation import predict as module

    write = module.write_whole

    def stop_before_the_description(path, content):
        if path.name == META_NAME:
            raise KeyboardInterrupt
        write(path, content)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", stop_before_the_description)
        assert predict(place, folder) == 130
    assert set(contents(folder)) == {PREDICTIONS, PART_NAME}
    assert predict(place, folder) == 0
    assert contents(folder) == contents(whole)


def kill_and_rerun(place, folder, expected, draw, kills):
    """Start the command, kill -9 it soon after it has begun to write, and run it to its end.

    Returns how many of the processes had not ended before they were killed.
    """
    hits = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["--batch_size", "1", *HOT]
    command = [sys.executable, "-m", "chatglm_tuning", "predict", *place.flags(folder, *more)]
    for _ in range(kills):
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        part = folder / PART_NAME
        size = part.stat().st_size if part.is_file() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if part.is_file() and part.stat().st_size > size:
                time.sleep(draw.random() * 0.4)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == expected
    return hits


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "predictions"
    assert predict(place, folder, "--batch_size", "1", *HOT) == 0
    return contents(folder)


def test_a_killed_run_ends_with_the_same_bytes(place, undisturbed, tmp_path):
    kill_and_rerun(place, tmp_path / "killed", undisturbed, random.Random(1), kills=1)


@pytest.mark.slow
def test_runs_killed_many_times_end_with_the_same_bytes(place, undisturbed, tmp_path):
    """CHATGLM_TUNING_KILLS sets how many kills there are in all at least, three to a run."""
    draw, hits = random.Random(2), []
    while sum(hits) < int(os.environ.get("CHATGLM_TUNING_KILLS", "25")):
        hits.append(kill_and_rerun(place, tmp_path / str(len(hits)), undisturbed, draw, kills=3))
    print(f"predict: killed {sum(hits)} times in {len(hits)} runs")


BAD = [
    (["--data_path", "{root}/none.json"], "{root}/none.json: there is no such file"),
    (["--lora_checkpoint", "{root}/none"], "{root}/none: there is no such folder"),
    (["--lora_checkpoint", "{root}/prefix"], "Give it with --ptuning_checkpoint"),
    (["--ptuning_checkpoint", "{root}/lora"], "Give it with --lora_checkpoint"),
    (["--lora_checkpoint", "{root}/lora", "--ptuning_checkpoint", "{root}/prefix"], "Give one adapter a run"),
    (["--lora_checkpoint", "{root}/other-lora"], "the adapter was trained on a base of 99 layers"),
    (["--temperature", "0.5"], "--temperature changes nothing where the likeliest token is taken"),
    (["--top_k", "5"], "--top_k changes nothing"),
    (["--do_sample", "--temperature", "0"], "leave out --do_sample"),
    (["--predict_samples", "3"], "--predict_samples is no flag of chatglm-tuning predict. It belongs to training"),
    (["--data_path", "{root}/lora/adapter_config.json"], "or pass --skip_bad_rows to leave them out"),
    (["--batch_size", "0"], "--batch_size must be a whole number of at least 1"),
    (["--max_output_length", "3000"], "make 3064, and the model's context is"),
    (["--output_dir", "{root}/rows.jsonl"], "{root}/rows.jsonl: output_dir is a file"),
    (["--output_dir", "{root}/rows.jsonl/a"], "output_dir cannot be written"),
    (["--eval_path", "x"], "Give the files with --data_path"),
    (["--pre_seq_len", "3"], "it is read from the folder"),
    (["--model_name_or_path", "{root}/lora"], "{root}/lora: the folder holds a LoRA"),
]


@pytest.mark.parametrize(("more", "says"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_mistakes_are_refused_before_anything_is_loaded_or_written(place, tmp_path, monkeypatch, capsys, more, says):
    adapter = place.root / "other-lora"
    if not adapter.is_dir():
        shutil.copytree(place.lora, adapter)
        manifest = json.loads((adapter / "chatglm_tuning.json").read_text(encoding="utf-8"))
        manifest["base_model"]["num_layers"] = 99
        del manifest["sha256"]
        (adapter / "chatglm_tuning.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    before = sorted(place.root.rglob("*"))
    more = [word.replace("{root}", str(place.root)) for word in more]
    argv = place.flags(tmp_path / "output")
    if more[0] in argv:
        del argv[argv.index(more[0]) : argv.index(more[0]) + 2]
    assert run_command("predict", [*argv, *more]) == 2
    captured = capsys.readouterr()
    assert says.replace("{root}", str(place.root)) in captured.err
    assert captured.err.count("error [") == 1
    assert captured.out == ""
    assert not (tmp_path / "output").exists()
    assert sorted(place.root.rglob("*")) == before


@pytest.mark.parametrize("name", ["--data_path", "--output_dir"])
def test_what_is_missing_is_named(place, tmp_path, capsys, name):
    argv = place.flags(tmp_path / "output")
    del argv[argv.index(name) : argv.index(name) + 2]
    assert run_command("predict", argv) == 2
    assert f"{name} is missing" in capsys.readouterr().err
