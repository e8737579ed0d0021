"""Memory of loading a model and of a training step, by arithmetic alone; imports no library.

What is counted follows the code that computes: `model/modeling.py` (what a layer keeps for its backward pass),
`model/padding_free.py` (attention a sample at a time), `model/loss.py` (logits in chunks), `quantization/workspace.py`
(unpacked weights) and `loading.py` (one tensor at a time). All sizes are bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from chatglm_tuning.errors import UserError

Method = Literal["lora", "ptuning", "full"]
Device = Literal["cpu", "gpu"]
Checkpointing = Literal["off", "mlp", "on"]
"""What a layer recomputes in the backward pass: nothing, the inner states of its MLP, or all but its input."""
Workspace = Literal["chunk", "matrix", "layer"]
"""What of a quantised base is unpacked at once: some megabytes, the largest weight, or one weight of each shape."""
Bits = Literal[4, 8]

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_POSITIONS_AT_ONCE, _FP32_ROWS_AT_ONCE = 256, 16  # of the loss
_SCORE_BYTES_AT_ONCE = 2**25  # of attention: fp32 scores of one block of queries
_CHUNK_ELEMENTS = 2**23  # of a weight that is unpacked in chunks
# Measured as VmHWM on Linux x86-64 with torch 2.13: the interpreter with torch, transformers, peft and datasets, and
# what oneDNN and torch.compile make for the shapes of a few batches. A batch of a new length adds some tens of
# megabytes to the latter, up to the limit of oneDNN's cache of kernels (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
_RUNTIME: dict[Device, int] = {"cpu": int(0.43 * GIB), "gpu": 0}
_KERNELS: dict[Device, int] = {"cpu": int(0.3 * GIB), "gpu": 0}
# Measured, too: in float32 the C library's heap splinters by more than what `_gap_bytes` counts.
_FP32_SPLINTERS = int(0.35 * GIB)
_READ_AT_ONCE = 2**26  # of the weight files, and scratch of quantising
_HOST_RUNTIME_BESIDE_GPU = 3 * GIB  # not measured: the CUDA libraries take more than those of a CPU
# Unpacking a weight takes as long as its product with about so many tokens (AMX; a GPU's bandwidth gives the same).
_TOKENS_PER_UNPACKING = 200


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a ChatGLM-6B; the defaults are the released model's. A key of `config.json` each."""

    num_layers: int = 28
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_attention_heads: int = 32
    vocab_size: int = 130528
    max_sequence_length: int = 2048

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> "ModelShape":
        """Take the sizes from a parsed `config.json`; raises UserError where one is missing or no size."""
        sizes = {}
        for name in cls.__dataclass_fields__:
            size = config.get(name)
            if not isinstance(size, int) or size < 1:
                raise UserError(
                    f"{name} must be a whole number above 0, not {size!r}",
                    code="M104",
                    where=where,
                    remedy="Give the folder of a downloaded ChatGLM-6B",
                )
            sizes[name] = size
        return cls(**sizes)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The four linears of a layer: name to (out, in)."""
        hidden, inner = self.hidden_size, self.inner_hidden_size
        return {
            "query_key_value": (3 * hidden, hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (inner, hidden),
            "dense_4h_to_h": (hidden, inner),
        }


@dataclass(frozen=True)
class Tuning:
    """What is trained and in which form the base is held.

    bits: of the base's linears, None = in the dtype. value_bytes: of the dtype that is computed in.
    """

    method: Method
    bits: Bits | None = None
    value_bytes: int = 2
    lora_rank: int = 8
    lora_target: tuple[str, ...] = ("query_key_value",)
    pre_seq_len: int = 128
    prefix_projection: bool = False


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch. tokens: without padding; label_tokens: positions with a loss; longest: of one sample."""

    samples: int
    tokens: int
    label_tokens: int
    longest: int


