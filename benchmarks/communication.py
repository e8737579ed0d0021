"""Bytes that processes send each other in a step: counted on a loopback of their own, and by arithmetic for many cards.

    python benchmarks/communication.py [--processes 2 3 4] [--document docs/distributed.md]

Trains the tiny base of the repository with 2, 3 and 4 gloo processes in a network namespace, whose loopback carries
nothing else (Linux; needs the right to make one), and subtracts a run of few steps from one of more. The expectation of
64 cards uses the same formulas with the sizes of ChatGLM-6B and the stated rates. Writes results/communication.json.
"""

import argparse
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from measures import add_document_flag, describe_machine, markdown_table, publish

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "communication.json"
BASE = REPOSITORY / "embedded" / "chatglm-tiny"
METHODS = {
    "LoRA": ["lora", "--lora_dropout", "0"],
    "P-Tuning v2": ["ptuning", "--pre_seq_len", "128"],
    "full": ["ptuning"],
}
FEW_STEPS, MORE_STEPS = 2, 10
_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000
_SET_FLAGS, _UP_AND_RUNNING = 0x8914, 0x41  # SIOCSIFFLAGS; IFF_UP | IFF_RUNNING


@dataclass(frozen=True)
class Sizes:
    """Of a model: numbers in every layer, and in all of it."""

    layers: int
    hidden: int
    layer_numbers: int
    numbers: int

    def trained(self, method: str) -> int:
        """Numbers that are trained: LoRA of rank 8 on query_key_value, a prefix of 128 positions, or all."""
        return {
            "LoRA": self.layers * 8 * 4 * self.hidden,
            "P-Tuning v2": 128 * self.layers * 2 * self.hidden,
            "full": self.numbers,
        }[method]


@dataclass(frozen=True)
class Cluster:
    """processes: of all machines. The rates are bytes a second out of a card to others, and out of a machine."""

    processes: int
    machines: int
    card_rate: float = 300e9
    machine_rate: float = 12.5e9

    def seconds(self, sent_by_each: float) -> float:
        """Return how long a ring takes in which each process sends so many bytes, one of every machine out of it."""
        return sent_by_each / (self.card_rate if self.machines == 1 else self.machine_rate)


TINY = Sizes(layers=4, hidden=256, layer_numbers=789_760, numbers=3_782_144)
CHATGLM_6B = Sizes(layers=28, hidden=4096, layer_numbers=201_379_840, numbers=6_173_286_400)


def sent_by_each(
    sizes: Sizes, method: str, processes: int, *, is_sharded: bool = False, bytes_each: int = 4, scatter_passes: int = 1
) -> float:
    """Return the bytes that one process sends in an optimizer step of one micro-batch.

    DDP: a ring sums what is trained, 2 (N - 1) / N of it from each. FSDP2: every layer is gathered for the forward and
    for the backward pass, what is no layer once, (N - 1) / N of it from each, and the gradients are summed and shared
    out, (N - 1) / N. scatter_passes: 2 for gloo, which sums all of them in every process.
    """
    share = (processes - 1) / processes
    if not is_sharded:
        return 2 * share * bytes_each * sizes.trained(method)
    layers = sizes.layers * sizes.layer_numbers
    gathered = 2 * layers + (sizes.numbers - layers)
    return share * bytes_each * (gathered + scatter_passes * sizes.numbers)


