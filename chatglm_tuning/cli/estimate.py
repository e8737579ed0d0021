"""`chatglm-tuning estimate`: memory by part, whether it fits, and which settings would."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from chatglm_tuning.config.estimate import EstimateArguments, parse_estimate_arguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.estimate import (
    DTYPE_BYTES,
    GIB,
    Batch,
    Bits,
    Device,
    Estimate,
    ModelShape,
    Option,
    Plan,
    Tuning,
    estimate,
    fitting_options,
    plans_of,
)

_ROWS_READ = 1000
_TOKENIZER = "ice_text.model"
_DEVICES: tuple[Device, ...] = ("cpu", "gpu")
_PLACES: dict[Device, str] = {"cpu": "a CPU's RAM", "gpu": "a GPU's memory"}
Estimates = dict[Device, Estimate]
Options = dict[Device, list[Option]]
Plans = dict[Device, Plan]


@dataclass(frozen=True)
class Lengths:
    """Tokens of sampled rows as they are trained: `(sequence, labels)` each, longest first."""

    rows: tuple[tuple[int, int], ...]
    source: str

    def batch(self, samples: int) -> Batch:
        """Return the largest batch: rows of like length are put together, so it holds the longest ones."""
        repeats, rest = divmod(samples, len(self.rows))
        tokens, labels = (repeats * sum(column) + sum(column[:rest]) for column in zip(*self.rows, strict=True))
        return Batch(samples, tokens, labels, self.rows[0][0])


def run(argv: Sequence[str]) -> int:
    """Print the estimate that `argv` asks for; returns the exit code. Raises UserError for what cannot be used."""
    arguments = parse_estimate_arguments(argv)
    shape, stored_bits = _read_shape(arguments.model)
    tuning = _tuning(arguments, stored_bits)
    lengths = _lengths(arguments, shape)
    batch = lengths.batch(arguments.batch)
    plans: Plans = {device: _plan(arguments, shape, tuning, batch, device) for device in _DEVICES}
    estimates: Estimates = {device: estimate(shape, tuning, batch, plan, device) for device, plan in plans.items()}
    options: Options = {}
    if arguments.memory_gib is not None:
        limit = int(arguments.memory_gib * GIB)
        options = {device: _options(arguments, shape, tuning, lengths, limit, device) for device in _DEVICES}
    if arguments.json:
        print(json.dumps(_as_json(tuning, batch, plans, estimates, options), indent=2))
    else:
        print("\n".join(_report(arguments, tuning, batch, plans, estimates, options, lengths)))
    return 0


def _read_shape(model: str | None) -> tuple[ModelShape, Bits | None]:
    """Return the sizes of a model folder and the bits that it is stored in."""
    if model is None:
        return ModelShape(), None
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the folder's config.json cannot be read ({error.strerror})",
            code="M103",
            where=str(path.parent),
            remedy="Give the folder of ChatGLM-6B, or leave --model_name_or_path out for the released sizes",
        ) from error
    except ValueError as error:
        raise UserError(
            f"this is not JSON ({error})", code="M104", where=str(path), remedy="Copy this file again"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != "chatglm":
        raise UserError(
            "config.json is not that of a ChatGLM-6B",
            code="M105",
            where=str(path),
            remedy="Give the folder of ChatGLM-6B (THUDM/chatglm-6b)",
        )
    stored = config.get("quantization_bit") or None
    if stored not in (None, 4, 8):
        raise UserError(
            f"config.json says quantization_bit {stored}; 4 and 8 are supported",
            code="M108",
            where=str(path),
            remedy="Give a full-precision, int8 or int4 ChatGLM-6B",
        )
    return ModelShape.of(config, str(path)), stored


def _tuning(arguments: EstimateArguments, stored_bits: Bits | None) -> Tuning:
    asked = arguments.quantization_bit
    if stored_bits and asked and stored_bits != asked:
        raise UserError(
            f"the folder holds int{stored_bits} weights, and --quantization_bit says {asked}",
            code="M121",
            remedy=f"Leave --quantization_bit out, or say {stored_bits}",
        )
    if stored_bits and arguments.method == "full":
        raise UserError(
            f"a base in {stored_bits} bits cannot be tuned in full", code="A107", remedy="Give the full-precision model"
        )
    automatic = "float32" if arguments.method == "full" else "bfloat16"
    return Tuning(
        method=arguments.method,
        bits=asked or stored_bits,
        value_bytes=DTYPE_BYTES[automatic if arguments.dtype == "auto" else arguments.dtype],
        lora_rank=arguments.lora_rank,
        lora_target=arguments.lora_target,
        pre_seq_len=arguments.pre_seq_len,
        prefix_projection=arguments.prefix_projection,
    )


def _lengths(arguments: EstimateArguments, shape: ModelShape) -> Lengths:
    prompt_limit, answer_limit = arguments.max_input_length, arguments.max_output_length
    if prompt_limit + answer_limit > shape.max_sequence_length:
        raise UserError(
            f"max_input_length {prompt_limit} and max_output_length {answer_limit} make "
            f"{prompt_limit + answer_limit}, and the model's context is {shape.max_sequence_length} tokens",
            code="A111",
            remedy="lower --max_input_length or --max_output_length",
        )
    if arguments.data_path is None:
        row = (prompt_limit + answer_limit, answer_limit)
        return Lengths((row,), "every row as long as --max_input_length and --max_output_length allow")
    rows = [
        (min(prompt + 1, prompt_limit) + min(answer + 2, answer_limit), min(answer + 2, answer_limit))
        for prompt, answer in _count_tokens(arguments.data_path, _tokenizer_file(arguments))
    ]
    source = f"the longest of the first {len(rows)} rows of {arguments.data_path}"
    return Lengths(tuple(sorted(rows, reverse=True)), source)


def _tokenizer_file(arguments: EstimateArguments) -> Path:
    if arguments.model is None:
        raise UserError(
            "--data_path needs a tokenizer",
            code="A104",
            remedy="Give the model's folder with --model_name_or_path, or leave out --data_path",
        )
    file = Path(arguments.model).expanduser() / _TOKENIZER
    if not file.is_file():
        raise UserError(
            f"the folder has no {_TOKENIZER} (the tokenizer)",
            code="M109",
            where=arguments.model,
            remedy="Copy it from the model's download",
        )
    return file


def _count_tokens(data: Path, tokenizer: Path) -> Iterable[tuple[int, int]]:
    """Yield the tokens of prompt and answer of the first rows of `data`, without special tokens."""
    import sentencepiece

    from chatglm_tuning.data.records import iterate_examples
    from chatglm_tuning.data.rows import BadRows

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(str(tokenizer))
    except (RuntimeError, OSError) as error:
        raise UserError(
            "this is no readable SentencePiece model",
            code="M110",
            where=str(tokenizer),
            remedy=f"Copy {_TOKENIZER} again",
        ) from error
    bad_rows = BadRows()
    examples = list(itertools.islice(iterate_examples([data], bad_rows), _ROWS_READ))
    if not examples:
        reasons = "".join(f"\n{line}" for line in bad_rows.shown)
        raise UserError(f"no usable row was found{reasons}", code="D105", where=str(data), remedy="Mend the data file")
    bad_rows.settle(skip_bad_rows=True)
    texts = [text for example in examples for text in (example.prompt, example.answer)]
    counts = [len(ids) for ids in cast("list[list[int]]", processor.encode([_as_pieces(text) for text in texts]))]
    yield from zip(counts[::2], counts[1::2], strict=True)


def _as_pieces(text: str) -> str:
    """Write whitespace as the model's tokenizer does: a newline, a tab and a run of spaces are a piece each."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(" {2,80}", lambda blanks: f"<|blank_{len(blanks[0])}|>", text)


