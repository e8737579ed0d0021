"""The demo: tune LoRA and P-Tuning v2 on the embedded base with the real commands, and show before and after.

    python embedded/demo.py

LoRA is tuned on the full-precision base and the prefix on the int4 one. Everything is written under `output/demo`,
over what an earlier demo left there.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adverts import SHOWN_PROMPTS, attribute_coverage, attributes_of
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from chatglm_tuning.evaluation.compare import Comparison, System

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
DATA = Path("data/AdvertiseGen")
SHOWN = SHOWN_PROMPTS[:3]
SHORTEST_ADVERT = 30
LONGEST = 128
LONGEST_ANSWER_TOKENS = 97
PROMPTS_AT_ONCE = 52


@dataclass(frozen=True)
class Setup:
    """What the demo is run on; paths are relative to the repository. dev_prompts: how many of dev are answered."""

    base: Path
    output: Path
    dev_prompts: int
    max_steps: int | None = None


@dataclass(frozen=True)
class Model:
    """One column of the comparison. quantization_bit: of the base; adapter: flag and folder, or None."""

    name: str
    quantization_bit: int | None = None
    lora_checkpoint: Path | None = None
    ptuning_checkpoint: Path | None = None


@dataclass(frozen=True)
class Scores:
    """dev_loss: mean over the label tokens of the dev adverts; coverage and adverts: shares, 0 to 1, of greedy answers.

    shown: the answers to `SHOWN`.
    """

    name: str
    dev_loss: float
    coverage: float
    adverts: float
    shown: list[str]


def training_commands(setup: Setup) -> dict[str, list[str]]:
    """The two commands, as a user types them in the repository; by the name of their output folder."""
    common = ["--model_name_or_path", str(setup.base), "--dtype", "float32", "--no_gradient_checkpointing"]
    common += ["--data_path", str(DATA / "sample_train.json"), "--eval_path", str(DATA / "sample_dev.json")]
    common += ["--max_input_length", str(LONGEST), "--max_output_length", str(LONGEST)]
    if setup.max_steps is not None:
        common += ["--max_steps", str(setup.max_steps)]
    lora = ["train_lora.py", "--train_args_file", "embedded/demo_lora.json", "--lora_rank", "8"]
    ptuning = ["train_ptuning.py", "--train_args_file", "embedded/demo_ptuning.json", "--pre_seq_len", "32"]
    ptuning += ["--quantization_bit", "4"]
    return {
        name: [*command, "--output_dir", str(setup.output / name), *common]
        for name, command in (("lora", lora), ("ptuning-int4", ptuning))
    }


def compared_models(output: Path) -> list[Model]:
    """Each base and what was tuned on it."""
    return [
        Model("untuned"),
        Model("LoRA", lora_checkpoint=output / "lora"),
        Model("untuned int4", quantization_bit=4),
        Model("P-Tuning v2 int4", quantization_bit=4, ptuning_checkpoint=output / "ptuning-int4"),
    ]


def is_advert(content: str, text: str) -> bool:
    """Whether `text` is running prose that lists none of the attributes of `content` as key and value."""
    _, attributes = attributes_of(content)
    listed = any(re.search(rf"{re.escape(key)}[:：是]{re.escape(value)}", text) for key, value in attributes)
    return not listed and "\n" not in text and "。" in text and len(text) >= SHORTEST_ADVERT


def score(model: Model, setup: Setup) -> tuple[Scores, "System"]:
    """Load `model`, measure its loss on all of dev, and let it answer the shown and the first dev prompts greedily.

    The second value is what scores with intervals are made of, the dev prompts that were answered.
    """
    from chatglm_tuning.data.encode import EncodingSettings
    from chatglm_tuning.data.records import read_records
    from chatglm_tuning.evaluation.answers import Drawing, answer_all
    from chatglm_tuning.evaluation.compare import System
    from chatglm_tuning.evaluation.loss import PromptLosses, measure_losses
    from chatglm_tuning.evaluation.metrics import Answered
    from chatglm_tuning.evaluation.prompts import Prompt, encode_prompt, group_prompts
    from chatglm_tuning.loading import load_for_inference

    network, tokenizer = load_for_inference(
        str(REPOSITORY / setup.base),
        lora_checkpoint=model.lora_checkpoint,
        ptuning_checkpoint=model.ptuning_checkpoint,
        quantization_bit=model.quantization_bit,
        dtype="float32",
    )
    dev = group_prompts(read_records([REPOSITORY / DATA / "sample_dev.json"]).examples)
    answered = dev[: setup.dev_prompts]
    prompts = [
        encode_prompt(prompt, tokenizer, LONGEST) for prompt in [*(Prompt(text, ()) for text in SHOWN), *answered]
    ]
    drawing = Drawing(max_output_length=LONGEST_ANSWER_TOKENS)
    answers = [answer.prediction for answer in answer_all(network, tokenizer, prompts, drawing, PROMPTS_AT_ONCE)]
    shown, answers = answers[: len(SHOWN)], answers[len(SHOWN) :]
    losses = measure_losses(network, tokenizer, dev, EncodingSettings(LONGEST, LONGEST), PROMPTS_AT_ONCE)
    pairs = [(prompt.query, answer) for prompt, answer in zip(answered, answers, strict=True)]
    scores = Scores(
        name=model.name,
        dev_loss=losses.per_token,
        coverage=_mean([attribute_coverage(*pair) for pair in pairs]),
        adverts=_mean([is_advert(*pair) for pair in pairs]),
        shown=shown,
    )
    system = System(
        model.name,
        tuple(Answered(p.text, answer, p.references) for p, answer in zip(answered, answers, strict=True)),
        losses=PromptLosses(losses.sums[: len(answered)], losses.tokens[: len(answered)]),
    )
    return scores, system


def compare_with_untuned(systems: list["System"]) -> list["Comparison"]:
    """What was tuned on each base beside it; `systems` come in the order of `compared_models`."""
    from chatglm_tuning.evaluation.compare import compare

    pairs = zip(systems[::2], systems[1::2], strict=True)
    return [compare([before, after], "each", before.name) for before, after in pairs]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def answers_table(results: list[Scores]) -> Table:
    """The same prompts answered by each model, side by side."""
    table = Table(title="the same prompts before and after", show_lines=True)
    table.add_column("prompt", style="dim", overflow="fold", ratio=2)
    for result in results:
        table.add_column(result.name, overflow="fold", ratio=3)
    for index, prompt in enumerate(SHOWN):
        table.add_row(prompt.replace("*", "\n"), *(result.shown[index] for result in results))
    return table


def scores_table(results: list[Scores], dev_prompts: int) -> Table:
    """The numbers of each model."""
    table = Table(title=f"on dev: loss of its adverts, and {dev_prompts} greedy answers")
    table.add_column("model")
    for heading in ("loss per token", "attribute values said", "answers that are adverts"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(result.name, f"{result.dev_loss:.3f}", f"{result.coverage:.0%}", f"{result.adverts:.0%}")
    return table


def interval_tables(comparisons: list["Comparison"]) -> list[Table]:
    """The scores of all answers with their intervals, and how far each tuned model is from its base."""
    from chatglm_tuning.evaluation import report

    return [report.scores_table(comparisons), *(report.differences_table(comparison) for comparison in comparisons)]


def results_content(results: list[Scores], comparisons: list["Comparison"]) -> list[dict]:
    """What results.json holds of each model; `metrics` and `differences` have a value and an interval of 95 %."""
    metrics = {name: found for comparison in comparisons for name, found in comparison.systems.items()}
    differences = {name: found for comparison in comparisons for name, found in comparison.differences.items()}

    def numbers(found: dict) -> dict:
        return {metric: asdict(interval) for metric, interval in found.items()}

    return [
        asdict(result)
        | {"metrics": numbers(metrics[result.name]), "differences": numbers(differences.get(result.name, {}))}
        for result in results
    ]


def draw_losses(folders: dict[str, Path], picture: Path) -> None:
    """Draw the training and dev losses of all runs into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from chatglm_tuning.training.callbacks import read_log

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, folder) in enumerate(folders.items()):
        _draw_run(axes, name, read_log(folder), f"C{number}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _draw_run(axes: "Axes", name: str, lines: list[dict], color: str) -> None:
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    dev = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    axes.plot(*zip(*train, strict=True), color=color, alpha=0.5, label=f"{name}, training")
    axes.plot(*zip(*dev, strict=True), "o--", color=color, label=f"{name}, dev")


def run_training(command: list[str], console: Console) -> None:
    """Run one training command in the repository, its progress on this terminal; ends the demo where it fails."""
    console.print(Rule())
    console.print(f"$ python {shlex.join(command)}", style="bold", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=False).returncode
    if code:
        sys.exit(code)


def closing(setup: Setup) -> str:
    """Where everything is, and how to go on."""
    chat = f"python cli_demo.py --model_name_or_path {setup.base}"
    return "\n".join(
        (
            f"adapters           {setup.output}/lora  {setup.output}/ptuning-int4",
            f"losses             {setup.output}/loss.png, and loss.png in each adapter's folder",
            f"answers and scores {setup.output}/results.json",
            "chat with them:",
            f"  {chat} --lora_checkpoint {setup.output}/lora --no_history",
            f"  {chat} --quantization_bit 4 --ptuning_checkpoint {setup.output}/ptuning-int4 --no_history",
        )
    )


def parse_arguments(argv: list[str]) -> Setup:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("embedded/chatglm-tiny"), help="folder of the base model")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="gets adapters, pictures and results")
    parser.add_argument("--dev-prompts", type=int, default=100, help="dev rows that are answered and scored")
    parser.add_argument("--max-steps", type=int, help="training steps of each run; without it, as the two files say")
    return Setup(**vars(parser.parse_args(argv)))


def main() -> None:
    setup = parse_arguments(sys.argv[1:])
    # Threads that wait in a loop would slow a busy machine down several times; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console()
    start = time.monotonic()
    for command in training_commands(setup).values():
        run_training(command, console)
    console.print(Rule())
    output = REPOSITORY / setup.output
    results, systems = [], []
    for model in compared_models(output):
        with console.status(f"scoring {model.name}"):
            scores, system = score(model, setup)
        results.append(scores)
        systems.append(system)
    comparisons = compare_with_untuned(systems)
    draw_losses({"LoRA": output / "lora", "P-Tuning v2 int4": output / "ptuning-int4"}, output / "loss.png")
    content = json.dumps(results_content(results, comparisons), ensure_ascii=False, indent=2) + "\n"
    (output / "results.json").write_text(content, encoding="utf-8")
    console.print(answers_table([result for result in results if result.name != "untuned int4"]))
    console.print(scores_table(results, setup.dev_prompts))
    for table in interval_tables(comparisons):
        console.print(table)
    console.print(closing(setup), highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
