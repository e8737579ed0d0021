"""A table of what can go wrong in a run that has a checkpoint: each row is injected and seen.

Every row is held to the same: the message, the exit code, and that nothing was lost: no file that stood there before
has changed, and when the fault is gone the run goes on to the bytes of a run that nothing disturbed. What is wrong
before a run starts (data, model folders, adapters, settings) has its table in tests/test_bad_inputs.py; kills and lost
processes are in test_resume.py, test_crash_safety.py and test_distributed_faults.py.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from chatglm_tuning import checkpoint as checkpoint_module
from chatglm_tuning.checkpoint import LORA_FILE, MANIFEST_NAME, PREFIX_FILE, read_manifest, whole_checkpoints
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.folder_lock import only_writer
from chatglm_tuning.model.modeling import ChatGLMMLP
from chatglm_tuning.training import callbacks as callbacks_module
from chatglm_tuning.training import checkpoints as checkpoints_module
from chatglm_tuning.training import disk as disk_module
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training import trainer as trainer_module
from chatglm_tuning.training.callbacks import LOG_NAME, RunLog
from tests.model_folder import REPOSITORY, write_rows, write_tiny_model
from tests.training.commands import FAST, adapter_bytes, environment

METHODS = {"lora": ("train-lora", ["--lora_dropout", "0.1"]), "ptuning": ("train-ptuning", ["--pre_seq_len", "4"])}
STEPS = 6
# Of what a run writes beside its checkpoints, these are written on from where they stand.
GROWING = (LOG_NAME, "loss.png")


@dataclass(frozen=True)
class World:
    """A base, rows and the folder of a run that stands at checkpoint-2 of 6 steps."""

    root: Path
    method: str

    @property
    def run(self) -> Path:
        return self.root / "run"

    def argv(self, *flags: Any) -> list[str]:
        """The flags that go on with the run."""
        argv = ["--train_args_file", self.root / "run.json", "--model_name_or_path", self.root / "model"]
        argv += ["--data_path", self.root / "rows.json", "--dtype", "float32"]
        argv += ["--max_input_length", 64, "--max_output_length", 96, *METHODS[self.method][1], *flags]
        return [str(word) for word in argv]

    def go_on(self) -> int:
        return run_command(METHODS[self.method][0], self.argv("--resume_from_checkpoint", self.run))

    def snapshot(self) -> dict[str, bytes]:
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file() and path.name not in GROWING)
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


Inject = Callable[[World, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """One row. says: a fragment of what is told, {run} being the run's folder. code: the exit code.

    spoils: names of files that the fault itself changes. stands: the newest whole checkpoint afterwards.
    """

    name: str
    says: str
    inject: Inject
    code: int = 2
    spoils: tuple[str, ...] = ()
    stands: str = "checkpoint-2"
    methods: tuple[str, ...] = ("lora", "ptuning")


def on_the_model(spoil: Callable[[nn.Module], None]) -> Inject:
    def inject(_world, patch):
        real = run_module.add_adapter

        def add_adapter(*arguments):
            model = real(*arguments)
            spoil(model)
            return model

        patch.setattr(run_module, "add_adapter", add_adapter)

    return inject


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, ChatGLMMLP)]


def output_of_layer(layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Inject:
    def spoil(model):
        hook = lambda module, _inputs, output: change(output) if module.training else None  # noqa: E731
        layers_of(model)[layer].register_forward_hook(hook)

    return on_the_model(spoil)


def gradient_of_layer(layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Inject:
    def spoil(model):
        hook = lambda _module, _inputs, output: output.register_hook(change) and None  # noqa: E731
        layers_of(model)[layer].register_forward_hook(hook)

    return on_the_model(spoil)


def write_to_frozen(model: nn.Module) -> None:
    weight = next(parameter for name, parameter in model.named_parameters() if "dense_4h_to_h.bias" in name)

    def hook(module, _inputs, _output):
        if module.training:
            weight.data.add_(1e-3)

    layers_of(model)[0].register_forward_hook(hook)


def cut_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


def loss_of_zero(_world, patch):
    real = trainer_module.TuningTrainer.compute_loss
    patch.setattr(trainer_module.TuningTrainer, "compute_loss", lambda self, *a, **k: real(self, *a, **k) * 0)


def saved_as(change: Callable[[torch.Tensor], torch.Tensor]) -> Inject:
    """What is written of the adapter is not what was trained."""

    def inject(_world, patch):
        real = checkpoint_module.save_file
        patch.setattr(
            checkpoint_module,
            "save_file",
            lambda state, path, **keywords: real(
                {name: change(value) for name, value in state.items()}, path, **keywords
            ),
        )

    return inject


def result_saved_as_zeros(world, patch):
    """Over the result that the run had at its first checkpoint."""
    for name in (LORA_FILE, PREFIX_FILE, MANIFEST_NAME):
        if (world.run / "checkpoint-2" / name).is_file():
            shutil.copyfile(world.run / "checkpoint-2" / name, world.run / name)
    real = run_module.save_adapter_files

    def save(model, folder, **keywords):
        names = real(model, folder, **keywords)
        file = next(folder.glob("*.safetensors"))
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
        return names

    patch.setattr(run_module, "save_adapter_files", save)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_arguments, **_keywords):
        raise error

    return fail


def failing(module: Any, name: str, error: BaseException) -> Inject:
    return lambda _world, patch: patch.setattr(module, name, raising(error))


def failing_optimizer_save(error: BaseException) -> Inject:
    def inject(_world, patch):
        real = torch.save

        def save(content, path, *arguments, **keywords):
            if str(path).endswith("optimizer.pt"):
                Path(path).write_bytes(b"PK half of a file")
                raise error
            return real(content, path, *arguments, **keywords)

        patch.setattr(torch, "save", save)

    return inject


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def signalled(number: int) -> Inject:
    """The signal comes while the third step is logged."""

    def inject(_world, patch):
        real = RunLog.on_log

        def on_log(self, args, state, control, logs=None, **keywords):
            real(self, args, state, control, logs, **keywords)
            if state.global_step == 3:
                os.kill(os.getpid(), number)

        patch.setattr(RunLog, "on_log", on_log)

    return inject


def held_by_another(world, patch):
    release, held = threading.Event(), threading.Event()

    def hold():
        with only_writer(world.run):
            held.set()
            release.wait(120)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    undo = patch.undo

    def end():
        release.set()
        other.join()
        undo()

    patch.undo = end


def torn(name: str, change: Callable[[bytes], bytes | None]) -> Inject:
    """The file `name` of the checkpoint is changed; another whole one stands before it."""

    def inject(world, _patch):
        shutil.copytree(world.run / "checkpoint-2", world.run / "checkpoint-3")
        file = world.run / "checkpoint-3" / name
        changed = change(file.read_bytes())
        file.unlink() if changed is None else file.write_bytes(changed)

    return inject


NAN, INF = float("nan"), float("inf")
FULL = os_error(errno.ENOSPC)
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3")
WRITING = "the run cannot write its files"

# fmt: off
FAULTS = [
    *[Fault(f"NaN in layer {layer}", f"layers.{layer}.mlp (the loss is",
            output_of_layer(layer, lambda x: x * NAN)) for layer in range(3)],
    Fault("infinity in one token's state", "layers.1.mlp (the loss is",
          output_of_layer(1, lambda x: x.index_fill(1, torch.tensor([2]), INF))),
    Fault("a gradient of infinity", "the first number that is not finite is in the gradient of",
          gradient_of_layer(1, lambda gradient: gradient * INF)),
    Fault("a NaN in the adapter", "the first number that is not finite is in the parameter",
          lambda world, patch: patch.setattr(trainer_module, "load_adapter_values", fill_with_nan)),
    Fault("a frozen weight that changes", "weights that are not trained have changed", on_the_model(write_to_frozen)),
    Fault("a dead adapter", "no gradient reaches", on_the_model(cut_gradients)),
    Fault("a loss of 0", "the loss of step 3 is exactly 0", loss_of_zero),
    Fault("an adapter saved as zeros", "answers otherwise than the one that was trained", saved_as(torch.zeros_like)),
    Fault("an adapter saved with NaN", "answers otherwise than the one that was trained", saved_as(lambda x: x * NAN)),
    Fault("an adapter saved with another value", "answers otherwise", saved_as(lambda x: x + 0.25)),
    Fault("a result saved as zeros", "answers otherwise than the one that was trained", result_saved_as_zeros,
          stands="checkpoint-6"),
    Fault("a full disk under the optimizer", f"{WRITING} (no space is left", failing_optimizer_save(FULL)),
    Fault("a full disk that torch tells", f"{WRITING} (a file was cut short", failing_optimizer_save(TORCH_FULL)),
    Fault("a full disk under the adapter", f"{WRITING} (no space is left", failing(
        checkpoint_module, "save_file", SafetensorError("I/O error: No space left on device (os error 28)"))),
    Fault("a full disk under the manifest", f"{WRITING} (no space is left",
          failing(checkpoints_module, "write_manifest", FULL)),
    Fault("a full disk under the log", f"{WRITING} (no space is left", failing(RunLog, "_append", FULL)),
    Fault("a full disk under the picture", f"{WRITING} (no space is left",
          failing(callbacks_module, "draw_loss", FULL), stands="checkpoint-4"),
    Fault("a full disk under the result", f"{WRITING} (no space is left",
          failing(run_module, "save_adapter_files", FULL), stands="checkpoint-6"),
    Fault("a used-up quota", f"{WRITING} (the disk quota is used up)",
          failing(checkpoints_module, "write_manifest", os_error(errno.EDQUOT))),
    Fault("a disk that becomes read-only", f"{WRITING} (it has become read-only)",
          failing(checkpoints_module, "write_manifest", os_error(errno.EROFS))),
    Fault("a disk that breaks", f"{WRITING} (the disk reports an error)",
          failing(checkpoints_module, "fsync", os_error(errno.EIO)), stands="checkpoint-4"),
    Fault("no room for a checkpoint", "KiB, and 100 bytes are free", lambda _world, patch: patch.setattr(
        disk_module.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 100))),
    Fault("no memory left on the CPU", "the memory is used up", failing(
        trainer_module.TuningTrainer, "compute_loss", RuntimeError("DefaultCPUAllocator: can't allocate memory"))),
    Fault("no memory left on a GPU", "the memory is used up", failing(
        trainer_module.TuningTrainer, "compute_loss", torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))),
    Fault("SIGTERM", "ended by SIGTERM; go on with --resume_from_checkpoint {run}", signalled(signal.SIGTERM),
          code=0, stands="checkpoint-4"),
    Fault("SIGTERM while the base is read", "the run has ended before its first step",
          lambda _world, patch: patch.setattr(run_module, "load_base", lambda *_a, **_k: os.kill(os.getpid(), 15)),
          code=0),
    Fault("Ctrl-C", "", signalled(signal.SIGINT), code=130),
    Fault("two runs in one folder", "another run is writing here", held_by_another, spoils=("run/.writing.lock",)),
    *[Fault(f"a torn {name}", "checkpoint-3 is passed over", torn(name, lambda data: data[:-7]), code=0,
            stands="checkpoint-6")
      for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST_NAME)],
    Fault("a bit flipped in the optimizer", "checkpoint-3 is passed over", torn(
        "optimizer.pt", lambda data: data[:900] + bytes([data[900] ^ 1]) + data[901:]), code=0, stands="checkpoint-6"),
    Fault("a missing rng_state.pth", "checkpoint-3 is passed over", torn("rng_state.pth", lambda _data: None),
          code=0, stands="checkpoint-6"),
    Fault("a checkpoint without its manifest", "it has no manifest", torn(MANIFEST_NAME, lambda _data: None),
          code=0, stands="checkpoint-6"),
    Fault("an empty manifest", "its manifest cannot be read", torn(MANIFEST_NAME, lambda _data: b""),
          code=0, stands="checkpoint-6"),
    Fault("a torn adapter", "checkpoint-3 is passed over", torn(LORA_FILE, lambda data: data[:-1]),
          code=0, stands="checkpoint-6", methods=("lora",)),
    Fault("a torn prefix", "checkpoint-3 is passed over", torn(PREFIX_FILE, lambda data: data[:-1]),
          code=0, stands="checkpoint-6", methods=("ptuning",)),
]
# fmt: on
TABLE = [
    pytest.param(fault, method, id=f"{fault.name}-{method}", marks=() if is_first else pytest.mark.slow)
    for index, fault in enumerate(FAULTS)
    for method in fault.methods
    for is_first in [method == fault.methods[index % len(fault.methods)]]
]
"""Every fault with one of the methods, in turn, and with the other in `make slow-faults`."""


def values_of(world: World) -> bytes:
    """The adapter's file; its configuration beside it names the base by its path."""
    return next(content for name, content in adapter_bytes(world.run).items() if name.endswith(".safetensors"))


