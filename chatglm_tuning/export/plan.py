"""An export that was checked: all that can be refused is, before weights are read."""

import logging
from dataclasses import dataclass
from pathlib import Path

from chatglm_tuning.base_folder import load_tokenizer, merged_adapters, read_config
from chatglm_tuning.checkpoint import CERTIFICATE_NAME, BaseModel, Manifest, digest_tensors, read_manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import AnsweredBy
from chatglm_tuning.export.base_bits import held_bits_of
from chatglm_tuning.export.card import CARD_NAME, LOSS_PICTURE
from chatglm_tuning.export.conversions import adapter_files, base_files, check_convertible, read_adapter
from chatglm_tuning.export.ggml import check_ggml, ggml_size_bytes
from chatglm_tuning.export.merge import check_mergeable
from chatglm_tuning.export.probes import read_probe_texts
from chatglm_tuning.export.scores import Scores, read_scores
from chatglm_tuning.export.usage import ADAPTER_NAME, BASE_NAME, GGML_NAME
from chatglm_tuning.loading import check_adapter, describe_another_base, read_identity
from chatglm_tuning.model import ChatGLMConfig
from chatglm_tuning.new_folder import check_new_folder, check_room
from chatglm_tuning.shards import find_weight_files, resolve_model_folder

logger = logging.getLogger(__name__)

_NAMES = (
    GGML_NAME,
    ADAPTER_NAME,
    BASE_NAME,
    CARD_NAME,
    LOSS_PICTURE,
    CERTIFICATE_NAME,
    "chatglm_tuning.json",
    "adapter_config.json",
    "adapter_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Plan:
    """What is exported, from what.

    identity: of the base. held_bits: what the base is held in, which a LoRA is merged onto; None: as stored.
    adapter_digest: SHA-256 over the adapter's tensors.
    """

    arguments: ExportArguments
    folder: Path
    config: ChatGLMConfig
    identity: BaseModel
    manifest: Manifest | None
    held_bits: int | None
    own_texts: list[str]
    scores: Scores
    adapter_digest: str


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
            code="C103",
            where=str(arguments.adapter),
            remedy=f"Give it with {flag}",
        )
    digest = digest_tensors(read_adapter(arguments.method, arguments.adapter))
    manifest = read_manifest(arguments.adapter, verify_files=False)
    _refuse_merging_twice(arguments, config, manifest, digest)
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
    identity = read_identity(arguments.model_name_or_path)
    _check_base(arguments, config, identity, manifest)
    scores = read_scores(arguments.scores, arguments.adapter, manifest, AnsweredBy(digest, identity.fingerprint))
    plan = Plan(arguments, folder, config, identity, manifest, held_bits, texts, scores, digest)
    check_room(_size_bytes(plan), arguments.output_dir)
    return plan


def _check_base(
    arguments: ExportArguments, config: ChatGLMConfig, identity: BaseModel, manifest: Manifest | None
) -> None:
    """Say where the adapter was trained on another base; raises UserError where the two would be shipped as a pair."""
    if arguments.include_base and manifest is not None and manifest.base_model.fingerprint != identity.fingerprint:
        raise UserError(
            f"the prefix was trained on another base model ({manifest.base_model.name_or_path}) than the one that "
            f"--include_base would copy beside it ({identity.name_or_path})",
            code="C106",
            where=str(arguments.adapter),
            remedy="Give the base that it was trained on, or leave --include_base out",
        )
    warning = describe_another_base(identity, merged_adapters(config), arguments.adapter)
    if warning is not None:
        logger.warning("%s", warning)


def _refuse_merging_twice(
    arguments: ExportArguments, config: ChatGLMConfig, manifest: Manifest | None, digest: str
) -> None:
    name = merged_adapters(config).get(digest)
    if name is not None and arguments.is_merge:
        base = "" if manifest is None else f" ({manifest.base_model.name_or_path})"
        raise UserError(
            f"this base already has that LoRA (as {name}) merged into its weights",
            code="E110",
            where=arguments.model_name_or_path,
            remedy=f"Use it as it is, or give the base that the LoRA was trained on{base}",
        )


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
