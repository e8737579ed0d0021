"""Every setting of the commands: its flag, its default, its range and its help text, once.

A field's name is its flag (`--lora_rank`) and its key in a JSON file (`"lora_rank"`). What Trainer itself reads is in
`training_arguments.py`; its defaults are transformers' own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from chatglm_tuning.config.values import Value

Method = Literal["lora", "ptuning", "full"]

LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The four linears of every ChatGLM block, which are also the quantised ones; `all` stands for them."""

GENERATION_METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "chrf", "distinct-2")
"""The scores of answers, as evaluation/metrics.py computes them."""

# An answer spends one place on <sop>, one on <eop> and, as every text does, its first on the tokenizer's blank piece:
# 4 is the least that holds any of its words. A prompt of 4 has [gMASK], the blank piece and two more.
_LEAST_LENGTH = 4
# numpy, which transformers.set_seed seeds too, takes no more than 32 bits.
SEED_VALUE = Value("integer", at_least=0, below=2**32)
DEFAULT_SEED = 42
"""The original's seed for training; chat draws a new one where none is given."""


@dataclass(frozen=True)
class Setting:
    """How one field is given and explained.

    value: what it may hold.
    help: one line for `--help`.
    off_flag: for a boolean that is on by default, the flag (and key) that turns it off; help says what that does.
    """

    name: str
    value: Value
    help: str
    default: Any
    off_flag: str | None = None


def _about(value: Value, help_text: str, off_flag: str | None = None) -> dict[str, Any]:
    """The metadata of a field that a flag sets; `settings_of` reads it."""
    return {"value": value, "help": help_text, "off_flag": off_flag}


def settings_of(arguments: type) -> Iterator[Setting]:
    """Yield a Setting for every field of an arguments class that a flag sets."""
    for item in cast("tuple[Field[Any], ...]", fields(arguments)):
        if "value" in item.metadata:
            metadata = item.metadata
            default = None if item.default is MISSING else item.default
            yield Setting(item.name, metadata["value"], metadata["help"], default, metadata["off_flag"])