def fill_with_nan(model, _folder):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(NAN)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, cache):
    """Of each method a world, and what its run gives undisturbed."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(cache))
        for method in METHODS:
            world = World(tmp_path_factory.mktemp(method), method)
            write_tiny_model(world.root / "model", num_layers=3)
            write_rows(world.root / "rows.json", 12)
            settings = {**FAST, "lr_scheduler_type": "constant", "max_steps": STEPS, "output_dir": str(world.run)}
            settings |= {"learning_rate": 5e-3, "warmup_ratio": 0.0}
            (world.root / "run.json").write_text(json.dumps(settings), encoding="utf-8")
            assert run_command(METHODS[method][0], world.argv()) == 0
            undisturbed = values_of(world)
            for path in world.run.glob("checkpoint-[46]"):
                shutil.rmtree(path)
            for name in [*read_manifest(world.run).files, MANIFEST_NAME]:
                (world.run / name).unlink()
            made[method] = (world, undisturbed)
    return made


@pytest.fixture
def place(worlds, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(cache))

    def copy(method):
        kept, undisturbed = worlds[method]
        world = World(Path(shutil.copytree(kept.root, tmp_path / "world")), method)
        text = (world.root / "run.json").read_text(encoding="utf-8").replace(str(kept.root), str(world.root))
        (world.root / "run.json").write_text(text, encoding="utf-8")
        return world, undisturbed

    return copy


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C interrupts, also where the tests were started in the background, for which a shell turns it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_table_is_long_enough():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 40


@pytest.mark.parametrize(("fault", "method"), TABLE)
def test_a_fault_is_told_and_nothing_is_lost(fault, method, place, capsys, caplog):
    world, undisturbed = place(method)
    patch = pytest.MonkeyPatch()
    caplog.set_level("INFO")
    try:
        fault.inject(world, patch)
        before = world.snapshot()
        code = world.go_on()
    finally:
        patch.undo()
    told = capsys.readouterr().err + caplog.text
    assert fault.says.format(run=world.run) in told
    assert "Traceback" not in told
    assert code == fault.code
    after = world.snapshot()
    lost = [name for name in before if after.get(name) != before[name] and "checkpoint-3" not in name]
    assert [name for name in lost if name not in fault.spoils] == []
    assert next(whole_checkpoints(world.run)).name == fault.stands
    assert read_manifest(world.run / fault.stands) is not None
    assert not list(world.run.glob(".*.part"))
    if fault.code != 0 or fault.stands != "checkpoint-6":
        assert world.go_on() == 0
    assert values_of(world) == undisturbed


def mounts_tmpfs() -> bool:
    """Whether a small disk can be made: by root, or in a namespace of this user's own."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("unshare") is None or not mounts_tmpfs(), reason="no small disk can be made"
)
@pytest.mark.parametrize(
    ("method", "kib"),
    [
        ("lora", 40),
        *[pytest.param("lora", kib, marks=pytest.mark.slow) for kib in range(4, 140, 12)],
        *[pytest.param("ptuning", kib, marks=pytest.mark.slow) for kib in range(4, 60, 8)],
    ],
)
def test_a_disk_that_is_really_full(method, kib, place, tmp_path, cache):
    """The run's folder lies on a tmpfs with this much room beside the first checkpoint: for a part of the others."""
    world, undisturbed = place(method)
    kept, disk = tmp_path / "kept", world.run
    shutil.move(disk, kept)
    disk.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in kept.rglob("*")) + 8
    go_on = [sys.executable, "-m", "chatglm_tuning", METHODS[method][0], *world.argv("--resume_from_checkpoint", disk)]
    script = f"""
        mount -t tmpfs -o size={used + kib}k none {disk} && cp -r {kept}/. {disk}/
        {subprocess.list2cmdline(go_on)}
        code=$?
        cp -r {disk}/. {tmp_path}/after/
        exit $code
    """
    (tmp_path / "after").mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=environment(cache),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    print(f"{method}, {kib} KiB: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode in ((2,) if kib <= 40 and method == "lora" else (0, 2)), done.stderr[-2000:]
    if done.returncode == 2:
        assert WRITING in done.stderr or "a checkpoint takes about" in done.stderr
    assert "Traceback" not in done.stderr
    before = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("checkpoint-2/*")}
    after = {path.relative_to(tmp_path / "after"): path.read_bytes() for path in tmp_path.rglob("after/checkpoint-2/*")}
    assert after == before
    shutil.rmtree(disk)
    shutil.copytree(tmp_path / "after", disk)
    assert world.go_on() == 0
    assert values_of(world) == undisturbed