def _plan(arguments: EstimateArguments, shape: ModelShape, tuning: Tuning, batch: Batch, device: Device) -> Plan:
    """Return the fastest plan that fits into the given memory, or the fastest where none is given.

    Training takes the same, of what is free when it starts, less a tenth.
    """
    plans = plans_of(tuning, arguments.activation_checkpointing)
    if arguments.memory_gib is None:
        return plans[0]
    limit = arguments.memory_gib * GIB
    fitting = (plan for plan in plans if estimate(shape, tuning, batch, plan, device).peak_bytes <= limit)
    return next(fitting, plans[-1])


def _options(
    arguments: EstimateArguments, shape: ModelShape, tuning: Tuning, lengths: Lengths, limit: int, device: Device
) -> list[Option]:
    """Return the fastest settings that fit, one for each form of the base, fastest first."""
    sizes = {arguments.batch} | {2**power for power in range(arguments.batch.bit_length())}
    batches = [lengths.batch(samples) for samples in sorted(sizes, reverse=True)]
    forms = (None, 8, 4) if tuning.method != "full" and tuning.bits is None else (tuning.bits,)
    found = (fitting_options(shape, replace(tuning, bits=bits), batches, limit, device) for bits in forms)
    return sorted((options[0] for options in found if options), key=lambda option: option.cost)


