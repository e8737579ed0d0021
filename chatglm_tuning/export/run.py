"""The recipe of an export, top to bottom: what is asked is checked, written, compared with base and adapter, named."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.checkpoint import Manifest, read_manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export import certificate as certificates
from chatglm_tuning.export.card import (
    CARD_NAME,
    LOSS_PICTURE,
    CardFacts,
    copy_picture,
    read_scores,
    write_card,
)
from chatglm_tuning.export.conversions import (
    adapter_files,
    base_files,
    check_convertible,
    compare_adapters,
    copy_base,
    write_adapter,
    write_original_prefix,
    write_peft_0_3,
)
from chatglm_tuning.export.ggml import GgmlWeights, check_ggml, ggml_size_bytes, write_ggml
from chatglm_tuning.export.merge import Form, MergedWeights, check_mergeable, write_merged_folder
from chatglm_tuning.export.probes import Answers, Probes, answer, logits_along, probes_of, read_probe_texts
from chatglm_tuning.export.weights import StoredWeights, load_streamed
from chatglm_tuning.loading import Base, add_trained_lora, check_adapter, load_base, load_tokenizer, read_config
from chatglm_tuning.model import ChatGLMConfig
from chatglm_tuning.new_folder import appearing_whole, check_new_folder, check_room
from chatglm_tuning.shards import find_weight_files, reading_progress, resolve_model_folder
from chatglm_tuning.tensor_check import EMBEDDING_KEY

logger = logging.getLogger(__name__)

GGML_NAME = "chatglm-ggml.bin"
ADAPTER_NAME = "adapter"
BASE_NAME = "base"
_NAMES = (
    GGML_NAME,
    ADAPTER_NAME,
    BASE_NAME,
    CARD_NAME,
    LOSS_PICTURE,
    certificates.CERTIFICATE_NAME,
    "chatglm_tuning.json",
    "adapter_config.json",
    "adapter_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Plan:
    """An export that was checked. held_bits: what the base is held in, which a LoRA is merged onto; None: as stored."""

    arguments: ExportArguments
    folder: Path
    config: ChatGLMConfig
    manifest: Manifest | None
    held_bits: int | None
    own_texts: list[str]
    scores: list[tuple[str, str]]


def export(arguments: ExportArguments, *, show_progress: bool = False) -> str:
    """Write the export that `arguments` ask for, and return a line that says what it is.

    The folder appears under its name once its certificate holds, and not before.
    Raises UserError for whatever cannot be exported, and where the export does not answer as base and adapter do.
    """
    plan = plan_export(arguments)
    with appearing_whole(arguments.output_dir) as target:
        if arguments.is_merge:
            certificate = _merge(plan, target, show_progress=show_progress)
        else:
            certificate = _convert(plan, target)
        has_picture = copy_picture(arguments.adapter, target)
        write_card(target, _card_facts(plan, certificate, has_picture=has_picture))
        certificates.write_certificate(target, certificate)
    return _summary(certificate)


def plan_export(arguments: ExportArguments) -> Plan:
    """Check everything that can be before weights are read; raises UserError for what is wrong."""
    folder = resolve_model_folder(arguments.model_name_or_path)
    config = read_config(folder)
    check_new_folder(arguments.output_dir, _NAMES)
    found = check_adapter(arguments.adapter, config)
    if found != arguments.method:
        flag = "--lora_checkpoint" if found == "lora" else "--ptuning_checkpoint"
        raise UserError(
            f"the folder holds {'a LoRA' if found == 'lora' else 'a prefix of P-Tuning v2'}",
            where=str(arguments.adapter),
            remedy=f"Give it with {flag}",
        )
    manifest = read_manifest(arguments.adapter, verify_files=False)
    held_bits = held_bits_of(arguments, config, manifest, folder) if arguments.is_merge else None
    if arguments.is_merge:
        check_mergeable(arguments.adapter, held_bits)
        if arguments.format == "ggml":
            check_ggml(config, folder, has_own_head=False)
    elif arguments.method == "lora" and arguments.format == "original":
        check_convertible(arguments.adapter)
    load_tokenizer(folder, config)
    find_weight_files(folder)
    texts = read_probe_texts(arguments.data_path)
    scores = read_scores(arguments.scores, arguments.adapter)
    plan = Plan(arguments, folder, config, manifest, held_bits, texts, scores)
    check_room(_size_bytes(plan), arguments.output_dir)
    return plan


def held_bits_of(
    arguments: ExportArguments, config: ChatGLMConfig, manifest: Manifest | None, folder: Path
) -> int | None:
    """Return 8 or 4 where a LoRA is merged onto weights of that many bits, None for full precision.

    Raises UserError where flags, adapter and base contradict each other.
    """
    stored = config.quantization_bit or None
    trained = None if manifest is None else manifest.base_model.quantization_bit
    if arguments.merge_onto == "full":
        if stored:
            raise UserError(
                f"the folder holds int{stored} weights, which --merge_onto full cannot use",
                where=str(folder),
                remedy="Give the full-precision model, or leave --merge_onto out",
            )
        return None
    asked = arguments.quantization_bit
    for name, other in (("the base holds", stored), ("the adapter was trained on", trained)):
        if asked and other and asked != other:
            raise UserError(
                f"--quantization_bit says {asked}, and {name} int{other}",
                where=str(folder if other == stored else arguments.adapter),
                remedy="Leave it out, or give --merge_onto full with a full-precision base",
            )
    if stored != trained and stored:
        on = f"int{trained}" if trained else "full-precision" if manifest else "unknown"
        logger.warning("the LoRA was trained on %s weights and is merged onto the int%d ones given", on, stored)
    held = stored or asked or trained
    if held:
        logger.info("the LoRA is merged onto the base's weights in int%d, dequantised: what it was trained on", held)
    return held


def _size_bytes(plan: Plan) -> int:
    arguments, config = plan.arguments, plan.config
    if not arguments.is_merge:
        size = 3 * sum(path.stat().st_size for path in adapter_files(arguments.adapter))
        return size + (sum(path.stat().st_size for path in base_files(plan.folder)) if arguments.include_base else 0)
    if arguments.format == "ggml":
        return ggml_size_bytes(config, arguments.ggml_type)
    hidden, inner = config.hidden_size, config.inner_hidden_size
    linears = config.num_layers * hidden * (4 * hidden + 2 * inner)
    width = 4 if arguments.dtype == "float32" else 2
    bits = arguments.output_quantization_bit or 8 * width
    return linears * bits // 8 + config.vocab_size * hidden * width


def _merge(plan: Plan, target: Path, *, show_progress: bool) -> dict[str, Any]:
    """Write the merged weights into `target` and return their certificate; raises UserError where it does not hold."""
    arguments = plan.arguments
    reference, probes, alone, fingerprint = _ask_reference(plan)
    gc.collect()
    stored = StoredWeights(plan.folder, plan.held_bits)
    with reading_progress("merging", find_weight_files(plan.folder), show=show_progress) as advance:
        form = _write_merged(plan, stored, target, advance)
    del stored
    exported = logits_along(_load_export(plan, target).model, probes, reference)
    measures = certificates.measure(reference, alone, exported)
    facts = certificates.file_facts(target)
    certificate = certificates.certify(
        form,
        measures,
        {
            "format": arguments.format,
            "compared_with": _reference_name(plan),
            "base": {"name": _name_of(arguments.model_name_or_path), "fingerprint": fingerprint},
            "adapter": _adapter_facts(plan),
            "output": {"sha256": certificates.digest_of_facts(facts), "files": facts},
            "probes": {
                "prompts": len(probes),
                "of_data_path": probes.own_rows,
                "new_tokens": arguments.probe_tokens,
            },
        },
    )
    certificates.refuse_broken(certificate)
    return certificate


def _ask_reference(plan: Plan) -> tuple[Answers, Probes, torch.Tensor, str]:
    """Return what base and adapter answer, the probes, the logits of the base alone, and the base's fingerprint."""
    # DoRA looks at weights that are there only while their linears run: it is asked with the whole base in memory.
    if plan.held_bits or read_lora_config(plan.arguments.adapter).use_dora:
        base = load_base(str(plan.folder), quantization_bit=plan.held_bits)
    else:
        base = load_streamed(plan.folder)
    base = replace(base, identity=replace(base.identity, name_or_path=plan.arguments.model_name_or_path))
    probes = probes_of(base, plan.own_texts)
    model = add_trained_lora(base, plan.arguments.adapter)
    reference = answer(model, probes, plan.arguments.probe_tokens)
    alone = logits_along(model, probes, reference, without_adapter=True)
    return reference, probes, alone, base.identity.fingerprint


