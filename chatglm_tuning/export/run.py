"""The recipe of an export, top to bottom: what is asked is checked, written, compared with base and adapter, named."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chatglm_tuning.adapters.lora import load_lora, read_lora_config
from chatglm_tuning.base_folder import merged_adapters
from chatglm_tuning.checkpoint import read_lora, read_prefix
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export import certificate as certificates
from chatglm_tuning.export.card import CardFacts, copy_picture, write_card
from chatglm_tuning.export.conversions import (
    adapter_files,
    base_files,
    compare_adapters,
    copy_base,
    write_adapter,
    write_original_prefix,
    write_peft_0_3,
)
from chatglm_tuning.export.ggml import GgmlWeights, check_ggml, write_ggml
from chatglm_tuning.export.merge import Form, MergedWeights, write_merged_folder
from chatglm_tuning.export.plan import Plan, plan_export
from chatglm_tuning.export.probes import Answers, Probes, answer, logits_along, probes_of
from chatglm_tuning.export.progress import layers_progress, part_progress
from chatglm_tuning.export.usage import (
    ADAPTER_NAME,
    BASE_NAME,
    GGML_NAME,
    Usage,
    usage_of_adapter,
    usage_of_ggml,
    usage_of_merged,
    usage_of_original_prefix,
    usage_of_peft_0_3,
)
from chatglm_tuning.export.weights import StoredWeights, load_streamed
from chatglm_tuning.loading import Base, load_base
from chatglm_tuning.new_folder import appearing_whole
from chatglm_tuning.tensor_check import EMBEDDING_KEY
from chatglm_tuning.wording import counted


def export(arguments: ExportArguments, *, show_progress: bool = False) -> str:
    """Write the export that `arguments` ask for, and return a line that says what it is.

    The folder appears under its name once its certificate holds, and not before.
    Raises UserError for whatever cannot be exported, and where the export does not answer as base and adapter do.
    """
    plan = plan_export(arguments)
    with appearing_whole(arguments.output_dir) as target:
        write = _merge if arguments.is_merge else _convert
        certificate = write(plan, target, show_progress=show_progress)
        has_picture = copy_picture(arguments.adapter, target)
        write_card(target, _card_facts(plan, certificate, has_picture=has_picture))
        certificates.write_certificate(target, certificate)
    return _summary(certificate)


def _merge(plan: Plan, target: Path, *, show_progress: bool) -> dict[str, Any]:
    """Write the merged weights into `target` and return their certificate; raises UserError where it does not hold."""
    arguments = plan.arguments
    reference, probes, alone = _ask_reference(plan, show_progress=show_progress)
    gc.collect()
    form = _write_merged(plan, target, show_progress=show_progress)
    exported = _ask_export(plan, target, probes, reference, show_progress=show_progress)
    measures = certificates.measure(reference, alone, exported)
    certificate = certificates.certify(
        form,
        measures,
        {
            "format": arguments.format,
            "compared_with": _reference_name(plan),
            "base": {"name": _name_of(arguments.model_name_or_path), "fingerprint": plan.identity.fingerprint},
            "adapter": _adapter_facts(plan),
            "output": _output_facts(target, show_progress=show_progress),
            "probes": {
                "prompts": len(probes),
                "of_data_path": probes.own_rows,
                "new_tokens": arguments.probe_tokens,
            },
        },
    )
    certificates.refuse_broken(certificate)
    return certificate


def _ask_reference(plan: Plan, *, show_progress: bool) -> tuple[Answers, Probes, torch.Tensor]:
    """Return what base and adapter answer, the probes, and the logits of the base alone."""
    # DoRA looks at weights that are there only while their linears run: it is asked with the whole base in memory.
    if plan.held_bits or read_lora_config(plan.arguments.adapter).use_dora:
        base = load_base(str(plan.folder), quantization_bit=plan.held_bits, show_progress=show_progress)
    else:
        base = load_streamed(plan.folder)
    probes = probes_of(base, plan.own_texts)
    adapter = plan.arguments.adapter
    model = load_lora(base.model, adapter, read_lora(adapter), is_trainable=False)
    layers, new_tokens = base.model.transformer.layers, plan.arguments.probe_tokens
    with layers_progress("asking base and adapter", layers, new_tokens, show=show_progress):
        reference = answer(model, probes, new_tokens)
    with layers_progress("asking the base alone", layers, 1, show=show_progress):
        alone = logits_along(model, probes, reference, without_adapter=True)
    return reference, probes, alone


def _write_merged(plan: Plan, target: Path, *, show_progress: bool) -> str:
    """Write the weights and return the form that they are in."""
    arguments = plan.arguments
    stored = StoredWeights(plan.folder, plan.held_bits)
    weights = MergedWeights(plan.folder, stored, arguments.adapter)
    with part_progress("merging", "tensors", len(weights.keys), show=show_progress) as advance:
        if arguments.format == "ggml":
            check_ggml(plan.config, plan.folder, has_own_head=weights.has_own_head)
            tokenizer = (plan.folder / "ice_text.model").read_bytes()
            write_ggml(target / GGML_NAME, plan.config, tokenizer, weights, arguments.ggml_type, advance)
            return arguments.ggml_type
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        form = Form(dtype, arguments.output_quantization_bit)
        merged = merged_adapters(plan.config) | {plan.adapter_digest: _name_of(str(arguments.adapter))}
        write_merged_folder(plan.folder, weights, form, target, advance, merged=merged)
    if form.bits:
        return f"int{form.bits}"
    return str(dtype or stored.dtype_of(EMBEDDING_KEY)).removeprefix("torch.")


def _ask_export(plan: Plan, target: Path, probes: Probes, reference: Answers, *, show_progress: bool) -> torch.Tensor:
    """Return the logits of what was written, along the answers of base and adapter."""
    if plan.arguments.format == "ggml":
        base: Base = load_streamed(plan.folder, GgmlWeights(target / GGML_NAME))
    elif plan.arguments.output_quantization_bit:
        base = load_base(str(target), show_progress=show_progress)
    else:
        base = load_streamed(target)
    with layers_progress("asking the export", base.model.transformer.layers, 1, show=show_progress):
        return logits_along(base.model, probes, reference)


def _convert(plan: Plan, target: Path, *, show_progress: bool) -> dict[str, Any]:
    """Write the adapter itself in another form, and return the certificate that its tensors are the same."""
    arguments = plan.arguments
    written = target
    if arguments.format == "original" and arguments.method == "lora":
        write_peft_0_3(arguments.adapter, target)
    elif arguments.format == "original":
        write_original_prefix(arguments.adapter, plan.folder, target)
    else:
        written = target / ADAPTER_NAME if arguments.format == "folder" else target
        identity = replace(plan.identity, name_or_path=_name_of(arguments.model_name_or_path))
        write_adapter(arguments.adapter, identity, plan.folder, written)
    if arguments.include_base:
        with part_progress("copying the base", "files", len(base_files(plan.folder)), show=show_progress) as advance:
            copy_base(plan.folder, target / BASE_NAME, advance)
    count, different = compare_adapters(arguments.method, arguments.adapter, written)
    if different:
        raise UserError(
            f"the exported adapter differs from the one given ({different[0]}). Nothing was kept",
            code="E108",
            where=str(arguments.adapter),
            remedy="Copy the adapter's folder again",
        )
    return {
        "format_version": 1,
        "holds": True,
        "format": arguments.format,
        "compared_with": "the adapter's tensors, bit for bit",
        "adapter": _adapter_facts(plan),
        "output": _output_facts(target, show_progress=show_progress),
        "tensors": count,
    }


def _output_facts(target: Path, *, show_progress: bool) -> dict[str, Any]:
    files = certificates.files_in(target)
    with part_progress("taking digests", "files", len(files), show=show_progress) as advance:
        facts = certificates.facts_of_files(target, files, advance)
    return {"sha256": certificates.digest_of_facts(facts), "files": facts}


def _adapter_facts(plan: Plan) -> dict[str, Any]:
    adapter = plan.arguments.adapter
    found = certificates.facts_of_files(adapter, adapter_files(adapter))
    return {
        "method": plan.arguments.method,
        "name": _name_of(str(adapter)),
        "sha256": certificates.digest_of_facts(found),
        "tensors_sha256": plan.adapter_digest,
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
        base_fingerprint=plan.identity.fingerprint,
        format=arguments.format,
        form=certificate.get("weights"),
        manifest=plan.manifest,
        certificate=certificate,
        scores=plan.scores,
        has_picture=has_picture,
        usage=_usage(plan),
    )


def _usage(plan: Plan) -> Usage:
    arguments = plan.arguments
    name = arguments.output_dir.resolve().name
    base = _name_of(arguments.model_name_or_path)
    if arguments.format == "ggml":
        return usage_of_ggml(name)
    if arguments.is_merge:
        return usage_of_merged(name)
    model = f"{name}/{BASE_NAME}" if arguments.include_base else base
    adapter = f"{name}/{ADAPTER_NAME}" if arguments.format == "folder" else name
    bits = None if plan.manifest is None or plan.config.quantization_bit else plan.manifest.base_model.quantization_bit
    usage = usage_of_adapter(model, arguments.method, adapter, bits)
    if arguments.format != "original":
        return usage
    if arguments.method == "lora":
        return replace(usage, python=usage_of_peft_0_3(base, name))
    return replace(usage, python=usage_of_original_prefix(base, name, read_prefix(arguments.adapter)[0]))


def _summary(certificate: dict[str, Any]) -> str:
    if "measured" not in certificate:
        return f"{counted(certificate['tensors'], 'tensor')}, the adapter's own bit for bit"
    measured = certificate["measured"]
    return (
        f"{certificate['weights']} weights that answer as {certificate['compared_with']}: largest logit gap "
        f"{measured['largest_logit_gap']}, mean {measured['mean_logit_gap']} (the adapter itself moves them by "
        f"{measured['mean_effect_of_adapter']}), {measured['equal_tokens']} greedy tokens equal"
    )
