"""`chatglm-tuning verify`: each line holds for what was saved, and fails for what was spoiled."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_tuning.checkpoint import (
    LORA_FILE,
    MANIFEST_NAME,
    PREFIX_FILE,
    file_digest,
    read_manifest,
    whole_checkpoints,
    write_manifest,
)
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.loading import load_base
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training.callbacks import LOG_NAME
from chatglm_tuning.training.stopped import BATCH_FILE, REPORT_FILE
from chatglm_tuning.verification import verify as verify_module
from chatglm_tuning.verification.base import check_answers
from chatglm_tuning.verification.published import ANSWERS, PublishedAnswer
from tests.model_folder import EMBEDDED, write_rows, write_tiny_model
from tests.training.commands import FAST

METHODS = {"lora": ("train-lora", []), "ptuning": ("train-ptuning", ["--pre_seq_len", "4"])}
FILES = {"lora": LORA_FILE, "ptuning": PREFIX_FILE}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, rows, and a run of each method with its checkpoints."""
    root = tmp_path_factory.mktemp("verify")
    write_tiny_model(root / "model")
    write_rows(root / "rows.json", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(root / "cache"))
        for method, (command, flags) in METHODS.items():
            settings = {**FAST, "max_steps": 4, "output_dir": str(root / method)}
            (root / "run.json").write_text(json.dumps(settings), encoding="utf-8")
            argv = [
                "--train_args_file",
                root / "run.json",
                "--dtype",
                "float32",
                "--model_name_or_path",
                root / "model",
                "--data_path",
            ]
            argv += [root / "rows.json", "--max_input_length", 64, "--max_output_length", 96, *flags]
            argv += ["--quantization_bit", 4] if method == "ptuning" else []
            assert run_command(command, list(map(str, argv))) == 0
    return root


@pytest.fixture(params=list(METHODS))
def run_folder(request, place, tmp_path):
    """A copy of a run that a test may spoil."""
    shutil.copytree(place / request.param, tmp_path / "run")
    return request.param, tmp_path / "run"


def verify(folder, capsys, *flags):
    code = run_command("verify", [str(folder), *map(str, flags)])
    return code, capsys.readouterr().out


def change_tensors(folder, method, change):
    """Change the adapter's values, and let the manifest vouch for them."""
    manifest = read_manifest(folder)
    file = folder / FILES[method]
    save_file({name: change(value) for name, value in load_file(file).items()}, file)
    write_manifest(folder, manifest, list(manifest.files))


def test_what_a_run_has_left_is_verified(run_folder, capsys):
    _, folder = run_folder
    for saved in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        code, out = verify(saved, capsys)
        assert code == 0, out
        for name in (
            "files",
            "base",
            "values of the base",
            "values of the adapter",
            "read twice",
            "differs from the base",
        ):
            assert f"holds    {name}: " in out
        assert "holds    answers as when it was saved: " in out
        assert f"{saved}: verified" in out


def test_a_run_without_a_result_is_verified_by_its_newest_checkpoint(run_folder, capsys):
    _, folder = run_folder
    for name in (MANIFEST_NAME, *read_manifest(folder).files):
        (folder / name).unlink()
    code, out = verify(folder, capsys)
    assert code == 0
    assert "newest whole checkpoint is checkpoint-4" in out


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_result_that_has_lost_its_manifest_is_not_passed_over(run_folder, capsys, has_checkpoints):
    method, folder = run_folder
    (folder / MANIFEST_NAME).unlink()
    file = folder / FILES[method]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if not has_checkpoints:
        without_checkpoints(folder)
    code, out = verify(folder, capsys)
    assert (code, f"FAILED   files: {folder / MANIFEST_NAME}" in out) == (1, True), out
    assert ("checkpoint-4 of the same run is whole" in out) == has_checkpoints


def test_a_checkpoint_that_has_lost_its_manifest_is_not_whole(run_folder, capsys):
    _, folder = run_folder
    (folder / "checkpoint-4" / MANIFEST_NAME).unlink()
    code, out = verify(folder / "checkpoint-4", capsys)
    assert (code, "FAILED   files: " in out) == (1, True), out


def test_a_checkpoint_of_another_program_needs_no_manifest(run_folder, capsys, place):
    _, folder = run_folder
    (folder / "checkpoint-4" / MANIFEST_NAME).unlink()
    (folder / "checkpoint-4" / "training_args.bin").touch()
    code, out = verify(folder / "checkpoint-4", capsys, "--model_name_or_path", place / "model")
    assert (code, "nothing was recorded then" in out) == (0, True), out