def _write_merged(plan: Plan, stored: StoredWeights, target: Path, advance: Callable[[int], None]) -> str:
    """Write the weights and return the form that they are in."""
    arguments = plan.arguments
    weights = MergedWeights(plan.folder, stored, arguments.adapter)
    if arguments.format == "ggml":
        check_ggml(plan.config, plan.folder, has_own_head=weights.has_own_head)
        tokenizer = (plan.folder / "ice_text.model").read_bytes()
        write_ggml(target / GGML_NAME, plan.config, tokenizer, weights, arguments.ggml_type, advance)
        return arguments.ggml_type
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    form = Form(dtype, arguments.output_quantization_bit)
    write_merged_folder(plan.folder, weights, form, target, advance)
    if form.bits:
        return f"int{form.bits}"
    return str(dtype or stored.dtype_of(EMBEDDING_KEY)).removeprefix("torch.")


def _load_export(plan: Plan, target: Path) -> Base:
    if plan.arguments.format == "ggml":
        return load_streamed(plan.folder, GgmlWeights(target / GGML_NAME))
    return load_base(str(target)) if plan.arguments.output_quantization_bit else load_streamed(target)


def _convert(plan: Plan, target: Path) -> dict[str, Any]:
    """Write the adapter itself in another form, and return the certificate that its tensors are the same."""
    arguments = plan.arguments
    written = target
    if arguments.format == "original" and arguments.method == "lora":
        write_peft_0_3(arguments.adapter, target)
    elif arguments.format == "original":
        write_original_prefix(arguments.adapter, plan.folder, target)
    else:
        written = target / ADAPTER_NAME if arguments.format == "folder" else target
        write_adapter(arguments.adapter, _name_of(arguments.model_name_or_path), plan.folder, written)
    if arguments.include_base:
        copy_base(plan.folder, target / BASE_NAME)
    count, different = compare_adapters(arguments.method, arguments.adapter, written)
    if different:
        raise UserError(
            f"the exported adapter differs from the one given ({different[0]}). Nothing was kept",
            where=str(arguments.adapter),
            remedy="Copy the adapter's folder again",
        )
    facts = certificates.file_facts(target)
    return {
        "format_version": 1,
        "holds": True,
        "format": arguments.format,
        "compared_with": "the adapter's tensors, bit for bit",
        "adapter": _adapter_facts(plan),
        "output": {"sha256": certificates.digest_of_facts(facts), "files": facts},
        "tensors": count,
    }