def own_loopback() -> None:
    """Give this process a network of its own, with a loopback that is up."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_NETWORK) and library.unshare(_NEW_USER | _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "no network namespace can be made")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sH14x", b"lo", _UP_AND_RUNNING))


def loopback_bytes() -> int:
    """Return what the loopback has carried so far."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def launch(processes: int, methods: list[str], *, is_sharded: bool) -> dict[str, float]:
    """Return the bytes a step, of all processes together, of each method."""
    with tempfile.TemporaryDirectory() as name:
        plan = Path(name) / "plan.json"
        plan.write_text(json.dumps({"folder": name, "methods": methods, "is_sharded": is_sharded}), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CHATGLM_TUNING_CACHE": name}
        command = [*launcher, __file__, "--worker", str(plan)]
        subprocess.run(command, check=True, env=settings, preexec_fn=own_loopback)
        return json.loads((Path(name) / "bytes.json").read_text(encoding="utf-8"))


def work(plan_file: Path) -> None:
    """Train each method for few and for more steps; the first process writes what a step between them has sent."""
    from torch import distributed

    from chatglm_tuning.config.parsing import parse_train_arguments
    from chatglm_tuning.training.run import train

    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    folder = Path(plan["folder"])
    found = {}
    for method in plan["methods"]:
        carried = []
        for steps in (FEW_STEPS, MORE_STEPS):
            output = folder / f"{method}-{steps}"
            file = folder / f"{method}-{steps}-{os.environ['RANK']}.json"
            settings = {"max_steps": steps, "per_device_train_batch_size": 1, "report_to": "none", "disable_tqdm": True}
            settings |= {"save_strategy": "no", "output_dir": str(output), "tripwires": "warn"}
            file.write_text(json.dumps(settings | {"fsdp": plan["is_sharded"]}), encoding="utf-8")
            script, *flags = METHODS[method]
            data = str(REPOSITORY / "data" / "AdvertiseGen" / "sample_train.json")
            flags += ["--model_name_or_path", str(BASE), "--data_path", data, "--dtype", "float32"]
            before = loopback_bytes()
            train(parse_train_arguments(script, ["--train_args_file", str(file), *flags]))
            distributed.barrier()
            carried.append(loopback_bytes() - before)
        found[method] = (carried[1] - carried[0]) / (MORE_STEPS - FEW_STEPS)
    if distributed.get_rank() == 0:
        (folder / "bytes.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    os._exit(0)  # see cli/training.py


def measured_table(rows: list[dict]) -> str:
    """Return the table of what was counted, beside the formula."""
    header = ["engine", "method", "processes", "MB a step, all together", "by the formula", "ratio"]
    lines = [
        [
            row["engine"],
            row["method"],
            str(row["processes"]),
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['expected'] / 1e6:.3f}",
            f"{row['bytes'] / row['expected']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def expected_rows() -> list[dict]:
    """Return what the formulas give for 8 cards of one machine and for 64 of 8 machines.

    A micro-batch of 8,192 tokens at 150 TFLOP/s: 4 FLOP a number and token without weight gradients, 6 with. Numbers
    are sent in fp32 by DDP and in bf16 by FSDP. Efficiency: from no overlap of sending and computing at all to as much
    as there can be.
    """
    tokens, rate = 8192, 150e12
    rows = []
    for cluster in (Cluster(8, 1), Cluster(64, 8)):
        for method, is_sharded in (("LoRA", False), ("P-Tuning v2", False), ("full", True)):
            sent = sent_by_each(
                CHATGLM_6B, method, cluster.processes, is_sharded=is_sharded, bytes_each=2 if is_sharded else 4
            )
            computing = (6 if method == "full" else 4) * CHATGLM_6B.numbers * tokens / rate
            sending = cluster.seconds(sent)
            rows.append(
                {
                    "engine": "FSDP2" if is_sharded else "DDP",
                    "method": method,
                    "processes": cluster.processes,
                    "machines": cluster.machines,
                    "bytes_by_each": sent,
                    "computing": computing,
                    "sending": sending,
                    "least": computing / (computing + sending),
                    "most": computing / max(computing, sending),
                }
            )
    return rows


def expected_table(rows: list[dict]) -> str:
    """Return the table of what is expected of many cards."""
    header = ["engine", "method", "cards", "MB a step, each", "computing, s", "sending, s", "efficiency"]
    lines = [
        [
            row["engine"],
            row["method"],
            f"{row['processes']} on {row['machines']}",
            f"{row['bytes_by_each'] / 1e6:,.1f}",
            f"{row['computing']:.2f}",
            f"{row['sending']:.4f}",
            f"{row['least']:.3f}–{row['most']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_document_flag(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker is not None:
        work(arguments.worker)
    rows = []
    for is_sharded, methods in ((False, list(METHODS)), (True, ["full"])):
        for processes in arguments.processes:
            for method, count in launch(processes, methods, is_sharded=is_sharded).items():
                expected = processes * sent_by_each(TINY, method, processes, is_sharded=is_sharded, scatter_passes=2)
                engine = "FSDP2" if is_sharded else "DDP"
                rows.append({"engine": engine, "method": method, "processes": processes, "bytes": count})
                rows[-1]["expected"] = expected
    found = {"machine": describe_machine(), "sizes": asdict(TINY), "measured": rows, "expected": expected_rows()}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    publish("communication", measured_table(rows), arguments.document)
    publish("scaling", expected_table(found["expected"]), arguments.document)


if __name__ == "__main__":
    main()
