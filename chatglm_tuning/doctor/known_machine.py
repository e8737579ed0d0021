"""Errors of memory, devices, disks, networks and installed libraries."""

from chatglm_tuning.doctor.known import KnownError, known

_LESS_MEMORY = (
    "Smaller: --quantization_bit 4, --per_device_train_batch_size 1 with more --gradient_accumulation_steps, "
    "--activation_checkpointing on, shorter --max_input_length and --max_output_length. What fits: "
    "`chatglm-tuning estimate --memory_gib N`",
    "减小用量：--quantization_bit 4，--per_device_train_batch_size 1 并加大 --gradient_accumulation_steps，"
    "--activation_checkpointing on，缩短 --max_input_length 和 --max_output_length。哪些设置放得下："
    "`chatglm-tuning estimate --memory_gib N`",
)
_FRESH = (
    "Install everything into a fresh environment: python3 -m venv fresh, then pip install -c constraints.txt -e . in a "
    "clone; `chatglm-tuning doctor` says what is wrong with the present one",
    "在新环境中全部重新安装：python3 -m venv fresh，再在克隆的仓库中 pip install -c constraints.txt -e .；"
    "`chatglm-tuning doctor` 会指出当前环境的问题",
)
_TORCH_BUILD = (
    "`chatglm-tuning doctor` compares card, driver and torch. Install the build of torch for the driver's CUDA, or "
    "update the driver; CUDA_VISIBLE_DEVICES= (empty) runs on the CPU",
    "`chatglm-tuning doctor` 会比较显卡、驱动和 torch。安装与驱动 CUDA 对应的 torch 构建，或更新驱动；"
    "CUDA_VISIBLE_DEVICES=（空）则在 CPU 上运行",
)
_HUB = (
    "Give a downloaded folder with --model_name_or_path, which needs no network. Otherwise set HF_ENDPOINT to a mirror, or "
    "HTTPS_PROXY to a proxy, before the command",
    "用 --model_name_or_path 给出已下载的文件夹，就不需要网络。否则在命令之前把 HF_ENDPOINT 设为镜像，或把 HTTPS_PROXY 设为代理",
)