def _adapter_facts(plan: Plan) -> dict[str, Any]:
    adapter = plan.arguments.adapter
    found = certificates.facts_of_files(adapter, adapter_files(adapter))
    return {
        "method": plan.arguments.method,
        "name": _name_of(str(adapter)),
        "sha256": certificates.digest_of_facts(found),
    }


def _reference_name(plan: Plan) -> str:
    return f"base (held in int{plan.held_bits}) + LoRA" if plan.held_bits else "base + LoRA"


def _name_of(model_name_or_path: str) -> str:
    """Return what may be published of a path: a folder's own name, a hub's name whole."""
    path = Path(model_name_or_path).expanduser()
    return path.resolve().name if path.exists() else model_name_or_path


def _card_facts(plan: Plan, certificate: dict[str, Any], *, has_picture: bool) -> CardFacts:
    arguments = plan.arguments
    return CardFacts(
        title=arguments.output_dir.resolve().name,
        method=arguments.method,
        base_name=_name_of(arguments.model_name_or_path),
        format=arguments.format,
        form=certificate.get("weights"),
        manifest=plan.manifest,
        certificate=certificate,
        scores=plan.scores,
        has_picture=has_picture,
        commands=_commands(plan),
    )


def _commands(plan: Plan) -> tuple[str, ...]:
    arguments = plan.arguments
    name = arguments.output_dir.resolve().name
    base = _name_of(arguments.model_name_or_path)
    if arguments.format == "ggml":
        return (
            'CMAKE_ARGS="-DCMAKE_POLICY_VERSION_MINIMUM=3.5" pip install chatglm-cpp==0.4.2',
            f"python -c \"import chatglm_cpp; print(chatglm_cpp.Pipeline('{name}/{GGML_NAME}').chat("
            "[chatglm_cpp.ChatMessage(role='user', content='你好')]).content)\"",
        )
    if arguments.is_merge:
        return (f"chatglm-tuning chat --model_name_or_path {name}",)
    flag = "--lora_checkpoint" if arguments.method == "lora" else "--ptuning_checkpoint"
    is_package = arguments.format == "folder"
    model = f"{name}/{BASE_NAME}" if arguments.include_base else base
    adapter = f"{name}/{ADAPTER_NAME}" if is_package else name
    bits = None if plan.manifest is None else plan.manifest.base_model.quantization_bit
    stored = plan.config.quantization_bit
    held = f" --quantization_bit {bits}" if bits and not stored else ""
    return (f"chatglm-tuning chat --model_name_or_path {model} {flag} {adapter}{held}",)


def _summary(certificate: dict[str, Any]) -> str:
    if "measured" not in certificate:
        return f"{certificate['tensors']} tensors, those of the adapter bit for bit"
    measured = certificate["measured"]
    return (
        f"{certificate['weights']} weights that answer as {certificate['compared_with']}: largest logit gap "
        f"{measured['largest_logit_gap']}, mean {measured['mean_logit_gap']} (the adapter itself moves them by "
        f"{measured['mean_effect_of_adapter']}), {measured['equal_tokens']} greedy tokens equal"
    )