@pytest.mark.parametrize("name", ["trainer_log.jsonl", "trainer_state.json"])
def test_the_log_of_another_program_makes_no_run_of_ours(run_folder, capsys, place, name):
    folder = run_folder[1]
    without_checkpoints(folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / "trainer_log.jsonl").unlink()
    (folder / name).write_text(json.dumps({"current_steps": 5, "total_steps": 60, "loss": 3.1}) + "\n")
    code, out = verify(folder, capsys, "--model_name_or_path", place / "model")
    assert (code, "nothing was recorded then" in out) == (0, True), out


def test_a_file_that_was_changed_fails_and_a_whole_checkpoint_is_named(run_folder, capsys):
    method, folder = run_folder
    file = folder / FILES[method]
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    code, out = verify(folder, capsys)
    assert code == 1
    assert f"FAILED   files: {file}" in out
    assert "checkpoint-4 of the same run is whole" in out


def test_an_adapter_that_was_zeroed_fails(run_folder, capsys):
    method, folder = run_folder
    change_tensors(folder, method, torch.zeros_like)
    code, out = verify(folder, capsys)
    assert code == 1
    assert "holds    answers as when it was saved" not in out
    if method == "lora":
        assert "FAILED   differs from the base: it changes nothing" in out
    else:
        assert "FAILED   answers as when it was saved" in out


def test_an_adapter_of_other_values_fails(run_folder, capsys):
    method, folder = run_folder
    change_tensors(folder, method, lambda value: value * 3 + 0.3)
    code, out = verify(folder, capsys)
    assert code == 1
    assert "FAILED   answers as when it was saved" in out


def test_another_base_fails(run_folder, place, capsys):
    _, folder = run_folder
    other = write_tiny_model(folder.parent / "other")
    weights = torch.load(other / "pytorch_model.bin")
    weights["transformer.layers.0.mlp.dense_h_to_4h.bias"][0] = 0.5
    torch.save(weights, other / "pytorch_model.bin")
    code, out = verify(folder, capsys, "--model_name_or_path", other)
    assert code == 1
    assert "FAILED   base: " in out
    assert "is not the one that it was trained on" in out


@pytest.mark.parametrize("name", [MANIFEST_NAME, "the adapter"])
@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_one_bit_that_flips_in_a_result_fails(run_folder, capsys, name, has_checkpoints):
    method, folder = run_folder
    flip_a_bit(folder / (FILES[method] if name == "the adapter" else name))
    if not has_checkpoints:
        without_checkpoints(folder)
    code, out = verify(folder, capsys)
    assert (code, "FAILED   files: " in out) == (1, True), out


@pytest.mark.parametrize("name", ["adapter_config.json", LORA_FILE])
def test_a_damaged_adapter_of_peft_fails(place, tmp_path, capsys, name):
    for file in ("adapter_config.json", LORA_FILE):
        shutil.copyfile(place / "lora" / file, tmp_path / file)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    code, out = verify(tmp_path, capsys, "--model_name_or_path", place / "model")
    assert (code, f"FAILED   adapter: {tmp_path}" in out) == (1, True), out


def change_manifest(folder, **changes):
    """Change what a manifest says; without the digest of its own it is taken as it is."""
    content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    del content["sha256"]
    for key, value in changes.items():
        if isinstance(content[key], dict) and isinstance(value, dict) and value:
            content[key] |= value
        else:
            content[key] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")


MANIFESTS = [
    {"proof": {}},
    {"proof": [1]},
    {"proof": "yes"},
    {"proof": {"logits": []}},
    {"proof": {"logits": [1, 2, 3]}},
    {"proof": {"logits": ["a"] * 8}},
    {"proof": {"base_logits": [float("nan")] * 8}},
    {"proof": {"base_logits": [10**400] * 8}},
    {"proof": {"dtype": 3}},
    {"settings": {"dtype": "float13"}},
    {"settings": {"dtype": 7}},
    {"base_model": {"quantization_bit": 3}},
    {"base_model": {"name_or_path": 3}},
    {"base_model": {"fingerprint": [1]}},
]


@pytest.mark.parametrize("changes", MANIFESTS, ids=str)
def test_a_manifest_that_says_what_none_can_fails(run_folder, capsys, changes):
    _, folder = run_folder
    change_manifest(folder, **changes)
    code, out = verify(folder, capsys)
    assert (code, f"FAILED   files: {folder / MANIFEST_NAME}: " in out) == (1, True), out


def test_what_a_base_is_known_by_is_told(run_folder, capsys):
    """A changed linear does not show in it, since it is the same in every precision."""
    _, folder = run_folder
    assert "is the one that it was trained on, by its LayerNorms and biases\n" in verify(folder, capsys)[1]