MACHINE_ERRORS: tuple[KnownError, ...] = (
    known(
        "the GPU's memory is used up",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
        r"CUDNN_STATUS_ALLOC_FAILED",
        "X107",
        cause=(
            "Weights, activations and optimizer together, or another program on this card, fill its memory.",
            "权重、激活和优化器合计，或该显卡上的其他程序，占满了显存。",
        ),
        fix=(f"{_LESS_MEMORY[0]}. nvidia-smi shows other programs", f"{_LESS_MEMORY[1]}。nvidia-smi 显示其他程序"),
    ),
    known(
        "the machine's memory is used up",
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|\bMemoryError\b|Signal 9 \(SIGKILL\)|"
        r"exitcode ?: -9|exit code:? 137|\bKilled\b|oom[-_ ]?kill",
        "X107",
        cause=(
            "The RAM is used up, and the system refused more or killed the process.",
            "内存耗尽，系统拒绝再分配或直接结束了进程。",
        ),
        fix=_LESS_MEMORY,
    ),
    known(
        "shared memory is used up",
        r"bus error|insufficient shared memory|unable to (open|write to|mmap) (shared memory|file </torch_)|"
        r"/dev/shm.{0,60}No space",
        "X105",
        cause=(
            "/dev/shm is too small for processes that exchange tensors; containers begin with 64 MiB.",
            "/dev/shm 对交换张量的进程来说太小；容器默认只有 64 MiB。",
        ),
        fix=(
            "Start the container with --shm-size=8g (or --ipc=host), or train with --dataloader_num_workers 0.",
            "启动容器时加 --shm-size=8g（或 --ipc=host），或训练时用 --dataloader_num_workers 0。",
        ),
    ),
    known(
        "the disk is full",
        r"No space left on device|Errno 28|Disk quota exceeded|Errno 122|os error 28|file write failed|"
        r"unexpected pos \d+ vs \d+",
        "O102",
        cause=(
            "A disk or a quota is used up: that of the output, of the caches in ~/.cache, or of /tmp.",
            "磁盘或配额已用完：输出所在磁盘、~/.cache 中的缓存或 /tmp。",
        ),
        fix=(
            "`chatglm-tuning doctor --output_dir DIR` shows what is free where. --output_dir, --data_cache_dir, HF_HOME and "
            "TMPDIR choose other disks; --save_total_limit 2 keeps fewer checkpoints.",
            "`chatglm-tuning doctor --output_dir DIR` 显示各处剩余空间。--output_dir、--data_cache_dir、HF_HOME 和 TMPDIR 可改用"
            "别的磁盘；--save_total_limit 2 保留更少的检查点。",
        ),
    ),
    known(
        "too many open files",
        r"Too many open files|Errno 24\b|received 0 items of ancdata",
        "X105",
        cause=("The shell allows too few open files.", "当前 shell 允许打开的文件太少。"),
        fix=("ulimit -n 65536 before the command.", "在命令之前执行 ulimit -n 65536。"),
    ),
    known(
        "the card has no kernels in this torch",
        r"no kernel image is available for execution|not compatible with the current PyTorch installation|"
        r"CUDA error: invalid device function",
        "X104",
        cause=(
            "This build of torch has no kernels for the card: it is older, or newer, than those that the build is for.",
            "该 torch 构建没有这块显卡的内核：显卡比构建所支持的更旧或更新。",
        ),
        fix=_TORCH_BUILD,
    ),
    known(
        "the driver is older than torch's CUDA",
        r"NVIDIA driver on your system is too old|driver version is insufficient|forward compatibility was attempted|"
        r"CUDA driver initialization failed",
        "X104",
        cause=(
            "torch is built for a later CUDA than the driver runs.",
            "torch 构建所用的 CUDA 比驱动支持的新。",
        ),
        fix=_TORCH_BUILD,
    ),
    known(
        "torch has no CUDA",
        r"Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available|"
        r"deserialize object on a CUDA device but torch\.cuda\.is_available\(\) is False",
        "X104",
        cause=(
            "torch is a build for the CPU, or sees no driver or no card (a container without --gpus, "
            "CUDA_VISIBLE_DEVICES).",
            "torch 是仅 CPU 的构建，或看不到驱动或显卡（容器没有 --gpus，或 CUDA_VISIBLE_DEVICES）。",
        ),
        fix=_TORCH_BUILD,
    ),
    known(
        "the driver does not answer",
        r"couldn't communicate with the NVIDIA driver|Failed to initialize NVML|Driver/library version mismatch|"
        r"CUDA error: unknown error|CUDA unknown error",
        "X104",
        cause=(
            "The driver is not loaded, or was updated while the old one still runs.",
            "驱动没有加载，或驱动已更新而旧的仍在运行。",
        ),
        fix=(
            "Restart the machine (or reload the nvidia modules); a container, after its host.",
            "重启机器（或重新加载 nvidia 模块）；容器则在宿主机之后重启。",
        ),
    ),
    known(
        "an index beyond its table on the GPU",
        r"device-side assert triggered|indexSelectLargeIndex|Assertion `srcIndex < srcSelectDimSize`|"
        r"index out of range in self",
        "M112",
        cause=(
            "A token's id is beyond the embeddings, or a position beyond the context: the tokenizer is of another revision "
            "than the model, or a row is longer than 2048 tokens.",
            "token 编号超出词嵌入，或位置超出上下文：分词器与模型版本不同，或某行超过 2048 个 token。",
        ),
        fix=(
            "`chatglm-tuning doctor --model_name_or_path DIR` compares tokenizer and model; this program's commands cut rows "
            "at the context. CUDA_LAUNCH_BLOCKING=1 shows the true place of the error.",
            "`chatglm-tuning doctor --model_name_or_path DIR` 比较分词器与模型；本程序会按上下文截断。CUDA_LAUNCH_BLOCKING=1 可显示"
            "真正出错的位置。",
        ),
    ),
    known(
        "tensors on different devices",
        r"Expected all tensors to be on the same device",
        None,
        cause=(
            "The model and its input, or an adapter, lie on different devices: one was moved, the other not; or a model that "
            "device_map spread was moved again.",
            "模型与输入或适配器不在同一设备上：只移动了其中一个；或对 device_map 分布的模型又做了移动。",
        ),
        fix=(
            "The commands place everything themselves (--model_parallel spreads layers). In code of your own: "
            "inputs.to(model.device), and no .cuda() after device_map.",
            "本程序会自行放置（--model_parallel 分布各层）。自己的代码中：inputs.to(model.device)，使用 device_map 后不要再 .cuda()。",
        ),
    ),
    known(
        "InvalidScoreLogitsProcessor, NaN or inf in probabilities",
        r"probability tensor contains either `?inf`?, `?nan`?|InvalidScoreLogitsProcessor.{0,80}(nan|inf)",
        "T102",
        cause=(
            "The model computed NaN or infinity: numbers beyond fp16, or weights of a training that diverged.",
            "模型算出 NaN 或无穷大：数值超出 fp16，或权重来自发散的训练。",
        ),
        fix=(
            "--dtype float32 or bfloat16; if that gives the same, an earlier checkpoint.",
            "用 --dtype float32 或 bfloat16；结果相同时改用更早的检查点。",
        ),
    ),
    known(
        "a cuBLAS call failed",
        r"CUBLAS_STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR|INVALID_VALUE|NOT_SUPPORTED)|"
        r"CUDNN_STATUS_\w+",
        "X104",
        cause=(
            "Most often the GPU's memory was full when the library was set up; else libraries of another CUDA are found "
            "first through LD_LIBRARY_PATH, or an index was out of range before.",
            "多半是库初始化时显存已满；否则是 LD_LIBRARY_PATH 使另一个 CUDA 的库先被找到，或之前有越界的索引。",
        ),
        fix=(
            f"unset LD_LIBRARY_PATH, and less memory. {_LESS_MEMORY[0]}",
            f"unset LD_LIBRARY_PATH，并减少显存用量。{_LESS_MEMORY[1]}",
        ),
    ),
    known(
        "processes of the run lost each other",
        r"NCCL (error|operation .{0,80}tim|WARN)|Watchdog caught collective operation timeout|DistBackendError|"
        r"ncclSystemError|ncclUnhandledCudaError|ncclInternalError|Connection closed by peer|"
        r"Socket Timeout|DistStoreError|rendezvous.{0,60}(timed out|timeout)",
        "X108",
        cause=(
            "One process ended or hangs, and the others waited for it; or network, peer-to-peer links or /dev/shm do not "
            "work. Of several tracebacks the earliest is the cause.",
            "某个进程结束或卡住，其他进程在等它；或网络、显卡直连、/dev/shm 有问题。多个报错中最早的才是原因。",
        ),
        fix=(
            "Explain the earliest error. If there is none: one process first, then NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 where "
            "cards do not reach each other, NCCL_SOCKET_IFNAME for the right interface, a larger /dev/shm in containers.",
            "解释最早的那个错误。如果没有：先用一个进程，再用 NCCL_DEBUG=INFO；显卡不能直连时 NCCL_P2P_DISABLE=1，接口不对时 "
            "NCCL_SOCKET_IFNAME，容器中加大 /dev/shm。",
        ),
    ),
    known(
        "the address is taken",
        r"Address already in use|Errno 98\b|EADDRINUSE|Only one usage of each socket address|Cannot find empty port",
        "S102",
        cause=(
            "Another program listens on that port: an earlier server, or another torchrun on the usual port 29500.",
            "该端口已被另一个程序监听：旧的服务，或另一个使用默认端口 29500 的 torchrun。",
        ),
        fix=(
            "--port 0 takes a free one for web and serve; torchrun takes --master_port 29501. `ss -ltnp` shows who listens.",
            "web 和 serve 用 --port 0 选空闲端口；torchrun 用 --master_port 29501。`ss -ltnp` 显示占用者。",
        ),
    ),
    known(
        "a certificate is not trusted",
        r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|SSLError|self[- ]signed certificate|WRONG_VERSION_NUMBER|"
        r"UNEXPECTED_EOF_WHILE_READING",
        "M102",
        cause=(
            "A proxy or a firewall stands in the connection with a certificate of its own, or the proxy's address begins with "
            "https where it must be http.",
            "代理或防火墙用自己的证书介入了连接，或代理地址应为 http 却写成了 https。",
        ),
        fix=(
            f"{_HUB[0]}; SSL_CERT_FILE and REQUESTS_CA_BUNDLE name the certificate of your network",
            f"{_HUB[1]}；SSL_CERT_FILE 和 REQUESTS_CA_BUNDLE 指定所在网络的证书",
        ),
    ),
    known(
        "the proxy fails",
        r"ProxyError|Cannot connect to proxy|Unable to connect to proxy|Unknown scheme for proxy URL|socksio|"
        r"Missing dependencies for SOCKS support",
        "M102",
        cause=(
            "A proxy is set in the environment and does not answer, or is a SOCKS proxy that needs a library.",
            "环境变量设置了代理但它没有响应，或它是需要额外库的 SOCKS 代理。",
        ),
        fix=(
            f"unset HTTP_PROXY HTTPS_PROXY ALL_PROXY (also in small letters), or correct them. {_HUB[0]}",
            f"unset HTTP_PROXY HTTPS_PROXY ALL_PROXY（小写的也要），或改正它们。{_HUB[1]}",
        ),
    ),
    known(
        "Hugging Face cannot be reached",
        r"We couldn't connect to|LocalEntryNotFoundError|MaxRetryError|NewConnectionError|ConnectionError|ConnectTimeout|"
        r"ReadTimeout|Temporary failure in name resolution|Network is unreachable|OfflineModeIsEnabled|"
        r"Can't load (tokenizer|the configuration|config|the model) (for|of) |RepositoryNotFoundError|GatedRepoError|"
        r"is not a local folder and is not a valid model identifier",
        "M102",
        cause=(
            "The model was to be fetched from Hugging Face, and that cannot be reached, or has no such repository; or the "
            "path of a folder was misspelt and taken for a repository's name.",
            "要从 Hugging Face 获取模型，但无法连接或没有这个仓库；或文件夹路径写错，被当成了仓库名。",
        ),
        fix=_HUB,
    ),
    known(
        "GLIBCXX is missing",
        r"version `?'?(GLIBCXX|CXXABI)_[\d.]+'? not found",
        "X102",
        cause=(
            "An older libstdc++ than the libraries were built with is found first, often the system's before conda's.",
            "先找到的 libstdc++ 比各库构建时所用的旧，常见于系统的先于 conda 的。",
        ),
        fix=(
            "In conda: conda install -c conda-forge libstdcxx-ng, and export LD_LIBRARY_PATH=$CONDA_PREFIX/lib. Else a newer "
            "system, or a virtual environment of its Python.",
            "conda 中：conda install -c conda-forge libstdcxx-ng，再 export LD_LIBRARY_PATH=$CONDA_PREFIX/lib。否则换更新的系统，或"
            "用其 Python 建立虚拟环境。",
        ),
    ),
    known(
        "the system's C library is too old",
        r"version `?'?GLIBC_[\d.]+'? not found|is not a supported wheel on this platform|No matching distribution found "
        r"for torch",
        "X103",
        cause=(
            "The wheels are built for a newer Linux than this one, or for another version of Python.",
            "安装包是为更新的 Linux 或别的 Python 版本构建的。",
        ),
        fix=(
            "Use a newer system, or a container of one, with Python 3.11 or later.",
            "使用更新的系统或其容器，Python 3.11 或以上。",
        ),
    ),
    known(
        "a CUDA library is missing",
        r"lib(cudart|cublas|cublasLt|cudnn|nvrtc|cusparse|cusparseLt|nccl|cufft|curand|nvJitLink|cupti)\w*[-.\w]*\.so"
        r"[.\d]*: (cannot open shared object|undefined symbol|version)|undefined symbol: \w*(cublas|nvJitLink|cusparse|"
        r"ncclComm)\w*",
        "X102",
        cause=(
            "torch finds the CUDA libraries of another version, through LD_LIBRARY_PATH, or not at all, since they were "
            "removed or installed in part.",
            "torch 通过 LD_LIBRARY_PATH 找到了别的版本的 CUDA 库，或因被删除、只装了一部分而根本找不到。",
        ),
        fix=(
            f'unset LD_LIBRARY_PATH, and pip install --force-reinstall "torch>=2.11". {_FRESH[0]}',
            f'unset LD_LIBRARY_PATH，再 pip install --force-reinstall "torch>=2.11"。{_FRESH[1]}',
        ),
    ),
    known(
        "torch itself is broken",
        r"cannot import name '\w+' from (partially initialized module )?'torch|libtorch\w*\.so.{0,80}(cannot open|"
        r"undefined symbol)|iJIT_NotifyEvent|libmkl\w*\.so|Error loading \S*(c10|torch\w*|fbgemm)\.dll|"
        r"module 'torch' has no attribute|No module named 'torch\._",
        "X102",
        cause=(
            "Files of two versions of torch are mixed, one of its libraries (as MKL from conda) is another, or a file "
            "torch.py of your own is imported in its place.",
            "混有两个版本的 torch 文件，它的某个库（如 conda 的 MKL）是别的版本，或导入了自己的 torch.py 文件。",
        ),
        fix=_FRESH,
    ),
    known(
        "torchvision is of another torch",
        r"operator torchvision::nms does not exist|Could(n't| not) (load|find) .{0,40}torchvision|"
        r"Failed to import transformers\S* .{0,200}torchvision",
        "X106",
        cause=(
            "torchvision (or torchaudio) is built for another version of torch, and transformers imports it where it is "
            "installed.",
            "torchvision（或 torchaudio）是为另一个版本的 torch 构建的，而 transformers 会导入已安装的它。",
        ),
        fix=(
            "pip uninstall torchvision torchaudio, which this program does not need, or install those of the same release.",
            "pip uninstall torchvision torchaudio（本程序不需要），或安装同一发布的版本。",
        ),
    ),
    known(
        "numpy of another generation",
        r"compiled using NumPy 1\.x cannot be run|_ARRAY_API not found|numpy\.dtype size changed|Numpy is not available|"
        r"module 'numpy' has no attribute '(int|float|bool|object|complex)'|numpy\.core\.multiarray failed to import",
        "X106",
        cause=(
            "A library was built for, or written with, another major version of numpy than the one installed.",
            "某个库是为另一个大版本的 numpy 构建或编写的。",
        ),
        fix=(
            f'pip install "numpy>=2" and the current release of the library that the traceback names. {_FRESH[0]}',
            f'pip install "numpy>=2"，并更新报错中指出的库。{_FRESH[1]}',
        ),
    ),
    known(
        "two OpenMP runtimes",
        r"OMP: Error #15|libiomp5\w* already initialized|KMP_DUPLICATE_LIB_OK",
        "X106",
        cause=(
            "Two copies of the OpenMP runtime are loaded into one process, as from conda and from pip.",
            "同一进程加载了两份 OpenMP 运行库，例如分别来自 conda 和 pip。",
        ),
        fix=(
            f"Take numpy and torch from one source. KMP_DUPLICATE_LIB_OK=TRUE only hides it. {_FRESH[0]}",
            f"让 numpy 和 torch 来自同一来源。KMP_DUPLICATE_LIB_OK=TRUE 只是掩盖问题。{_FRESH[1]}",
        ),
    ),
    known(
        "apex is another program's",
        r"UnencryptedCookieSessionFactoryConfig",
        "X106",
        cause=(
            "`pip install apex` installed a web framework's package of that name, not NVIDIA's.",
            "`pip install apex` 安装的是一个同名的网页框架包，不是 NVIDIA 的。",
        ),
        fix=("pip uninstall apex: nothing here needs it.", "pip uninstall apex：本程序不需要它。"),
    ),
    known(
        "the processor lacks instructions",
        r"Illegal instruction|SIGILL",
        "X102",
        cause=(
            "A library uses instructions (AVX2, AVX-512) that this processor, or its virtual machine, has not.",
            "某个库使用了处理器或虚拟机没有的指令（AVX2、AVX-512）。",
        ),
        fix=(
            "Let the virtual machine pass the processor through (cpu host), or use another machine.",
            "让虚拟机直通处理器（cpu host），或换一台机器。",
        ),
    ),
    known(
        "a process crashed",
        r"Segmentation fault|SIGSEGV|Signal 11|exitcode ?: -11|core dumped",
        "X102",
        cause=(
            "A library crashed, mostly at its import: builds that do not fit each other.",
            "某个库崩溃，多半在导入时：各构建互不匹配。",
        ),
        fix=(
            f"`chatglm-tuning doctor` imports each in a process of its own and names it. {_FRESH[0]}",
            f"`chatglm-tuning doctor` 会在单独的进程中逐个导入并指出是哪个。{_FRESH[1]}",
        ),
    ),
    known(
        "no compiler for torch.compile",
        r"InvalidCxxCompiler|CppCompileError|InductorError.{0,200}(compiler|Python\.h)|Python\.h: No such file|"
        r"Failed to find C compiler|torch\._inductor\.exc",
        "X101",
        cause=(
            "torch.compile needs a C++ compiler, and Python's headers.",
            "torch.compile 需要 C++ 编译器和 Python 头文件。",
        ),
        fix=(
            "Install g++ and python3-dev with the system's package manager. The commands go on without, more slowly.",
            "用系统包管理器安装 g++ 和 python3-dev。没有它们时本程序仍可运行，只是更慢。",
        ),
    ),
    known(
        "deepspeed cannot build its parts",
        r"CUDA_HOME (does not exist|environment variable is not set)|MissingCUDAException|Unable to JIT load the \w+ op|"
        r"requires deepspeed|No module named 'deepspeed'|No module named 'mpi4py'",
        None,
        cause=(
            "DeepSpeed is not installed, or compiles parts of itself and finds no CUDA toolkit, or one of another version "
            "than torch's.",
            "没有安装 DeepSpeed，或它要编译自己的部件而找不到 CUDA 工具包，或工具包与 torch 的版本不同。",
        ),
        fix=(
            "It is only needed for full tuning with chatglm_6b_deepspeed.json: LoRA and P-Tuning take one GPU without it. "
            "Else pip install deepspeed, install the toolkit of torch.version.cuda, and set CUDA_HOME.",
            "只有用 chatglm_6b_deepspeed.json 全量微调才需要它：LoRA 和 P-Tuning 单卡即可。否则 pip install deepspeed，安装与 "
            "torch.version.cuda 相同的工具包，并设置 CUDA_HOME。",
        ),
    ),
    known(
        "a library is missing",
        r"ModuleNotFoundError: No module named|ImportError: .{0,80}requires the \w+ library but it was not found",
        "X101",
        cause=(
            "The library is not in the environment that runs the command; often another one's Python was started.",
            "运行命令的环境中没有这个库；常常是启动了另一个环境的 Python。",
        ),
        fix=(
            'Activate the right environment, then pip install "chatglm-tuning[all]", or pip install -c constraints.txt -e . '
            "in a clone. `chatglm-tuning doctor` lists what is missing.",
            '激活正确的环境，再 pip install "chatglm-tuning[all]"，或在克隆的仓库中 pip install -c constraints.txt -e .。'
            "`chatglm-tuning doctor` 会列出缺少的库。",
        ),
    ),
    known(
        "data that are not UTF-8 or not JSON",
        r"UnicodeDecodeError|JSONDecodeError|DatasetGenerationError|ArrowInvalid|pyarrow\.lib\.Arrow\w+Error",
        "D103",
        cause=(
            "A data or configuration file is damaged, of another encoding (GBK), or has rows of differing kinds.",
            "数据或配置文件损坏、编码不同（GBK），或各行类型不一致。",
        ),
        fix=(
            "`chatglm-tuning data check --data_path FILE --model_name_or_path DIR` names each such row; save files as UTF-8.",
            "`chatglm-tuning data check --data_path FILE --model_name_or_path DIR` 会指出每个有问题的行；文件请存为 UTF-8。",
        ),
    ),
    known(
        "permission denied",
        r"PermissionError|Errno 13\b|Permission denied",
        "O101",
        cause=(
            "This user may not read or write the file that is named.",
            "当前用户无权读写所指的文件。",
        ),
        fix=(
            "Give another --output_dir or --data_cache_dir, or set HF_HOME and CHATGLM_TUNING_CACHE; `chatglm-tuning doctor` "
            "shows which folders can be written.",
            "改用别的 --output_dir 或 --data_cache_dir，或设置 HF_HOME 和 CHATGLM_TUNING_CACHE；`chatglm-tuning doctor` 显示哪些"
            "文件夹可写。",
        ),
    ),
    known(
        "a process of torchrun ended",
        r"ChildFailedError|Sending process \d+ closing signal SIGTERM|elastic_launch",
        "X108",
        cause=(
            "One of the processes that torchrun started ended with an error, which stands above this message.",
            "torchrun 启动的某个进程出错结束，其错误在这条消息的上方。",
        ),
        fix=(
            "Paste the whole log, from the first traceback on.",
            "请粘贴完整日志，从第一个报错开始。",
        ),
    ),
)
