"""What users paste, by the name of the known error: written for these tests in the form that the programs print."""

EXCERPTS: dict[str, list[str]] = {
    "ChatGLMTokenizer has no sp_tokenizer": [
        """\
Traceback (most recent call last):
  File "cli_demo.py", line 6, in <module>
    tokenizer = AutoTokenizer.from_pretrained("/data/chatglm-6b", trust_remote_code=True)
  File ".../transformers_modules/chatglm-6b/tokenization_chatglm.py", line 244, in vocab_size
    return self.sp_tokenizer.num_tokens
AttributeError: 'ChatGLMTokenizer' object has no attribute 'sp_tokenizer'. Did you mean: '_tokenize'?
""",
        "报错了，怎么办？ AttributeError：‘ChatGLMTokenizer’ object has no attribute ‘tokenizer’ 谢谢",
    ],
    "_pad() got padding_side": [
        """\
  File ".../transformers/tokenization_utils_base.py", line 3522, in pad
    outputs = self._pad(
TypeError: ChatGLMTokenizer._pad() got an unexpected keyword argument 'padding_side'
"""
    ],
    "the model has no _extract_past_from_model_output": [
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute '_extract_past_from_model_output'"
    ],
    "the model cannot generate": [
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute 'generate'",
        "ChatGLMForConditionalGeneration has generative capabilities, as `prepare_inputs_for_generation` is explicitly "
        "defined. However, it doesn't directly inherit from `GenerationMixin`.",
    ],
    "GenerationConfig has no _eos_token_tensor": [
        "AttributeError: 'GenerationConfig' object has no attribute '_eos_token_tensor'"
    ],
    "KeyError: 'chatglm'": [
        """\
  File "/usr/lib/python3/site-packages/transformers/models/auto/configuration_auto.py", line 400, in from_pretrained
    config_class = CONFIG_MAPPING[config_dict["model_type"]]
KeyError: 'chatglm'
""",
        "ValueError: The checkpoint you are trying to load has model type `chatglm` but Transformers "
        "does not recognize "
        "this architecture.",
    ],
    "Unrecognized configuration class ChatGLMConfig": [
        "ValueError: Unrecognized configuration class <class 'transformers_modules.chatglm-6b.configuration_chatglm."
        "ChatGLMConfig'> for this kind of AutoModel: AutoModelForCausalLM."
    ],
    "trust_remote_code is asked for": [
        "ValueError: Loading /data/chatglm-6b requires you to execute the configuration file in that "
        "repo on your local "
        "machine. Make sure you have read the code there, then set the option `trust_remote_code=True` to remove this "
        "error.",
        "ValueError: The repository /data/chatglm-6b contains custom code which must be executed to correctly load the "
        "model.",
    ],
    "AutoTokenizer does not know ChatGLMTokenizer": [
        "ValueError: Tokenizer class ChatGLMTokenizer does not exist or is not currently imported."
    ],
    "the model has no prefix_encoder": [
        """\
  File "main.py", line 119, in main
    model.transformer.prefix_encoder.float()
AttributeError: 'ChatGLMModel' object has no attribute 'prefix_encoder'
"""
    ],
    "the model has no enable_input_require_grads": [
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute 'enable_input_require_grads'"
    ],
    "the model or its configuration has no such attribute": [
        "AttributeError: 'ChatGLMConfig' object has no attribute 'position_encoding_2d'",
        "AttributeError: 'ChatGLMModel' object has no attribute 'lm_head'",
    ],
    "150001 or 130001 is not in list": [
        """\
    mask_positions = [seq.tolist().index(mask_token) for seq in input_ids]
ValueError: 150001 is not in list
""",
        "ValueError: 130000 is not in list",
    ],
    "the embeddings have 150528 rows": [
        """\
RuntimeError: Error(s) in loading state_dict for ChatGLMForConditionalGeneration:
\tsize mismatch for transformer.word_embeddings.weight: copying a param with shape torch.Size([150528, 4096]) from \
checkpoint, the shape in current model is torch.Size([130528, 4096]).
"""
    ],
    "a prefix of another size": [
        """\
RuntimeError: Error(s) in loading state_dict for PrefixEncoder:
\tMissing key(s) in state_dict: "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias".
\tsize mismatch for embedding.weight: copying a param with shape torch.Size([128, 229376]) from checkpoint, \
the shape in \
current model is torch.Size([128, 4096]).
""",
        "size mismatch for transformer.prefix_encoder.embedding.weight: copying a param with shape "
        "torch.Size([8, 229376])",
    ],
    "a LoRA of another base or rank": [
        """\
RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:
    size mismatch for base_model.model.transformer.layers.0.attention.query_key_value.lora_A.default.weight: copying a \
param with shape torch.Size([8, 4096]) from checkpoint
"""
    ],
    "the weights do not fit the model": [
        """\
RuntimeError: Error(s) in loading state_dict for ChatGLMForConditionalGeneration:
\tMissing key(s) in state_dict: "transformer.final_layernorm.weight".
"""
    ],
    "cpm_kernels finds no CUDA": [
        """\
  File ".../cpm_kernels/library/base.py", line 72, in wrapper
    raise RuntimeError("Library %s is not initialized" % self.__name)
RuntimeError: Library cudart is not initialized
""",
        "RuntimeError: Library cublasLt is not initialized",
    ],
    "cpm_kernels does not know the system": [
        """\
  File "/opt/homebrew/lib/python3.10/site-packages/cpm_kernels/library/base.py", line 59, in __init__
    raise RuntimeError("Unknown platform: %s" % sys.platform)
RuntimeError: Unknown platform: darwin
"""
    ],
    "KeyError: transformer.prefix_encoder": [
        """\
  File ".../vllm/model_executor/models/chatglm.py", line 389, in load_weights
    param = params_dict[name]
KeyError: 'transformer.prefix_encoder.embedding.weight'
"""
    ],
    "gradio's components have no style": [
        """\
  File "web_demo.py", line 89, in <module>
    user_input = gr.Textbox(show_label=False, placeholder="Input...", lines=10).style(
AttributeError: 'Textbox' object has no attribute 'style'. Did you mean: 'scale'?
""",
        "AttributeError: 'Chatbot' object has no attribute 'style'",
    ],
    "two tensors of different sizes meet": [
        """\
  File ".../transformers_modules/chatglm-6b/modeling_chatglm.py", line 271, in attention_fn
    attention_scores.masked_fill_(attention_mask, -10000.0)
RuntimeError: The size of tensor a (4) must match the size of tensor b (32) at non-singleton dimension 1
"""
    ],
    "the kernels of the released quantisation were not compiled": [
        """\
Failed to load cpm_kernels:No module named 'cpm_kernels'
Traceback (most recent call last):
  File ".../transformers_modules/chatglm-6b-int4/quantization.py", line 260, in extract_weight_to_float
    func = cpu_kernels.int4WeightExtractionFloat
AttributeError: 'NoneType' object has no attribute 'int4WeightExtractionFloat'
""",
        "NameError: name 'round_up' is not defined",
    ],
    "fp16 on a CPU": [
        "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'",
        "RuntimeError: “LayerNormKernelImpl” not implemented for ‘Half’",
    ],
    "two floating types meet": [
        "RuntimeError: expected scalar type Half but found Float",
        "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Half",
    ],
    "FP16 gradients cannot be unscaled": ["ValueError: Attempting to unscale FP16 gradients."],
    "the loss depends on nothing that is trained": [
        "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"
    ],
    "peft is older than the adapter": [
        "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'corda_config'"
    ],
    "peft and transformers do not fit": [
        """\
  File ".../peft/peft_model.py", line 37, in <module>
    from transformers import Cache, DynamicCache, EncoderDecoderCache
ImportError: cannot import name 'EncoderDecoderCache' from 'transformers' (/opt/conda/lib/transformers/__init__.py)
""",
        "ModuleNotFoundError: No module named 'transformers.modeling_layers'",
    ],
    "Trainer does not know an argument": [
        "TypeError: TrainingArguments.__init__() got an unexpected keyword argument 'evaluation_strategy'",
        "TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'",
    ],
    "bitsandbytes": [
        "RuntimeError: \n        CUDA Setup failed despite GPU being available. Please run the following command",
        "importlib.metadata.PackageNotFoundError: No package metadata was found for bitsandbytes",
    ],
    "torch.load refuses the file": [
        """\
_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you have two options
\tWeightsUnpickler error: Unsupported global: GLOBAL numpy.core.multiarray._reconstruct was not an allowed global
"""
    ],
    "torch.load needs torch 2.6": [
        "ValueError: Due to a serious vulnerability issue in `torch.load`, even with "
        "`weights_only=True`, we now require "
        "users to upgrade torch to at least v2.6 in order to use the function."
    ],
    "a Git LFS pointer was loaded": [
        "_pickle.UnpicklingError: invalid load key, 'v'.",
        "RuntimeError: Internal: src/sentencepiece_processor.cc(1101) [model_proto->ParseFromArray(serialized.data(), "
        "serialized.size())]",
    ],
    "weights cannot be loaded from the checkpoint": [
        "OSError: Unable to load weights from pytorch checkpoint file for "
        "'/data/chatglm-6b/pytorch_model-00003-of-00008."
        "bin' at '/data/chatglm-6b/pytorch_model-00003-of-00008.bin'.",
        "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    ],
    "a weight file is missing": [
        "OSError: Error no file named pytorch_model.bin, model.safetensors, tf_model.h5 found in directory /data/glm.",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/glm/pytorch_model-00007-of-00008.bin'",
    ],
    "icetk or protobuf": [
        "TypeError: Descriptors cannot not be created directly.\nIf this call came from a _pb2.py file, your generated "
        "code is out of date",
        "google.protobuf.runtime_version.VersionError: Detected incompatible Protobuf Gencode/Runtime versions",
    ],
    "the GPU's memory is used up": [
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 192.00 MiB (GPU 0; 7.93 GiB "
        "total capacity)",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
    "the machine's memory is used up": [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate "
        "memory: you tried to "
        "allocate 134217728 bytes.",
        "Loading checkpoint shards:  62%|██████▎   | 5/8 [00:41<00:22,  7.61s/it]Killed",
        """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
train_lora.py FAILED
  exitcode  : -9 (pid: 3811)
  traceback : Signal 9 (SIGKILL) received by PID 3811
""",
    ],
    "shared memory is used up": [
        "RuntimeError: DataLoader worker (pid 231) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
    ],
    "the disk is full": [
        "OSError: [Errno 28] No space left on device: 'output/lora/checkpoint-500/optimizer.pt'",
        "RuntimeError: [enforce fail at inline_container.cc:595] . unexpected pos 3200 vs 3094",
    ],
    "too many open files": ["OSError: [Errno 24] Too many open files: '/dev/shm/torch_1'"],
    "the card has no kernels in this torch": [
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "UserWarning: NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch "
        "installation.",
    ],
    "the driver is older than torch's CUDA": [
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    ],
    "torch has no CUDA": [
        "AssertionError: Torch not compiled with CUDA enabled",
        "RuntimeError: No CUDA GPUs are available",
    ],
    "the driver does not answer": [
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "Failed to initialize NVML: Driver/library version mismatch",
    ],
    "an index beyond its table on the GPU": [
        "../aten/src/ATen/native/cuda/Indexing.cu:1141: indexSelectLargeIndex: block: [11,0,0] Assertion `srcIndex < "
        "srcSelectDimSize` failed.\nRuntimeError: CUDA error: device-side assert triggered",
        "IndexError: index out of range in self",
    ],
    "tensors on different devices": [
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    ],
    "InvalidScoreLogitsProcessor, NaN or inf in probabilities": [
        "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"
    ],
    "a cuBLAS call failed": [
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ],
    "processes of the run lost each other": [
        "[rank1]:[E ProcessGroupNCCL.cpp:828] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=4812, OpType=ALLREDUCE, Timeout(ms)=1800000)",
        "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, "
        "unhandled system error",
    ],
    "the address is taken": [
        "OSError: [Errno 98] Address already in use",
        "RuntimeError: The server socket has failed to listen on any local network address. port: 29500, errno: 98, "
        "EADDRINUSE",
    ],
    "a certificate is not trusted": [
        "requests.exceptions.SSLError: (MaxRetryError(\"HTTPSConnectionPool(host='huggingface.co', "
        "port=443): Max retries "
        "exceeded\"), SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed'))"
    ],
    "the proxy fails": [
        "requests.exceptions.ProxyError: HTTPSConnectionPool(host='huggingface.co', port=443): Cannot connect to proxy."
    ],
    "Hugging Face cannot be reached": [
        "OSError: We couldn't connect to 'https://huggingface.co' to load this file, couldn't find it "
        "in the cached files",
        "OSError: Can't load tokenizer for 'THUDM/chatglm-6b'. If you were trying to load it from "
        "'huggingface.co/models'",
    ],
    "GLIBCXX is missing": [
        "ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.29' not found (required by "
        ".../scipy/linalg/_matfuncs.so)"
    ],
    "the system's C library is too old": [
        "ImportError: /lib64/libc.so.6: version `GLIBC_2.28' not found (required by .../torch/lib/libtorch_cpu.so)",
        "ERROR: No matching distribution found for torch>=2.11",
    ],
    "a CUDA library is missing": [
        "OSError: libcudart.so.12: cannot open shared object file: No such file or directory",
        "ImportError: .../torch/lib/libtorch_cuda.so: undefined symbol: ncclCommRegister",
    ],
    "torch itself is broken": [
        "ImportError: .../torch/lib/libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent",
        "AttributeError: module 'torch' has no attribute 'float8_e4m3fn'",
    ],
    "torchvision is of another torch": ["RuntimeError: operator torchvision::nms does not exist"],
    "numpy of another generation": [
        "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.4.6 as it may crash.",
        "ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, got 88",
    ],
    "two OpenMP runtimes": ["OMP: Error #15: Initializing libiomp5.so, but found libiomp5.so already initialized."],
    "apex is another program's": [
        "ImportError: cannot import name 'UnencryptedCookieSessionFactoryConfig' from 'pyramid.session' "
        "(unknown location)"
    ],
    "the processor lacks instructions": ["Illegal instruction (core dumped)"],
    "a process crashed": ["Segmentation fault (core dumped)", "exitcode  : -11 (pid: 5120)"],
    "no compiler for torch.compile": [
        "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: (None, 'g++')"
    ],
    "deepspeed's cpu_adam does not compile": [
        """\
/usr/bin/ld: cannot find -lcurand: No such file or directory
ninja: build stopped: subcommand failed.
RuntimeError: Error building extension 'cpu_adam'
Exception ignored in: <function DeepSpeedCPUAdam.__del__ at 0x7f2c3a1d9820>
AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'
"""
    ],
    "DeepSpeedCPUAdam has no ds_opt_adam": ["AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'"],
    "deepspeed cannot build its parts": [
        "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)"
    ],
    "a library is missing": ["ModuleNotFoundError: No module named 'sentencepiece'"],
    "data that are not UTF-8 or not JSON": [
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xd6 in position 0: invalid continuation byte",
        "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset",
    ],
    "permission denied": ["PermissionError: [Errno 13] Permission denied: '/data/output'"],
    "a tensor without data was copied": [
        "NotImplementedError: Cannot copy out of meta tensor; no data! Please use torch.nn.Module.to_empty() instead "
        "of torch.nn.Module.to() when moving module from meta to a different device.",
    ],
    "a process of torchrun ended": [
        """\
WARNING:torch.distributed.elastic.multiprocessing.api:Sending process 4120 closing signal SIGTERM
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
train_lora.py FAILED
"""
    ],
}