def test_an_adapter_without_a_record_says_so(run_folder, capsys, place):
    _, folder = run_folder
    (without_checkpoints(folder) / MANIFEST_NAME).unlink()
    (folder / LOG_NAME).unlink()
    code, out = verify(folder, capsys, "--model_name_or_path", place / "model")
    assert code == 0
    assert "not seen answers as when it was saved: nothing was recorded then" in out


def test_a_model_is_verified(place, capsys):
    code, out = verify(place / "model", capsys)
    assert code == 0
    assert "holds    weight files" in out
    assert "not seen published answers: the model is not of ChatGLM-6B's size" in out


def test_a_model_with_values_that_are_not_finite_fails(place, capsys, monkeypatch):
    real = verify_module.load_base

    def spoiled(*arguments, **keywords):
        base = real(*arguments, **keywords)
        with torch.no_grad():
            base.model.get_parameter("transformer.layers.1.mlp.dense_h_to_4h.bias")[0] = float("inf")
        return base

    monkeypatch.setattr(verify_module, "load_base", spoiled)
    code, out = verify(place / "model", capsys)
    assert code == 1
    assert "FAILED   values of the base: transformer.layers.1.mlp.dense_h_to_4h.bias" in out


def test_a_model_whose_logits_are_not_finite_fails(place, tmp_path, capsys):
    """Each of its weights is finite, and nearly too large."""
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    weights = torch.load(folder / "pytorch_model.bin")
    weights["transformer.final_layernorm.weight"] = torch.full((32,), 3e38)
    torch.save(weights, folder / "pytorch_model.bin")
    code, out = verify(folder, capsys, "--dtype", "float32")
    assert (code, "the logits that are computed with them are not" in out) == (1, True), out


def test_answers_are_compared_with_what_is_published():
    base = load_base(str(EMBEDDED))
    (given,) = check_answers(base, [PublishedAnswer("你好", "?", length=8)])
    assert given.holds is False
    answer = given.what.partition("is answered ")[2].partition(", and the release")[0].strip("'")
    (given,) = check_answers(base, [PublishedAnswer("你好", answer, length=8)])
    assert given.holds is True


def test_the_width_of_punctuation_does_not_matter():
    (published,) = ANSWERS
    assert published.is_given(published.answer.replace(",", "，").replace("!", "！"))
    assert not published.is_given(published.answer.replace("6B", "7B"))


