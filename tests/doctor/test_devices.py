"""Processor, compiler and GPUs: what the driver says against what torch says."""

import os
import shutil

import pytest

from chatglm_tuning.doctor.devices import cpu_findings, gpu_findings, has_kernels
from tests.doctor.fakes import fake_program

LISTED = "Tesla T4, 15000, 15360, 7.5, 535.104.05"
OVERVIEW = "| NVIDIA-SMI 535.104.05    Driver Version: 535.104.05    CUDA Version: 12.2     |"
GPU = {"name": "Tesla T4", "capability": [7, 5], "bytes": 15 << 30, "multiplies_bf16": False}
TORCH = {
    "version": "2.13.0",
    "cuda": "12.8",
    "hip": None,
    "is_available": True,
    "architectures": ["sm_75", "sm_80", "sm_90", "compute_90"],
    "gpus": [GPU],
}


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put an nvidia-smi in front of the path that lists these cards."""

    def place(listed: str = LISTED, overview: str = OVERVIEW) -> None:
        body = f"case \"$1\" in --query*) cat <<'X'\n{listed}\nX\n;; *) cat <<'X'\n{overview}\nX\n;; esac"
        monkeypatch.setenv("PATH", f"{fake_program(tmp_path, 'nvidia-smi', body)}{os.pathsep}{os.environ['PATH']}")

    return place


def lines(torch, environment=None) -> list[str]:
    return [finding.line for finding in gpu_findings(torch, environment or {})]


def test_a_card_that_torch_uses_is_well(driver):
    driver()
    assert lines(TORCH) == [
        "ok       gpu: Tesla T4, 14.6 of 15.0 GiB free",
        "ok       torch: 2.13.0 (CUDA 12.8) uses Tesla T4 and computes in float16",
    ]


def test_without_a_driver_there_is_nothing_to_complain_of(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lines(TORCH | {"gpus": []}) == ["ok       gpu: no NVIDIA driver; runs take the CPU"]
    assert lines({}) == ["ok       gpu: no NVIDIA driver; runs take the CPU"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cuda": None}, "problem  torch: 2.13.0 is built without CUDA, and there is a GPU (Tesla T4)"),
        ({"cuda": "13.0", "is_available": False}, "built for CUDA 13.0, and driver 535.104.05 runs CUDA 12.2 at most"),
        (
            {"is_available": False, "error": "RuntimeError: CUDA unknown error"},
            "GPU (RuntimeError: CUDA unknown error)",
        ),
        (
            {"architectures": ["sm_80", "sm_90"]},
            "has no kernels for Tesla T4 (compute capability 7.5; it has sm_80, sm_90",
        ),
    ],
    ids=["cpu build", "newer CUDA", "not available", "no kernels"],
)
def test_a_torch_that_does_not_fit_the_card(changes, says, driver):
    driver()
    last = lines(TORCH | changes)[-1]
    assert last.startswith("problem  torch: ")
    assert says in last
    assert last.endswith("[X104]")


def test_a_minor_version_of_cuda_beyond_the_drivers_is_no_problem(driver):
    driver()
    assert lines(TORCH | {"cuda": "12.9"})[-1].startswith("ok ")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_told(hidden, driver):
    driver()
    last = lines(TORCH | {"is_available": False, "gpus": []}, {"CUDA_VISIBLE_DEVICES": hidden})[-1]
    assert last.startswith(f"warning  gpu: CUDA_VISIBLE_DEVICES={hidden!r} hides all of them")


def test_where_torch_is_broken_the_driver_is_told_alone(driver):
    driver()
    assert lines({}) == ["ok       gpu: Tesla T4, 14.6 of 15.0 GiB free"]


def test_memory_that_another_program_holds_is_told(driver):
    driver(listed="Tesla T4, 2000, 15360, 7.5, 535.104.05")
    assert lines(TORCH)[0].startswith("warning  gpu: Tesla T4, 2.0 of 15.0 GiB free: another program holds the rest")


def test_a_driver_that_fails_is_a_problem(tmp_path, monkeypatch):
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    fake_program(tmp_path, "nvidia-smi", f'echo "{said}"; exit 9')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (line,) = lines(TORCH)
    assert line.startswith(f"problem  gpu: nvidia-smi fails ({said})")


def test_output_in_another_form_is_no_error(driver):
    driver(listed="No devices were found", overview="")
    assert lines(TORCH) == []


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["gfx90a"], False),
    ],
)
def test_which_cards_have_kernels(capability, architectures, expected):
    assert has_kernels(capability, architectures) is expected


@pytest.mark.parametrize(
    ("flags", "torch", "says"),
    [
        ("fpu avx avx2 avx512_bf16 amx_bf16", {}, "computes in bfloat16 (avx512_bf16, amx_bf16)"),
        ("fpu avx avx2", {}, "computes in float32"),
        ("fpu avx avx2 avx512_bf16", {"multiplies_bf16": False}, "computes in float32"),
        ("fpu avx avx2", {"multiplies_bf16": True}, "computes in bfloat16 (as torch says)"),
    ],
)
def test_what_the_processor_computes_in(flags, torch, says, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: {flags}\n", encoding="utf-8")
    first = next(iter(cpu_findings(torch, info)))
    assert first.status == "ok"
    assert says in first.what


def test_a_processor_without_avx2_is_told(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fpu avx\n", encoding="utf-8")
    assert [finding.status for finding in cpu_findings({}, info)][1] == "warning"


def test_a_missing_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    last = list(cpu_findings({}))[-1]
    assert last.line.startswith("warning  compiler: there is no C++ compiler (g++, clang++)")
    shutil.copy("/bin/true", tmp_path / "clang++")
    assert list(cpu_findings({}))[-1].line == "ok       compiler: clang++"