def _as_json(tuning: Tuning, batch: Batch, plans: Plans, estimates: Estimates, options: Options) -> dict[str, Any]:
    answer: dict[str, Any] = {"tuning": asdict(tuning), "batch": asdict(batch)}
    for device, found in estimates.items():
        answer[device] = asdict(found) | {"peak_bytes": found.peak_bytes, "plan": asdict(plans[device])}
    if options:
        answer["fitting"] = {device: [asdict(option) for option in found] for device, found in options.items()}
    return answer


def _report(
    arguments: EstimateArguments,
    tuning: Tuning,
    batch: Batch,
    plans: Plans,
    estimates: Estimates,
    options: Options,
    lengths: Lengths,
) -> list[str]:
    cpu, gpu = estimates["cpu"], estimates["gpu"]
    are_alike = plans["cpu"] == plans["gpu"]
    described = [("" if are_alike else f" in {_PLACES[device]}", plan) for device, plan in plans.items()]
    lines = [
        f"{tuning.method}, {_form(tuning)}, batch {batch.samples}: {batch.tokens} tokens, {batch.label_tokens} of them "
        f"with a loss ({lengths.source})",
        *dict.fromkeys(f"{_describe(plan, tuning)}{where}" for where, plan in described),
        "",
        f"{'GiB, each at its largest':<28}{'CPU: RAM':>12}{'GPU: memory':>14}",
    ]
    lines += [f"  {name:<26}{cpu.parts[name] / GIB:>12.2f}{gpu.parts[name] / GIB:>14.2f}" for name in cpu.parts]
    lines.append("held together")
    for name in dict.fromkeys((*cpu.moments, *gpu.moments)):
        sizes = (f"{found.moments[name] / GIB:.2f}" if name in found.moments else "" for found in (cpu, gpu))
        lines.append("  {:<26}{:>12}{:>14}".format(name, *sizes))
    lines.append(f"{'peak':<28}{cpu.peak_bytes / GIB:>12.2f}{gpu.peak_bytes / GIB:>14.2f}")
    lines.append(f"{'host RAM':<28}{cpu.host_bytes / GIB:>12.2f}{gpu.host_bytes / GIB:>14.2f}")
    if arguments.dtype == "auto" and tuning.method != "full":
        lines.append("counted in bf16; on a CPU that cannot multiply it training takes fp32: see --dtype float32")
    for device, place in _PLACES.items():
        if arguments.memory_gib is not None:
            lines += ["", *_verdict(arguments.memory_gib, estimates[device], options[device], place)]
    return lines


def _verdict(memory_gib: float, found: Estimate, options: list[Option], where: str) -> list[str]:
    fits = found.peak_bytes <= memory_gib * GIB
    first = f"{'fits' if fits else 'does not fit'} in {memory_gib:g} GiB of {where}"
    if not options:
        return [f"{first}; no batch, form of the base or recomputation does"]
    listed = [
        f"  {_form(option.tuning)}, --per_device_train_batch_size {option.batch.samples}, "
        f"{_describe(option.plan, option.tuning)}: {option.peak_bytes / GIB:.2f} GiB"
        for option in options
    ]
    return [f"{first}; what fits, fastest first:", *listed]


def _form(tuning: Tuning) -> str:
    return f"--quantization_bit {tuning.bits}" if tuning.bits else f"{8 * tuning.value_bytes}-bit base"


def _describe(plan: Plan, tuning: Tuning) -> str:
    unpacked = f", unpacking by {plan.workspace}" if tuning.bits else ""
    return f"--activation_checkpointing {plan.checkpointing}{unpacked}"