@dataclass(frozen=True)
class ModelArguments:
    """The base model and the form it is held in."""

    model_name_or_path: str = field(
        default="THUDM/chatglm-6b", metadata=_about(Value("text"), "folder (or Hugging Face name) of the base model")
    )
    quantization_bit: Literal[4, 8] | None = field(
        default=None,
        metadata=_about(
            Value("integer", choices=(4, 8)), "hold the base in this many bits a weight; without it, in --dtype"
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=_about(
            Value("text", choices=("auto", "float32", "bfloat16", "float16")), "the type that is computed in"
        ),
    )


@dataclass(frozen=True)
class DataArguments:
    """The rows that are learned and evaluated, and how they become tokens."""

    data_path: tuple[Path, ...] = field(metadata=_about(Value("paths"), "one or more files with training rows"))
    eval_path: tuple[Path, ...] = field(
        default=(), metadata=_about(Value("paths"), "one or more files with evaluation rows")
    )
    max_input_length: int = field(
        default=1024,
        metadata=_about(
            Value("integer", at_least=_LEAST_LENGTH), "a prompt is cut to this many tokens, [gMASK] included"
        ),
    )
    max_output_length: int = field(
        default=1024,
        metadata=_about(
            Value("integer", at_least=_LEAST_LENGTH), "an answer is cut to this many tokens, <sop> and <eop> included"
        ),
    )
    skip_bad_rows: bool = field(
        default=False, metadata=_about(Value("boolean"), "leave out rows that cannot be read instead of stopping")
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata=_about(
            Value("integer", at_least=1), "processes that tokenise; without it, as many as there are cores"
        ),
    )
    data_cache_dir: Path | None = field(
        default=None, metadata=_about(Value("path"), "folder in which tokenised rows are kept")
    )


@dataclass(frozen=True)
class LoraArguments:
    """LoRA as peft builds it."""

    lora_rank: int = field(default=8, metadata=_about(Value("integer", at_least=1), "rank of the two small matrices"))
    lora_alpha: int = field(
        default=32, metadata=_about(Value("integer", at_least=1), "their product is scaled by alpha / rank")
    )
    lora_dropout: float = field(
        default=0.05, metadata=_about(Value("number", at_least=0, below=1), "dropout in front of them")
    )
    lora_target: tuple[str, ...] = field(
        default=("query_key_value",),
        metadata=_about(
            Value("names", choices=(*LORA_TARGETS, "all")),
            f"the linears that get them: all, or some of {', '.join(LORA_TARGETS)}",
        ),
    )


@dataclass(frozen=True)
class PtuningArguments:
    """The prefix of P-Tuning v2. With a checkpoint, what is not given is read from it."""

    pre_seq_len: int | None = field(
        default=None, metadata=_about(Value("integer", at_least=1), "number of prefix positions")
    )
    prefix_projection: bool = field(
        default=False, metadata=_about(Value("boolean"), "pass the prefix through a two-layer network")
    )
    ptuning_checkpoint: Path | None = field(default=None, metadata=_about(Value("path"), "folder of a trained prefix"))


@dataclass(frozen=True)
class RunOptions:
    """How the training run itself goes, beyond what Trainer reads."""

    resume_from_checkpoint: Path | None = field(
        default=None,
        metadata=_about(
            Value("path"),
            "checkpoint folder of a run to continue; auto: the newest of output_dir, or a new run where there is none",
        ),
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=_about(Value("boolean"), "train into an output_dir that already holds an adapter or a checkpoint"),
    )
    model_parallel: bool = field(
        default=False, metadata=_about(Value("boolean"), "spread the layers over the GPUs of one process")
    )
    activation_checkpointing: Literal["auto", "off", "mlp", "on"] = field(
        default="auto",
        metadata=_about(
            Value("text", choices=("auto", "off", "mlp", "on")),
            "what the backward pass recomputes: off nothing, mlp a part, on every layer; auto what memory asks for",
        ),
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata=_about(
            Value("boolean"), "the same as --activation_checkpointing off", off_flag="no_gradient_checkpointing"
        ),
    )
    loss_average: Literal["tokens", "micro_batches"] = field(
        default="tokens",
        metadata=_about(
            Value("text", choices=("tokens", "micro_batches")),
            "tokens: every label token of a step weighs the same; micro_batches: the mean of the micro-batches' means",
        ),
    )
    bucket_by_length: bool = field(
        default=True,
        metadata=_about(
            Value("boolean"), "do not put rows of similar length into one batch", off_flag="no_bucket_by_length"
        ),
    )

    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=_about(
            Value("integer", at_least=2 * _LEAST_LENGTH),
            "a micro-batch holds as many rows of like length as have this many tokens, instead of "
            "per_device_train_batch_size rows",
        ),
    )
    predict_samples: int = field(
        default=0,
        metadata=_about(
            Value("integer", at_least=0),
            "at every evaluation answer this many prompts of eval_path greedily, and log ROUGE, BLEU-4, chrF, "
            "distinct-2",
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=_about(
            Value("integer", at_least=1),
            "end the run after this many evaluations in a row without a better metric_for_best_model",
        ),
    )
    tripwires: Literal["stop", "warn"] = field(
        default="stop",
        metadata=_about(
            Value("text", choices=("stop", "warn")),
            "stop: a learning rate or first loss far from what similar runs show, and an adapter that changes nothing, "
            "end the run; warn: they are only told. A number that is not finite always ends it",
        ),
    )

    @property
    def checkpointing(self) -> Literal["auto", "off", "mlp", "on"]:
        """What is recomputed, under whichever name it was asked for."""
        if self.gradient_checkpointing is None:
            return self.activation_checkpointing
        return "on" if self.gradient_checkpointing else "off"


@dataclass(frozen=True)
class TrainerArguments:
    """What was given for transformers.TrainingArguments, under its current names; always with output_dir and seed."""

    values: Mapping[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"]).expanduser()

    @property
    def seed(self) -> int:
        return self.values["seed"]


@dataclass(frozen=True)
class TrainRun:
    """One training run as it was asked for.

    lora: only for the method "lora". ptuning: only for the method "ptuning".
    """

    method: Method
    model: ModelArguments
    data: DataArguments
    options: RunOptions
    trainer: TrainerArguments
    lora: LoraArguments | None = None
    ptuning: PtuningArguments | None = None


@dataclass(frozen=True)
class ChatArguments:
    """One chat: the model, at most one adapter (LoRA or a prefix), and how answers are drawn."""

    model: ModelArguments
    ptuning: PtuningArguments
    lora_checkpoint: Path | None = field(default=None, metadata=_about(Value("path"), "folder of a LoRA adapter"))
    max_length: int = field(
        default=2048,
        metadata=_about(
            Value("integer", at_least=_LEAST_LENGTH), "an answer ends when it and its prompt are this many tokens"
        ),
    )
    top_p: float = field(
        default=0.7,
        metadata=_about(
            Value("number", above=0, at_most=1), "draw from the likeliest tokens that have this probability together"
        ),
    )
    temperature: float = field(
        default=0.95,
        metadata=_about(
            Value("number", above=0, hint="To always take the likeliest token, pass --greedy"),
            "below 1 sharper, above 1 more varied",
        ),
    )
    greedy: bool = field(default=False, metadata=_about(Value("boolean"), "always take the likeliest token"))
    seed: int | None = field(default=None, metadata=_about(SEED_VALUE, "draw the same answers every time"))
    history: bool = field(
        default=True,
        metadata=_about(
            Value("boolean"), "forget the rounds before: every question stands alone", off_flag="no_history"
        ),
    )
