"""The fields of transformers.TrainingArguments as data, so that flags and files are checked without importing it.

tests/config/test_training_arguments.py compares every name, kind and choice with the installed transformers (5.23).
`parallelism_config` is left out: only Python code can fill it.
"""

from chatglm_tuning.config.arguments import SEED_VALUE
from chatglm_tuning.config.values import Kind, Value

_NAMES: dict[Kind, str] = {
    "text": """
        output_dir optim_args torch_compile_backend torch_compile_mode log_level log_level_replica run_name project
        trackio_space_id trackio_bucket_id hub_token hub_model_id hub_strategy hub_revision metric_for_best_model
        dataloader_multiprocessing_context train_sampling_strategy length_column_name ddp_backend
        resume_from_checkpoint lr_scheduler_type optim logging_strategy eval_strategy save_strategy
    """,
    "integer": """
        per_device_train_batch_size per_device_eval_batch_size max_steps gradient_accumulation_steps
        torch_empty_cache_steps eval_accumulation_steps save_total_limit seed data_seed dataloader_num_workers
        dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout local_rank
    """,
    "number": """
        num_train_epochs learning_rate warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
        label_smoothing_factor neftune_noise_alpha logging_steps eval_steps eval_delay save_steps
    """,
    "boolean": """
        average_tokens_across_devices bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
        gradient_checkpointing torch_compile use_liger_kernel use_cache auto_find_batch_size logging_first_step
        log_on_each_node logging_nan_inf_filter disable_tqdm prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object batch_eval_metrics save_only_model save_on_each_node enable_jit_checkpoint push_to_hub
        hub_private_repo hub_always_push load_best_model_at_end greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism use_cpu dataloader_drop_last dataloader_pin_memory
        dataloader_persistent_workers dataloader_in_order remove_unused_columns ddp_find_unused_parameters
        ddp_broadcast_buffers ddp_static_graph skip_memory_metrics do_train do_eval do_predict
    """,
    "names": "report_to include_for_metrics label_names debug",
    "mapping": """
        lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs liger_kernel_config
        accelerator_config fsdp_config deepspeed
    """,
    "anything": "include_num_input_tokens_seen trackio_static_space_id fsdp optim_target_modules",
}

CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
    ),
    "optim": (
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
        "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit",
        "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit",
        "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb",
        "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
        "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo",
        "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw",
        "apollo_adamw_layerwise", "stable_adamw",
    ),
    "logging_strategy": ("no", "steps", "epoch"),
    "eval_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch", "best"),
    "hub_strategy": ("end", "every_save", "checkpoint", "all_checkpoints"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}  # fmt: skip

_RANGES: dict[str, Value] = {
    "seed": SEED_VALUE,
    "data_seed": SEED_VALUE,
    "per_device_train_batch_size": Value("integer", at_least=1),
    "per_device_eval_batch_size": Value("integer", at_least=1),
    "gradient_accumulation_steps": Value("integer", at_least=1),
    "max_steps": Value("integer", at_least=-1, hint="Give the number of optimizer steps, or -1 to count in epochs"),
    "save_total_limit": Value("integer", at_least=1),
    "dataloader_num_workers": Value("integer", at_least=0),
    "num_train_epochs": Value("number", above=0),
    "learning_rate": Value("number", above=0),
    "warmup_steps": Value("number", at_least=0, hint="Give a number of steps, or a share of all steps below 1"),
    "weight_decay": Value("number", at_least=0),
    "adam_beta1": Value("number", at_least=0, below=1),
    "adam_beta2": Value("number", at_least=0, below=1),
    "adam_epsilon": Value("number", above=0),
    "max_grad_norm": Value("number", at_least=0),
    "label_smoothing_factor": Value("number", at_least=0, below=1),
    "logging_steps": Value("number", above=0),
    "eval_steps": Value("number", above=0),
    "save_steps": Value("number", above=0),
}

TRAINING_ARGUMENTS: dict[str, Value] = {
    name: _RANGES.get(name, Value(kind, choices=CHOICES.get(name, ())))
    for kind, names in _NAMES.items()
    for name in names.split()
}
"""What every field of TrainingArguments may hold."""

TRAINER_FLAGS: dict[str, str] = {
    "output_dir": "folder that the adapter, the checkpoints and the logs are written to (required)",
    "per_device_train_batch_size": "rows of one micro-batch",
    "per_device_eval_batch_size": "rows of one evaluation batch",
    "gradient_accumulation_steps": "micro-batches of one optimizer step",
    "learning_rate": "highest learning rate",
    "num_train_epochs": "passes over the training rows",
    "max_steps": "optimizer steps; above 0 it decides, and not num_train_epochs",
    "lr_scheduler_type": "course of the learning rate: linear, cosine, constant, ...",
    "warmup_steps": "steps in which the learning rate rises, or below 1 their share of all steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients are clipped to this norm",
    "adam_beta1": "AdamW's first decay rate",
    "adam_beta2": "AdamW's second decay rate",
    "adam_epsilon": "AdamW's epsilon",
    "label_smoothing_factor": "label smoothing",
    "optim": "optimizer: adamw_torch, adafactor, sgd, ...",
    "logging_steps": "steps from one line of the log to the next",
    "save_strategy": "when to write a checkpoint: no, steps, epoch or best",
    "save_steps": "steps from one checkpoint to the next",
    "save_total_limit": "checkpoints that are kept",
    "eval_strategy": "when to evaluate: no, steps or epoch",
    "eval_steps": "steps from one evaluation to the next",
    "load_best_model_at_end": "end with the adapter of the best checkpoint, instead of that of the last step",
    "metric_for_best_model": "what is best: loss (the default), or with predict_samples rouge-l, bleu-4, ...",
    "greater_is_better": "whether more of it is better; without it, for all but the loss",
    "fp16": "mixed precision in float16 (CUDA)",
    "bf16": "mixed precision in bfloat16",
    "report_to": "where the curves go: tensorboard, none, ...",
    "dataloader_num_workers": "processes that load batches",
    "deepspeed": "DeepSpeed's JSON file, as ds_config.json",
    "seed": "seed of the weights, of the dropout and of the order of the rows",
    "local_rank": "written by the deepspeed launcher",
}
"""The fields of TrainingArguments that are flags too, with their help; the others go into a JSON file."""
