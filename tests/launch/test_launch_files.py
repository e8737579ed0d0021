"""The files for Slurm and Kubernetes: what the cluster takes, and what torchrun and the training command read of it."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from torch.distributed.run import get_args_parser

from chatglm_tuning.config.parsing import parse_train_arguments
from tests.model_folder import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCHEMAS = yaml.safe_load(Path(__file__).with_name("schemas.yaml").read_text(encoding="utf-8"))
# Of those that sbatch's manual documents (https://slurm.schedmd.com/sbatch.html), with what they may be.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "signal": r"([RB]:|RB:)?(\w+|\d+)(@\d+)?",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
}
ENVIRONMENT = {
    "SLURM_JOB_NUM_NODES": "8",
    "SLURM_JOB_ID": "17",
    "PET_NNODES": "8",
    "PET_MASTER_ADDR": "node-0",
    "PET_MASTER_PORT": "29500",
    "head": "node-0",
    "MODEL": "model",
    "DATA": "train.jsonl",
    "OUTPUT": "output",
}


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def words(text):
    """The words of a command line after the shell has put the variables in."""
    return [re.sub(r"\$(\w+)", lambda match: ENVIRONMENT[match[1]], word) for word in shlex.split(text)]


def slurm_command():
    script = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in script.splitlines() if line.startswith("srun "))
    return words(line.removesuffix("&"))


def pytorchjob_command():
    container = documents("pytorchjob.yaml")[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"][
        "containers"
    ][0]
    return [*container["command"], *container["args"]]


def trainjob_command():
    trainer = documents("trainjob.yaml")[1]["spec"]["trainer"]
    assert trainer["command"] == ["bash", "-c"]
    assert len(trainer["args"]) == 1
    return words(trainer["args"][0])


COMMANDS = {"slurm.sbatch": slurm_command, "pytorchjob.yaml": pytorchjob_command, "trainjob.yaml": trainjob_command}


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "trainjob.yaml"])
def test_every_object_fits_its_schema(name):
    for content in documents(name):
        jsonschema.validate(content, {**SCHEMAS[content["kind"]], "$defs": SCHEMAS["$defs"]})


@pytest.mark.parametrize("spoilt", ["replicas: 8", "elasticPolicy:", "mountPath: /training", "claimName: training"])
def test_a_misspelt_field_does_not_fit(spoilt):
    text = (LAUNCH / "pytorchjob.yaml").read_text(encoding="utf-8")
    assert spoilt in text
    content = yaml.safe_load(text.replace(spoilt, f"x{spoilt}", 1))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, {**SCHEMAS["PyTorchJob"], "$defs": SCHEMAS["$defs"]})


@pytest.mark.parametrize("name", list(COMMANDS))
def test_torchrun_and_the_training_command_take_their_flags(name, monkeypatch, tmp_path):
    command = COMMANDS[name]()
    monkeypatch.chdir(REPOSITORY)
    launch = get_args_parser().parse_args(command[command.index("torchrun") + 1 :])
    assert launch.training_script == "train_lora.py"
    assert (REPOSITORY / launch.training_script).is_file()
    run = parse_train_arguments("lora", launch.training_script_args)
    assert str(run.options.resume_from_checkpoint) == "auto"
    assert run.trainer.values["save_strategy"] == "steps"
    assert run.trainer.values["save_steps"] < run.trainer.values["max_steps"]
    assert launch.shutdown_timeout > 30, "a step and a checkpoint must fit in"


def test_all_of_them_start_64_processes_that_restart():
    slurm, trainjob = (
        get_args_parser().parse_args(command[command.index("torchrun") + 1 :])
        for command in (slurm_command(), trainjob_command())
    )
    for launch in (slurm, trainjob):
        assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend) == ("8", "8", "c10d")
        assert launch.rdzv_endpoint == "node-0:29500"
        assert launch.max_restarts > 0
    job = documents("pytorchjob.yaml")[0]["spec"]
    policy = job["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], job["nprocPerNode"]) == (8, 8, "8")
    assert (policy["rdzvBackend"], policy["maxRestarts"] > 0) == ("c10d", True)
    assert job["pytorchReplicaSpecs"]["Worker"]["replicas"] == 8


@pytest.mark.parametrize("name", list(COMMANDS))
def test_restarts_do_not_meet_old_addresses(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    assert re.search(r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE(=1|\n\s+value: \"1\")", text)


def test_pods_are_given_longer_than_torchrun_gives_its_workers():
    job, runtime = documents("pytorchjob.yaml")[0], documents("trainjob.yaml")[0]
    pods = [
        job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"],
        runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"],
    ]
    for pod in pods:
        assert pod["terminationGracePeriodSeconds"] > 100
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_sbatch_options_are_documented_ones():
    lines = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    for line in lines:
        name, _, value = line.removeprefix("--").partition("=")
        assert re.fullmatch(SBATCH[name], value), line


def test_the_sbatch_file_is_bash():
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)


STUBS = {
    "scontrol": '[ "$1" = show ] && echo node-0 && echo node-1; echo "scontrol $*" >> "$CALLS"',
    "scancel": 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$CALLS.step")"',
    "srun": 'echo $$ > "$CALLS.step"; echo "srun $*" >> "$CALLS"; trap "exit 143" TERM\n'
    'for _ in $(seq "${STEPS:?}"); do sleep 0.1; done; exit "${CODE:?}"',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the job on a stand-in of Slurm, whose step takes tenths of a second and ends with a code."""
    for name, body in STUBS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        file.chmod(0o755)
    calls = tmp_path / "calls"

    def start(tenths, code):
        settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
        settings |= {"STEPS": str(tenths), "CODE": str(code), "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
        settings |= {"SLURM_JOB_NODELIST": "node-[0-1]", "MODEL": "m", "DATA": "d", "OUTPUT": "o"}
        return subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch")], env=settings), calls

    return start


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_ends_by_itself_ends_with_the_code_of_its_step(slurm, code):
    job, calls = slurm(1, code)
    assert job.wait(timeout=30) == code
    text = calls.read_text(encoding="utf-8")
    assert "--rdzv_endpoint=node-0:29500" in text
    assert "requeue" not in text


def test_a_job_at_its_time_limit_ends_its_step_and_is_queued_again(slurm):
    job, calls = slurm(300, 0)
    deadline = time.monotonic() + 30
    while not (calls.is_file() and "srun" in calls.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert calls.read_text(encoding="utf-8").splitlines()[-2:] == ["scancel --signal=TERM 17", "scontrol requeue 17"]