@dataclass(frozen=True)
class Plan:
    """How much is recomputed, and how much of a quantised base is unpacked at once."""

    checkpointing: Checkpointing = "off"
    workspace: Workspace = "matrix"

    @property
    def is_leanest(self) -> bool:
        """Whether memory goes before time in all else, too: none is kept from step to step, no kernel is compiled."""
        return self.workspace == "chunk"


PLANS = (
    Plan("off", "matrix"),
    Plan("mlp", "layer"),
    Plan("mlp", "matrix"),
    Plan("on", "layer"),
    Plan("on", "matrix"),
    Plan("on", "chunk"),
)
"""From the fastest to the leanest."""

# Products of a layer in a step, in those of its forward pass. A forward pass and one for the input gradients are 2;
# recomputing the inner states repeats a third of a forward pass, and a layer all of it but its last product.
_PASSES: dict[Checkpointing, float] = {"off": 2, "mlp": 2 + 1 / 3, "on": 2 + 2 / 3}


@dataclass(frozen=True)
class Estimate:
    """The parts of memory, each at its largest, and what is held together at each moment of a run.

    parts: bytes by name. moments: bytes by name; the peak is the largest.
    host_bytes: RAM of the process: the peak itself on a CPU.
    """

    parts: Mapping[str, int]
    moments: Mapping[str, int]
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once on the device, loading included."""
        return max(self.moments.values())

    @property
    def step_bytes(self) -> int:
        """The most that training holds beyond the loaded model and the adapter."""
        held = sum(self.parts[name] for name in _HELD_BEFORE_STEPS)
        return max(size for name, size in self.moments.items() if name != "loading") - held


_HELD_BEFORE_STEPS = ("runtime", "weights", "embeddings", "adapter")


def estimate(shape: ModelShape, tuning: Tuning, batch: Batch, plan: Plan, device: Device = "cpu") -> Estimate:
    """Return the memory of a run whose largest micro-batch is `batch`.

    On a CPU: resident memory of the process. On a GPU: bytes of allocated tensors, and the RAM beside it.
    """
    weights, embeddings = weight_bytes(shape, tuning)
    trained = trainable_elements(shape, tuning)
    is_full = tuning.method == "full"
    state_bytes = tuning.value_bytes if is_full else 4
    parts = {
        "runtime": _RUNTIME[device],
        "weights": weights,
        "embeddings": embeddings,
        "adapter": 0 if is_full else trained * 4,
        "gradients": trained * state_bytes,
        "optimizer": 2 * trained * state_bytes,
        "activations": kept_bytes(shape, tuning, batch, plan, device),
        "logits": _logit_bytes(shape, tuning, batch),
        "prefix": _prefix_bytes(shape, tuning, batch, device),
        "workspace": _workspace_bytes(shape, tuning, plan),
        "temporary": _temporary_bytes(shape, tuning, batch, plan, device),
    }
    is_heap_kept = device == "cpu" and not plan.is_leanest
    is_kept = is_heap_kept and not is_full  # the plain linears of full tuning have no results in the pool
    parts |= {"update": _update_bytes(shape, tuning), "reading": _READ_AT_ONCE}
    parts["kernels"] = _KERNELS[device] if is_heap_kept else 0
    parts["gaps"] = _gap_bytes(shape, tuning, batch, plan) if is_kept else 0
    if is_heap_kept and tuning.value_bytes == DTYPE_BYTES["float32"]:
        parts["gaps"] += _FP32_SPLINTERS
    moments = _moments(parts, shape.num_layers, is_kept=is_kept)
    host = max(moments.values()) if device == "cpu" else _HOST_RUNTIME_BESIDE_GPU + _READ_AT_ONCE
    return Estimate(parts, moments, host)


def _moments(parts: Mapping[str, int], layers: int, *, is_kept: bool) -> dict[str, int]:
    """Return what is held together; where freed memory is kept for the next step, all that steps ever use."""
    loading = sum(parts[name] for name in ("runtime", "weights", "embeddings", "reading"))
    if is_kept:
        return {"loading": loading, "training": sum(parts.values()) - parts["reading"]}
    # Gradients too: from the second micro-batch of an optimizer step on they are there from its beginning.
    held = (*_HELD_BEFORE_STEPS, "optimizer", "gradients", "workspace", "kernels", "gaps")
    in_steps = sum(parts[name] for name in held)
    of_last_layer = parts["activations"] // layers
    return {
        "loading": loading,
        "loss": in_steps + parts["activations"] + parts["logits"],
        "start of the backward pass": in_steps + parts["activations"] + parts["temporary"],
        "end of the backward pass": in_steps + parts["prefix"] + of_last_layer + parts["temporary"],
        "optimizer step": in_steps + parts["update"],
    }


def choose_plan(
    shape: ModelShape,
    tuning: Tuning,
    batch: Batch,
    free_bytes: int,
    device: Device = "cpu",
    *,
    asked: Literal["auto"] | Checkpointing = "auto",
) -> tuple[Plan, Estimate]:
    """Return the fastest plan whose steps fit into `free_bytes`, what is free once the model is loaded, and its sizes.

    asked: what is to be recomputed, `auto` = as little as fits. Where no plan fits it is the leanest: memory may be
    freer than it seemed.
    """
    found = [(plan, estimate(shape, tuning, batch, plan, device)) for plan in plans_of(tuning, asked)]
    return next((entry for entry in found if entry[1].step_bytes <= free_bytes), found[-1])


@dataclass(frozen=True)
class Option:
    """Settings that fit. cost: of `cost_per_token`."""

    tuning: Tuning
    batch: Batch
    plan: Plan
    peak_bytes: int
    cost: float


def fitting_options(
    shape: ModelShape, tuning: Tuning, batches: Iterable[Batch], limit_bytes: int, device: Device = "cpu"
) -> list[Option]:
    """Return every batch and plan whose whole run stays within `limit_bytes`, fastest first."""
    options = []
    for batch in batches:
        for plan in plans_of(tuning):
            peak = estimate(shape, tuning, batch, plan, device).peak_bytes
            if peak <= limit_bytes:
                options.append(Option(tuning, batch, plan, peak, cost_per_token(tuning, batch, plan)))
    return sorted(options, key=lambda option: option.cost)


def plans_of(tuning: Tuning, asked: Literal["auto"] | Checkpointing = "auto") -> list[Plan]:
    """Return the plans that differ for `tuning`, fastest first; without quantisation nothing is unpacked.

    asked: only those that recompute this; `auto` = all.
    """
    plans = PLANS if tuning.bits is not None else (*(Plan(name) for name in _PASSES), PLANS[-1])
    return [plan for plan in plans if asked in ("auto", plan.checkpointing)]


def extra_time(plan: Plan) -> float:
    """Return the share that recomputing adds to the products of a step."""
    return _PASSES[plan.checkpointing] / _PASSES["off"] - 1


def cost_per_token(tuning: Tuning, batch: Batch, plan: Plan) -> float:
    """Return the time of a step by its tokens, in units of a forward pass of one token of a full base.

    Products and unpacking alone, which is enough to put settings in order.
    """
    passes = _PASSES[plan.checkpointing]
    if tuning.method == "full":
        passes += 1  # the gradients of the weights
    if tuning.bits is None:
        return passes
    # One weight of each shape still stands, unpacked, when the backward pass follows the recomputed forward.
    unpackings = 2 if plan.workspace == "layer" or plan.checkpointing == "off" else passes
    return passes + unpackings * _TOKENS_PER_UNPACKING / batch.tokens


def weight_bytes(shape: ModelShape, tuning: Tuning) -> tuple[int, int]:
    """Return the bytes of the layers, final LayerNorm included, and of the embeddings, which are the head too."""
    matrices = sum(rows * columns for rows, columns in shape.linears.values())
    rows = sum(rows for rows, _ in shape.linears.values())
    vectors = rows + 4 * shape.hidden_size
    if tuning.bits is None:
        layer = (matrices + vectors) * tuning.value_bytes
    else:
        layer = matrices * tuning.bits // 8 + 2 * rows + vectors * tuning.value_bytes
    final = 2 * shape.hidden_size * tuning.value_bytes
    return shape.num_layers * layer + final, shape.vocab_size * shape.hidden_size * tuning.value_bytes


def trainable_elements(shape: ModelShape, tuning: Tuning) -> int:
    """Return how many numbers are trained."""
    hidden, layers = shape.hidden_size, shape.num_layers
    if tuning.method == "lora":
        sizes = (sum(shape.linears[name]) for name in tuning.lora_target)
        return layers * tuning.lora_rank * sum(sizes)
    width = 2 * layers * hidden
    if tuning.method == "ptuning":
        if tuning.prefix_projection:
            return tuning.pre_seq_len * hidden + hidden * hidden + hidden + width * hidden + width
        return tuning.pre_seq_len * width
    return sum(weight_bytes(shape, replace(tuning, bits=None, value_bytes=1)))


def kept_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, plan: Plan, device: Device = "cpu") -> int:
    """Return what the layers keep of the forward pass for the backward pass."""
    layer = _layer_bytes(shape, tuning, batch, device)
    hidden = batch.tokens * shape.hidden_size * tuning.value_bytes
    if plan.checkpointing == "on":
        return (shape.num_layers + 1) * hidden
    if plan.checkpointing == "mlp":
        layer -= _mlp_bytes(shape, tuning, batch)
    return shape.num_layers * layer + hidden


def _layer_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, device: Device) -> int:
    """What one layer keeps when nothing is recomputed."""
    hidden, value_bytes = shape.hidden_size, tuning.value_bytes
    elements = batch.tokens * 2 * hidden  # the inputs of both LayerNorms
    elements += _attention_elements(shape, tuning, batch, device)
    if tuning.method == "full":
        elements += batch.tokens * 2 * hidden  # the inputs of the attention's two linears
    if tuning.method == "lora":
        inputs = {"query_key_value": hidden, "dense": hidden}
        elements += batch.tokens * sum(inputs.get(name, 0) for name in tuning.lora_target)
    return elements * value_bytes + _mlp_bytes(shape, tuning, batch)


def _attention_elements(shape: ModelShape, tuning: Tuning, batch: Batch, device: Device) -> int:
    """The fused query, key and value of the real tokens; on a GPU they are padded, with the prefix, and the context."""
    if device == "cpu":
        return batch.tokens * 3 * shape.hidden_size
    prefix = tuning.pre_seq_len if tuning.method == "ptuning" else 0
    return batch.samples * shape.hidden_size * (2 * batch.longest + 2 * (batch.longest + prefix))


def _gap_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, plan: Plan) -> int:
    """Return what lies unused between kept tensors on the C library's heap: measured, about as much as those.

    They are the ones that torch's own operators return (inputs of LayerNorms, and of LoRA's matrices); the large
    results of a layer lie in a pool of their own, where nothing splinters.
    """
    hidden = batch.tokens * shape.hidden_size * tuning.value_bytes
    if plan.checkpointing == "on":
        return shape.num_layers * hidden
    fused = batch.tokens * 3 * shape.hidden_size * tuning.value_bytes
    outside = _layer_bytes(shape, tuning, batch, "cpu") - _mlp_bytes(shape, tuning, batch) - fused
    return shape.num_layers * outside


def _mlp_bytes(shape: ModelShape, tuning: Tuning, batch: Batch) -> int:
    """What the MLP of a layer keeps: its inner states before the activation, and the inputs of trained matrices."""
    hidden, inner = shape.hidden_size, shape.inner_hidden_size
    elements = inner
    inputs = {"dense_h_to_4h": hidden, "dense_4h_to_h": inner}
    if tuning.method == "full":
        elements += hidden + inner
    if tuning.method == "lora":
        elements += sum(inputs.get(name, 0) for name in tuning.lora_target)
    return batch.tokens * elements * tuning.value_bytes


def _logit_bytes(shape: ModelShape, tuning: Tuning, batch: Batch) -> int:
    """The logits of one chunk, a few rows of them in fp32 twice (softmax in and out), and states and their gradient."""
    positions = min(_POSITIONS_AT_ONCE, batch.label_tokens)
    chunk = (positions * tuning.value_bytes + min(_FP32_ROWS_AT_ONCE, positions) * 8) * shape.vocab_size
    states = 2 * batch.label_tokens * shape.hidden_size * tuning.value_bytes
    head_gradient = 2 * 4 * shape.vocab_size * shape.hidden_size if tuning.method == "full" else 0
    return chunk + states + head_gradient


def _prefix_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, device: Device) -> int:
    """The fp32 gradients of the layers' keys and values before they are put together, and with projection themselves.

    On a GPU every sample has a copy of one layer's prefix beside them.
    """
    if tuning.method != "ptuning":
        return 0
    elements = tuning.pre_seq_len * 2 * shape.num_layers * shape.hidden_size
    copies = 0
    if device == "gpu":
        copies = 2 * batch.samples * tuning.pre_seq_len * shape.hidden_size * tuning.value_bytes
    return elements * 4 * (3 if tuning.prefix_projection else 1) + copies


def _workspace_bytes(shape: ModelShape, tuning: Tuning, plan: Plan) -> int:
    if tuning.bits is None:
        return 0
    sizes = [rows * columns for rows, columns in shape.linears.values()]
    elements = {"layer": sum(sizes), "matrix": max(sizes), "chunk": min(_CHUNK_ELEMENTS, max(sizes))}
    return elements[plan.workspace] * tuning.value_bytes


def _temporary_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, plan: Plan, device: Device) -> int:
    """What the layer at work needs beyond what all layers keep: recomputed states, gradients and fp32 attention."""
    hidden = batch.tokens * shape.hidden_size * tuning.value_bytes
    inner = batch.tokens * shape.inner_hidden_size * tuning.value_bytes
    recomputed = 0
    if plan.checkpointing == "on":
        recomputed = _layer_bytes(shape, tuning, batch, device) - hidden
    elif plan.checkpointing == "mlp":
        recomputed = _mlp_bytes(shape, tuning, batch)
    mlp = 3 * inner + 3 * hidden if tuning.bits else 2 * inner + 3 * hidden
    return recomputed + max(mlp, _attention_work_bytes(shape, tuning, batch, device) + 4 * hidden)


def _attention_work_bytes(shape: ModelShape, tuning: Tuning, batch: Batch, device: Device) -> int:
    """The fp32 states of the longest sample, their gradients, and a block of scores in its four forms."""
    if device == "gpu":
        return 4 * batch.samples * batch.longest * shape.hidden_size * tuning.value_bytes
    prefix = tuning.pre_seq_len if tuning.method == "ptuning" else 0
    states = (9 * batch.longest + 4 * prefix) * shape.hidden_size * 4
    scores = shape.num_attention_heads * batch.longest * (batch.longest + prefix) * 4
    return states + 4 * min(scores, _SCORE_BYTES_AT_ONCE)


def _update_bytes(shape: ModelShape, tuning: Tuning) -> int:
    """What the update itself needs for a moment: as much as the largest trained tensor, twice."""
    if tuning.method == "full":
        return 2 * shape.vocab_size * shape.hidden_size * tuning.value_bytes
    if tuning.method == "ptuning" and not tuning.prefix_projection:
        return 2 * trainable_elements(shape, tuning) * 4
    return 0