def test_the_batch_that_stopped_a_run_is_computed_again(place, tmp_path, capsys, monkeypatch):
    """The NaN stands in the adapter that the folder keeps, so that it comes again."""
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(place / "cache"))
    real = run_module.add_adapter

    def add_adapter(*arguments):
        model = real(*arguments)
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_B" in name:
                with torch.no_grad():
                    parameter[0, 0] = float("nan")
        return model

    monkeypatch.setattr(run_module, "add_adapter", add_adapter)
    settings = {**FAST, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    argv = ["--train_args_file", tmp_path / "run.json", "--model_name_or_path", place / "model", "--data_path"]
    argv += [place / "rows.json", "--max_input_length", 64, "--max_output_length", 96]
    assert run_command("train-lora", list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert "layers.1.attention.query_key_value.lora_B.default.weight" in error
    code, out = verify(tmp_path / "run" / "stopped-at-step-1", capsys)
    assert code == 1
    assert "FAILED   the batch that stopped the run: the first value that is not finite is in the parameter" in out
    assert "rows " in out


@pytest.mark.parametrize("damage", ["{", "[]", '{"rows": 3}', None])
def test_a_stopped_step_that_cannot_be_read_fails(place, tmp_path, capsys, damage):
    for file in ("adapter_config.json", LORA_FILE):
        shutil.copyfile(place / "lora" / file, tmp_path / file)
    (tmp_path / REPORT_FILE).write_text(damage or '{"rows": [], "step": 1}', encoding="utf-8")
    (tmp_path / BATCH_FILE).write_bytes(b"\0")
    code, out = verify(tmp_path, capsys, "--model_name_or_path", place / "model")
    assert (code, "FAILED   the batch that stopped the run: " in out) == (1, True), out


def test_a_lora_beside_a_whole_base_is_verified_too(place, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(place / "model", folder)
    for file in ("adapter_config.json", LORA_FILE):
        shutil.copyfile(place / "lora" / file, folder / file)
    code, out = verify(folder, capsys)
    assert (code, "holds    weight files" in out, "holds    differs from the base" in out) == (0, True, True), out
    save_file({name: value * 0 for name, value in load_file(folder / LORA_FILE).items()}, folder / LORA_FILE)
    code, out = verify(folder, capsys)
    assert (code, "FAILED   differs from the base: it changes nothing" in out) == (1, True), out


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ([], "no folder is given"),
        (["a", "--folder", "b"], "two folders are given"),
        (["/nowhere/at/all"], "there is no such folder"),
    ],
)
def test_what_is_not_there_is_refused(argv, what, capsys):
    assert run_command("verify", argv) == 2
    assert what in capsys.readouterr().err


def test_a_run_that_has_left_nothing_yet_is_told_from_a_model(tmp_path, capsys):
    (tmp_path / "trainer_log.jsonl").write_text("", encoding="utf-8")
    assert run_command("verify", [str(tmp_path)]) == 2
    assert "the run has neither a result nor a whole checkpoint" in capsys.readouterr().err
    (tmp_path / "stopped-at-step-2").mkdir()
    assert run_command("verify", [str(tmp_path)]) == 2
    assert f"Verify {tmp_path / 'stopped-at-step-2'}" in capsys.readouterr().err


def flip_a_bit(file):
    """Flip one bit in the middle of the tensors' bytes."""
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("source", ["archive", "SHA256SUMS", "hub cache", "hub note"])
def test_a_bit_that_flips_in_a_base_is_seen_by_whatever_records_it(place, tmp_path, capsys, source):
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    file = next(folder.glob("*.safetensors"), None) or next(folder.glob("*.bin"))
    if source == "archive":
        torch.save({name: value.clone() for name, value in tensors_of(file).items()}, folder / "pytorch_model.bin")
        file.unlink() if file.suffix == ".safetensors" else None
        for index in folder.glob("*.index.json"):
            index.unlink()
        file = folder / "pytorch_model.bin"
    elif source == "SHA256SUMS":
        (folder / "SHA256SUMS").write_text(f"{file_digest(file)}  {file.name}\n", encoding="utf-8")
    elif source == "hub cache":
        blob = tmp_path / file_digest(file)
        file.rename(blob)
        file.symlink_to(blob)
    else:
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{file_digest(file)}\n0.0\n", encoding="utf-8")
    code, out = verify(folder, capsys)
    assert (code, "holds    bytes: 1 file by" in out) == (0, True), out

    flip_a_bit(file.resolve())
    code, out = verify(folder, capsys)
    assert (code, f"FAILED   bytes: {file.name}" in out) == (1, True), out


def tensors_of(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def test_a_quantized_folder_says_which_bytes_its_files_have(place, tmp_path, capsys):
    folder = tmp_path / "int4"
    flags = ["--model_name_or_path", place / "model", "--output_dir", folder, "--quantization_bit", 4]
    assert run_command("quantize", list(map(str, flags))) == 0
    assert verify(folder, capsys)[0] == 0
    flip_a_bit(next(folder.glob("*.safetensors")))
    code, out = verify(folder, capsys)
    assert (code, "SHA256SUMS" in out) == (1, True)


def test_a_model_that_is_cut_off_fails_as_a_damaged_adapter_does(place, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    file = next(folder.glob("*.safetensors"), None) or next(folder.glob("*.bin"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    code, out = verify(folder, capsys)
    assert (code, f"FAILED   model: {file}" in out) == (1, True)


def test_an_adapter_of_values_that_are_not_finite_fails_and_is_no_start(run_folder, place, tmp_path, capsys):
    method, folder = run_folder
    change_tensors(folder, method, lambda value: torch.full_like(value, float("nan")))
    code, out = verify(folder, capsys)
    assert (code, "FAILED   values of the adapter:" in out, "read twice" in out) == (1, True, False)

    command, flags = METHODS[method]
    argv = ["--model_name_or_path", place / "model", "--data_path", place / "rows.json", *flags]
    argv += ["--max_input_length", 64, "--max_output_length", 96, "--output_dir", tmp_path / "new"]
    assert run_command(command, list(map(str, [*argv, "--resume_from_checkpoint", without_checkpoints(folder)]))) == 2
    assert "error [C107]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def without_checkpoints(folder):
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return folder


def test_a_lora_of_peft_is_verified_on_the_base_that_its_configuration_names(place, tmp_path, capsys):
    folder = tmp_path / "peft"
    folder.mkdir()
    for name in ("adapter_config.json", LORA_FILE):
        shutil.copyfile(place / "lora" / name, folder / name)
    code, out = verify(folder, capsys)
    assert (code, "not seen base:" in out, "holds    differs from the base" in out) == (0, True, True)


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(run_folder, capsys):
    _method, folder = run_folder
    (folder / "checkpoint-4").rename(folder / "checkpoint-9")
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2"]
    code, out = verify(folder / "checkpoint-9", capsys)
    assert (code, "it was written at step 4" in out) == (1, True)


def test_a_manifest_that_lacks_a_file_vouches_for_nothing(run_folder, capsys):
    method, folder = run_folder
    content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    del content["files"][FILES[method]], content["sha256"]
    (folder / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    code, out = verify(folder, capsys)
    assert (code, f"does not name {FILES[method]}" in out) == (1, True)
