"""Errors of ChatGLM-6B's own code, of its scripts, and of the versions of transformers and peft beneath them."""

from chatglm_tuning.doctor.known import KnownError, known

_OLD_CODE = (
    "The code that comes with the model was written for transformers 4.27 to 4.33",
    "模型自带的代码是为 transformers 4.27 至 4.33 编写的",
)
_USE_COMMANDS = (
    "Use this program's commands, which do not run that code: chatglm-tuning chat, train-lora, train-ptuning. To keep "
    "another program that needs it, give that an environment of its own with transformers 4.27.1 to 4.33.2",
    "改用本程序的命令，它们不运行那些代码：chatglm-tuning chat、train-lora、train-ptuning。如果别的程序必须使用它，请给那个程序单独的"
    "环境，安装 transformers 4.27.1 至 4.33.2",
)
_REVISIONS = (
    "Download all files of the final revision of THUDM/chatglm-6b into an empty folder (vocab_size 130528), and look at "
    "it with `chatglm-tuning doctor --model_name_or_path DIR`",
    "把 THUDM/chatglm-6b 最终版本（vocab_size 130528）的全部文件下载到空文件夹，再用 "
    "`chatglm-tuning doctor --model_name_or_path DIR` 检查",
)

ORIGINAL_ERRORS: tuple[KnownError, ...] = (
    known(
        "ChatGLMTokenizer has no sp_tokenizer",
        r"ChatGLM\w*Tokenizer'? object has no attribute '(sp_tokenizer|tokenizer)'",
        "X103",
        cause=(
            f"{_OLD_CODE[0]}; since 4.34 the base class asks for the vocabulary before that code has set it up.",
            f"{_OLD_CODE[1]}；从 4.34 起，基类在那段代码准备好词表之前就要使用词表。",
        ),
        fix=_USE_COMMANDS,
    ),
    known(
        "_pad() got padding_side",
        r"_pad\(\) got an unexpected keyword argument '?padding_side",
        "X103",
        cause=(
            f"{_OLD_CODE[0]}; since 4.45 the padding of a tokenizer is called with one argument more.",
            f"{_OLD_CODE[1]}；从 4.45 起，调用分词器的填充函数时多了一个参数。",
        ),
        fix=_USE_COMMANDS,
    ),
    known(
        "the model has no _extract_past_from_model_output",
        r"ChatGLM\w*'? object has no attribute '_extract_past_from_model_output'",
        "X103",
        cause=(
            f"{_OLD_CODE[0]}; since 4.49 generation no longer has the function that this code calls.",
            f"{_OLD_CODE[1]}；从 4.49 起，生成部分不再有这段代码所调用的函数。",
        ),
        fix=_USE_COMMANDS,
    ),
    known(
        "the model cannot generate",
        r"ChatGLM\w*'? object has no attribute '(generate|_setup_cache|stream_generate)'"
        r"|ChatGLM\w* has generative capabilities.{0,200}GenerationMixin",
        "X103",
        cause=(
            f"{_OLD_CODE[0]}; since 4.50 a model no longer inherits generation by itself.",
            f"{_OLD_CODE[1]}；从 4.50 起，模型不再自动继承生成功能。",
        ),
        fix=_USE_COMMANDS,
    ),
    known(
        "GenerationConfig has no _eos_token_tensor",
        r"GenerationConfig'? object has no attribute '_eos_token_tensor'",
        "X103",
        cause=(
            f"{_OLD_CODE[0]}; it takes over a part of generation that changed in 4.41.",
            f"{_OLD_CODE[1]}；它接管的生成部分在 4.41 中已改变。",
        ),
        fix=_USE_COMMANDS,
    ),
    known(
        "KeyError: 'chatglm'",
        r"KeyError: '?chatglm'?\b|model type `?'?chatglm`?'? but Transformers does not recognize",
        "X103",
        cause=(
            "transformers itself does not know the model type chatglm: its code was neither loaded from the folder "
            "(trust_remote_code) nor registered, or this transformers is too old to do the first.",
            "transformers 本身不认识 chatglm 这种模型：既没有从文件夹加载代码（trust_remote_code），也没有注册；或者 "
            "transformers 太旧，不支持前者。",
        ),
        fix=(
            "From Python write `import chatglm_tuning.model` before AutoModel or AutoTokenizer, which registers the model; "
            "or use the commands. In other programs: trust_remote_code=True and transformers 4.27.1 or later.",
            "在 Python 中，使用 AutoModel、AutoTokenizer 之前先 `import chatglm_tuning.model`，它会注册该模型；或使用本程序的命令。"
            "在别的程序中：trust_remote_code=True，且 transformers 不低于 4.27.1。",
        ),
    ),
    known(
        "Unrecognized configuration class ChatGLMConfig",
        r"Unrecognized configuration class .{0,200}ChatGLMConfig",
        "X103",
        cause=(
            "The wrong Auto class was used (the model is registered by its folder for AutoModel, not for "
            "AutoModelForCausalLM), or files of the folder are missing that say so.",
            "用错了 Auto 类（模型文件夹只为 AutoModel 注册，而不是 AutoModelForCausalLM），或文件夹中缺少说明这一点的文件。",
        ),
        fix=(
            "`import chatglm_tuning.model` and then AutoModel; or use the commands of this program.",
            "先 `import chatglm_tuning.model`，再用 AutoModel；或使用本程序的命令。",
        ),
    ),
    known(
        "trust_remote_code is asked for",
        r"requires you to execute the (configuration|modeling|tokenizer|model)? ?file|contains custom code which must be "
        r"executed|option `?trust_remote_code=True`? to remove this error",
        None,
        cause=(
            "transformers would run the code in the model's folder, and refuses without trust_remote_code.",
            "transformers 需要运行模型文件夹中的代码，没有 trust_remote_code 就拒绝。",
        ),
        fix=(
            "That code is not needed: `import chatglm_tuning.model` registers the model, and the commands use no remote "
            "code at all.",
            "不需要那些代码：`import chatglm_tuning.model` 会注册模型，本程序的命令完全不使用远程代码。",
        ),
    ),
    known(
        "AutoTokenizer does not know ChatGLMTokenizer",
        r"Tokenizer class ChatGLMTokenizer does not exist or is not currently imported",
        None,
        cause=(
            "The tokenizer was neither registered nor loaded from the folder's own code.",
            "分词器没有注册，也没有从文件夹自带的代码加载。",
        ),
        fix=(
            "`import chatglm_tuning.model` before AutoTokenizer.from_pretrained.",
            "在 AutoTokenizer.from_pretrained 之前 `import chatglm_tuning.model`。",
        ),
    ),
    known(
        "the model has no prefix_encoder",
        r"ChatGLM\w*'? object has no attribute 'prefix_encoder'",
        None,
        cause=(
            "The original's P-Tuning script met code of the model from before P-Tuning, or a configuration without "
            "pre_seq_len.",
            "原来的 P-Tuning 脚本遇到了 P-Tuning 之前的模型代码，或配置中没有 pre_seq_len。",
        ),
        fix=(
            "chatglm-tuning train-ptuning --pre_seq_len 128 makes the prefix itself. With the original's scripts: replace "
            "all files but the weights by those of the final revision.",
            "chatglm-tuning train-ptuning --pre_seq_len 128 会自己建立前缀。使用原来的脚本时：把权重以外的文件全部换成最终版本。",
        ),
    ),
    known(
        "the model has no enable_input_require_grads",
        r"object has no attribute 'enable_input_require_grads'",
        "X103",
        cause=("transformers is older than 4.27.", "transformers 低于 4.27。"),
        fix=(
            'pip install "transformers==5.23.*" for this program; 4.27.1 for the original\'s scripts.',
            '本程序：pip install "transformers==5.23.*"；原来的脚本：4.27.1。',
        ),
    ),
    known(
        "the model or its configuration has no such attribute",
        r"ChatGLM(Config|Model|ForConditionalGeneration)'? object has no attribute",
        "M105",
        cause=(
            "Code and files of different generations were mixed: a script for ChatGLM-6B with the folder of ChatGLM2 or "
            "ChatGLM3, or code of the model that is older or newer than its config.json or than transformers.",
            "混用了不同代的代码和文件：ChatGLM-6B 的脚本配了 ChatGLM2 或 ChatGLM3 的文件夹，或模型代码比 config.json 或 "
            "transformers 旧或新。",
        ),
        fix=_REVISIONS,
    ),
    known(
        "150001 or 130001 is not in list",
        r"ValueError: 1[35]000[0-4] is not in list",
        "M112",
        cause=(
            "The tokenizer and the model's code number the special tokens differently (the first revision has 150001 for "
            "[gMASK], the final one 130001); or a text was cut so that [gMASK] fell off, or holds [MASK] itself.",
            "分词器与模型代码的特殊 token 编号不同（第一版 [gMASK] 为 150001，最终版为 130001）；或文本截断时丢掉了 [gMASK]，"
            "或文本中含有 [MASK]。",
        ),
        fix=(
            f"{_REVISIONS[0]}. The commands of this program cut around [gMASK], and take a literal [MASK] as text.",
            f"{_REVISIONS[1]}。本程序截断时总保留 [gMASK]，文本中的 [MASK] 按普通文字处理。",
        ),
    ),
    known(
        "the embeddings have 150528 rows",
        r"size mismatch for (transformer\.word_embeddings|lm_head)\.weight.{0,200}1[35]0528",
        "M112",
        cause=(
            "Weights of one revision meet config.json of another (150528 words in the first, 130528 in the final one).",
            "一个版本的权重遇到另一个版本的 config.json（第一版词表 150528，最终版 130528）。",
        ),
        fix=_REVISIONS,
    ),
    known(
        "a prefix of another size",
        r"loading state_dict for PrefixEncoder|size mismatch for (transformer\.)?(prefix_encoder\.)?embedding\.weight",
        "C109",
        cause=(
            "The checkpoint holds a prefix of another length, or one with projection where none is asked for (a table of "
            "4096 columns is projected, one of 229376 is not), or the other way round.",
            "检查点中的前缀长度不同，或一个带投影一个不带（表宽 4096 为带投影，229376 为不带）。",
        ),
        fix=(
            "Leave --pre_seq_len and --prefix_projection out: this program reads both from the folder. In the original's "
            "scripts give PRE_SEQ_LEN, and prefix_projection, as in training.",
            "不要给 --pre_seq_len 和 --prefix_projection：本程序从文件夹读取。原来的脚本中，PRE_SEQ_LEN 和 prefix_projection 要与"
            "训练时一致。",
        ),
    ),
    known(
        "a LoRA of another base or rank",
        r"loading state_dict for (PeftModel\w*|Lora\w*)|size mismatch for base_model\.model\..{0,200}lora_",
        "C106",
        cause=(
            "The LoRA was trained on another base model, or with another rank or other targets than its configuration says.",
            "LoRA 是在另一个模型上训练的，或其秩、作用层与配置不符。",
        ),
        fix=(
            "Give the base that `base_model` in the adapter's chatglm_tuning.json names, and keep adapter_config.json and "
            "the weights of one folder together.",
            "给出适配器 chatglm_tuning.json 中 `base_model` 所写的模型，并保证 adapter_config.json 与权重来自同一文件夹。",
        ),
    ),
    known(
        "the weights do not fit the model",
        r"Error\(s\) in loading state_dict for",
        "M119",
        cause=(
            "Names or shapes of the tensors are not those of the model that was built: files of two models or revisions "
            "are mixed.",
            "张量的名称或形状与所建模型不符：混用了两个模型或版本的文件。",
        ),
        fix=_REVISIONS,
    ),
    known(
        "cpm_kernels finds no CUDA",
        r"Library (cudart|cuda|cublasLt|cublas|nvrtc) is not initialized|quantization_kernels?\b.{0,120}(fail|cannot|"
        r"not compiled)",
        None,
        cause=(
            "The released quantisation uses cpm_kernels, which looks for the CUDA toolkit of the system and does not find "
            "it; torch's own CUDA does not help it.",
            "官方量化使用 cpm_kernels，它要找系统的 CUDA 工具包而没有找到；torch 自带的 CUDA 对它无用。",
        ),
        fix=(
            "Here --quantization_bit 4 or 8 needs neither cpm_kernels nor a toolkit: chatglm-tuning chat --quantization_bit "
            "4. For the released code install the CUDA toolkit (or `conda install cudatoolkit`).",
            "本程序的 --quantization_bit 4 或 8 既不需要 cpm_kernels，也不需要工具包：chatglm-tuning chat --quantization_bit 4。"
            "官方代码则要安装 CUDA 工具包（或 `conda install cudatoolkit`）。",
        ),
    ),
    known(
        "the kernels of the released quantisation were not compiled",
        r"'NoneType' object has no attribute 'int[48]Weight\w+'|Failed to load cpm_kernels|Cannot load cpu kernel"
        r"|name 'round_up' is not defined",
        None,
        cause=(
            "The released int4 code compiles kernels with gcc, or loads them with cpm_kernels, and neither was there.",
            "官方 int4 代码要用 gcc 编译内核，或用 cpm_kernels 加载，而两者都没有。",
        ),
        fix=(
            "This program needs neither: chatglm-tuning chat --model_name_or_path DIR reads the int4 folder as it is. For "
            "the released code: pip install cpm_kernels, and gcc with OpenMP for the CPU.",
            "本程序两者都不需要：chatglm-tuning chat --model_name_or_path DIR 直接读取 int4 文件夹。官方代码则需要 "
            "pip install cpm_kernels，CPU 上还需要带 OpenMP 的 gcc。",
        ),
    ),
    known(
        "fp16 on a CPU",
        r"\"?(addmm_impl_cpu_|slow_conv2d_cpu|baddbmm_cpu\w*|LayerNormKernelImpl|softmax_lastdim_kernel_impl|"
        r"mul_cpu_reduced\w*)\"? not implemented for '?Half",
        "T102",
        cause=(
            "The model was put into fp16 (.half()) and computes on a CPU, on which that torch has no fp16 products: there "
            "is no GPU, or torch does not see it.",
            "模型是 fp16（.half()）而在 CPU 上计算，该版本 torch 在 CPU 上没有 fp16 乘法：没有显卡，或 torch 看不到它。",
        ),
        fix=(
            "This program takes bf16 or fp32 on a CPU by itself. With other code use .float() or .bfloat16(). If there is a "
            "GPU, `chatglm-tuning doctor` says why torch does not use it.",
            "本程序在 CPU 上会自动使用 bf16 或 fp32。别的代码请用 .float() 或 .bfloat16()。如果有显卡，`chatglm-tuning doctor` "
            "会说明 torch 为何没有使用它。",
        ),
    ),
    known(
        "two floating types meet",
        r"expected scalar type (Half|Float|BFloat16) but found (Half|Float|BFloat16)|expected m1 and m2 to have the same "
        r"dtype|mat1 and mat2 must have the same dtype|should be the same: .{0,40}(Half|BFloat16)",
        None,
        cause=(
            "A part of the model is in fp16 and another in fp32: an adapter or the head was loaded in fp32 beside a base in "
            "fp16, and there was no autocast around the computation.",
            "模型一部分是 fp16、另一部分是 fp32：fp16 模型旁加载了 fp32 的适配器或输出头，计算时又没有 autocast。",
        ),
        fix=(
            "The commands keep types together: give the adapter with --lora_checkpoint, and --dtype if you want another. In "
            "code of your own: model.half() after the adapter is loaded, or torch.autocast around training.",
            "本程序会保持类型一致：用 --lora_checkpoint 给出适配器，需要别的类型时给 --dtype。自己的代码中：加载适配器之后再 "
            "model.half()，训练时用 torch.autocast。",
        ),
    ),
    known(
        "FP16 gradients cannot be unscaled",
        r"Attempting to unscale FP16 gradients",
        None,
        cause=(
            "What is trained is itself in fp16, and the gradient scaler of fp16 training needs it in fp32.",
            "被训练的参数本身是 fp16，而 fp16 训练的梯度缩放要求它们是 fp32。",
        ),
        fix=(
            "train-lora and train-ptuning keep what they train in fp32. In code of your own convert the trained parameters "
            "with .float(), or use bf16.",
            "train-lora 和 train-ptuning 会把被训练的参数保持为 fp32。自己的代码中请对它们调用 .float()，或使用 bf16。",
        ),
    ),
    known(
        "the loss depends on nothing that is trained",
        r"element 0 of tensors does not require grad and does not have a grad_fn",
        None,
        cause=(
            "Gradient checkpointing cut the graph between frozen embeddings and the adapter, or no parameter is trained.",
            "梯度检查点切断了冻结的词嵌入与适配器之间的计算图，或没有任何参数被训练。",
        ),
        fix=(
            "The commands take care of that. In code of your own: model.enable_input_require_grads() before "
            "gradient_checkpointing, or use_reentrant=False.",
            "本程序已处理好。自己的代码中：启用 gradient_checkpointing 前调用 model.enable_input_require_grads()，或 "
            "use_reentrant=False。",
        ),
    ),
    known(
        "peft is older than the adapter",
        r"(LoraConfig|PeftConfig)\.__init__\(\) got an unexpected keyword argument",
        "X103",
        cause=(
            "adapter_config.json was written by a later peft than the one that reads it.",
            "adapter_config.json 由比当前更新的 peft 写出。",
        ),
        fix=(
            'pip install "peft>=0.21,<0.22" for this program. For peft 0.3, `chatglm-tuning export --format original` writes '
            "a folder without later keys.",
            '本程序：pip install "peft>=0.21,<0.22"。给 peft 0.3 使用时，`chatglm-tuning export --format original` 会写出没有新键的'
            "文件夹。",
        ),
    ),
    known(
        "peft and transformers do not fit",
        r"cannot import name '\w+' from 'transformers|cannot import name '\w+' from 'peft|No module named "
        r"'transformers\.(deepspeed|modeling_layers|cache_utils|integrations\w*)|cannot import name '\w+' from "
        r"'accelerate",
        "X103",
        cause=(
            "peft, transformers and accelerate are of times that do not fit each other: one asks another for something that "
            "is not there yet, or no longer.",
            "peft、transformers 和 accelerate 的版本不配套：其中一个要用另一个还没有或已删除的东西。",
        ),
        fix=(
            "Install them together: pip install -c constraints.txt -e . in a clone; `chatglm-tuning doctor` names the one "
            "that is out of line.",
            "一起安装：在克隆的仓库中 pip install -c constraints.txt -e .；`chatglm-tuning doctor` 会指出不配套的那个。",
        ),
    ),
    known(
        "Trainer does not know an argument",
        r"(Seq2Seq)?Train(er|ingArguments)\.__init__\(\) got an unexpected keyword argument",
        "X103",
        cause=(
            "A script or an argument file of an older transformers: names as evaluation_strategy, tokenizer or "
            "no_cuda are gone from Trainer.",
            "脚本或参数文件属于旧版 transformers：evaluation_strategy、tokenizer、no_cuda 等名称已从 Trainer 中删除。",
        ),
        fix=(
            "The commands translate the old keys of --train_args_file. In code of your own use the new names "
            "(eval_strategy, processing_class, use_cpu).",
            "本程序会转换 --train_args_file 中的旧键。自己的代码请用新名称（eval_strategy、processing_class、use_cpu）。",
        ),
    ),
    known(
        "bitsandbytes",
        r"CUDA Setup failed despite|bitsandbytes\S* .{0,80}(not compiled|was not found|requires? )|No package metadata was "
        r"found for bitsandbytes|libbitsandbytes_\w+",
        "X106",
        cause=(
            "load_in_8bit and load_in_4bit of transformers need bitsandbytes with a build for this CUDA.",
            "transformers 的 load_in_8bit 和 load_in_4bit 需要与 CUDA 对应的 bitsandbytes。",
        ),
        fix=(
            "This program does not use it: --load_in_8bit is the same as --quantization_bit 8 here. pip uninstall "
            "bitsandbytes if its import alone fails.",
            "本程序不使用它：这里的 --load_in_8bit 等同于 --quantization_bit 8。如果仅导入就失败，请 pip uninstall bitsandbytes。",
        ),
    ),
    known(
        "torch.load refuses the file",
        r"Weights only load failed|Unsupported (global|operand).{0,200}weights_only|weights_only.{0,80}WeightsUnpickler",
        "M118",
        cause=(
            "The file holds more than plain tensors, which torch 2.6 and later do not load, since it could run code.",
            "文件中不只有张量，torch 2.6 及以后不会加载，因为它可能执行代码。",
        ),
        fix=(
            "Save the state dict alone in the program that wrote it: torch.save(model.state_dict(), ...), or as safetensors.",
            "在生成它的程序中只保存 state dict：torch.save(model.state_dict(), ...)，或存为 safetensors。",
        ),
    ),
    known(
        "torch.load needs torch 2.6",
        r"serious vulnerability issue in `?torch\.load|upgrade torch to at least v2\.6",
        "X103",
        cause=(
            "transformers reads .bin files with torch 2.6 or later only (CVE-2025-32434).",
            "transformers 只在 torch 2.6 及以后读取 .bin 文件（CVE-2025-32434）。",
        ),
        fix=(
            'pip install "torch>=2.11", which this program needs anyway.',
            '安装本程序本来就需要的版本：pip install "torch>=2.11"。',
        ),
    ),
    known(
        "a Git LFS pointer was loaded",
        r"invalid load key, '?v|UnpicklingError.{0,40}invalid load key|expected a SentencePiece|"
        r"(sentencepiece_processor\.cc.{0,160}ParseFromArray)",
        "M115",
        cause=(
            "The file is a text of three lines that Git LFS puts in the place of the weights or of the tokenizer; or the "
            "download was cut off.",
            "该文件是 Git LFS 代替权重或分词器的三行文字，或下载不完整。",
        ),
        fix=(
            "`git lfs install` and `git lfs pull` in the model's folder, or download the files one by one; then "
            "`chatglm-tuning doctor --model_name_or_path DIR`.",
            "在模型文件夹中执行 `git lfs install` 和 `git lfs pull`，或逐个下载；然后 "
            "`chatglm-tuning doctor --model_name_or_path DIR`。",
        ),
    ),
    known(
        "weights cannot be loaded from the checkpoint",
        r"Unable to load weights from (pytorch|safetensors) checkpoint|MetadataIncompleteBuffer|HeaderTooLarge|"
        r"InvalidHeader|failed finding central directory|PytorchStreamReader failed|unexpected EOF, expected \d+ more bytes",
        "M116",
        cause=(
            "A weight file is cut off or damaged: its end, where the directory lies, or its header does not fit its size.",
            "某个权重文件不完整或损坏：目录所在的末尾缺失，或文件头与大小不符。",
        ),
        fix=(
            "`chatglm-tuning doctor --model_name_or_path DIR` names the file; delete it and download it again.",
            "`chatglm-tuning doctor --model_name_or_path DIR` 会指出是哪个文件；删除后重新下载。",
        ),
    ),
    known(
        "a weight file is missing",
        r"does not appear to have (a file named|files? named) \S*(pytorch_model|model\S*safetensors)|no file named "
        r"(pytorch_model\.bin|model\.safetensors).{0,120}found in directory|No such file or directory: "
        r"'[^']*(pytorch_model|model)-\d+-of-\d+",
        "M114",
        cause=(
            "The folder lacks a weight file that its index names, or all of them.",
            "文件夹中缺少索引所列的某个权重文件，或全部缺失。",
        ),
        fix=(
            "Download the missing files under their exact names; `chatglm-tuning doctor --model_name_or_path DIR` lists them.",
            "按原名下载缺少的文件；`chatglm-tuning doctor --model_name_or_path DIR` 会列出它们。",
        ),
    ),
    known(
        "icetk or protobuf",
        r"Descriptors cannot (not )?be created directly|Detected incompatible Protobuf Gencode|No module named 'icetk'|"
        r"cannot import name 'builder' from 'google\.protobuf|Protocol Buffers.{0,40}generated code is out of date",
        "X106",
        cause=(
            "protobuf is of another generation than what was generated for it. The first code of ChatGLM-6B brought icetk, "
            "which holds protobuf below 3.19; TensorBoard needs a late one.",
            "protobuf 与为它生成的代码不属于同一代。ChatGLM-6B 最早的代码带来 icetk，它把 protobuf 限制在 3.19 以下，而 "
            "TensorBoard 需要新版。",
        ),
        fix=(
            'pip uninstall icetk, then pip install "protobuf>=6.31". This program needs no icetk.',
            'pip uninstall icetk，再 pip install "protobuf>=6.31"。本程序不需要 icetk。',
        ),
    ),
)
