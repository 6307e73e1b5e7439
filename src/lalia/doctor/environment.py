"""``doctor env``: what is installed, and which device each component really uses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import av
import numpy as np
import soundfile
import torch

from lalia.doctor.report import Report
from lalia.pretrained import sources

#: extra of pip → the modules it brings
EXTRAS: dict[str, list[str]] = {
    "asr": ["pocketsphinx"],
    "synth": ["espeakng_loader"],
    "hub": ["huggingface_hub", "modelscope"],
    "bench": ["monotonic_alignment_search"],
    "serve": ["fastapi", "uvicorn", "python_multipart", "gradio"],
    "lora": ["peft"],
    "gguf": ["gguf"],
    "wandb": ["wandb"],
}
AV_CODECS = ["g722", "opus", "aac", "mp3"]
DISK_GB = 2.0  # a demo run and its checkpoints


@dataclass
class Component:
    """One library: its version, the device or formats that were tried and worked, and what is wrong with it."""

    name: str
    version: str
    uses: str
    note: str = ""


@dataclass
class EnvReport(Report):
    """``missing_extras``: extra → the pip line that installs it; ``mirrors``: where models and packages come from."""

    python: str = ""
    system: str = ""
    cores: int = 0
    torch_threads: int = 0
    memory_gb: float = 0.0
    memory_free_gb: float = 0.0
    disk_free_gb: float = 0.0
    components: list[Component] = field(default_factory=list)
    missing_extras: dict[str, str] = field(default_factory=dict)
    mirrors: dict[str, str] = field(default_factory=dict)


def doctor_env(folder: str = ".") -> EnvReport:
    """Try every component, on the device it would use in a run. ``folder`` is where runs are going to be written."""
    total, free = _memory()
    report = EnvReport(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        memory_gb=total,
        memory_free_gb=free,
        disk_free_gb=round(shutil.disk_usage(folder).free / 1e9, 1),
    )
    for probe in (_torch, _numba, _soundfile, _av, _onnx):
        found = probe()
        report.components.append(found)
        if found.note:
            report.warnings.append(f"{found.name}: {found.note}")
    for name in ("numpy", "pyarrow", "soxr", "transformers", "safetensors"):
        report.components.append(Component(name, _version(name), "cpu"))
        if not _version(name):
            report.problems.append(f"{name} is not installed: pip install {name}")
    report.missing_extras, report.mirrors = missing_extras(), sources.in_force()
    if report.disk_free_gb < DISK_GB:
        report.problems.append(
            f"{report.disk_free_gb} GB free in {os.path.abspath(folder)}; a run needs about {DISK_GB:g}"
        )
    return report


def missing_extras(has: Callable[[str], bool] | None = None) -> dict[str, str]:
    """Extra → pip line, for those of which a module cannot be found. ``has`` says whether a module is there."""
    has = has or _has
    return {extra: f"pip install 'lalia[{extra}]'" for extra, names in EXTRAS.items() if not all(map(has, names))}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> Component:
    """A product on the device that ``auto`` takes; a card that this build of torch cannot use is worth a note."""
    if torch.cuda.is_available():
        device, name = "cuda", torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        device, name = "mps", "Apple GPU"
    else:
        device, name = "cpu", torch.backends.cpu.get_cpu_capability()
    product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    note = "" if float(product[0, 0]) == 8.0 else f"wrong product on {device}"
    if device == "cpu" and shutil.which("nvidia-smi"):
        note = (
            f"there is an NVIDIA driver, but torch {torch.__version__} does not use it: install a CUDA build of torch"
        )
    return Component("torch", torch.__version__, f"{product.device.type} ({name})", note)


def _numba() -> Component:
    if not _has("numba"):
        return Component("numba", "", "", "not installed: alignment search falls back to the slower torch version")
    import numba

    doubled = numba.njit(lambda value: value * 2)(np.float32(2.0))
    note = "" if doubled == 4.0 else "compiles, but computes wrongly"
    return Component("numba", numba.__version__, f"cpu, {numba.get_num_threads()} threads", note)


def _soundfile() -> Component:
    formats = soundfile.available_formats()
    wanted = ["WAV", "FLAC", "OGG", "MP3"]
    lacking = [name for name in wanted if name not in formats]
    note = f"libsndfile reads no {', '.join(lacking)}" if lacking else ""
    uses = "reads " + ", ".join(name.lower() for name in wanted if name in formats)
    return Component("soundfile", f"{soundfile.__version__} / {soundfile.__libsndfile_version__}", uses, note)


def _av() -> Component:
    there = [name for name in AV_CODECS if name in av.codecs_available]
    lacking = [name for name in AV_CODECS if name not in there]
    note = f"FFmpeg decodes no {', '.join(lacking)}" if lacking else ""
    return Component("av", av.__version__, "decodes " + ", ".join(there), note)


def _onnx() -> Component:
    """The GPU package falls to the CPU silently when its CUDA libraries do not fit: the provider list tells."""
    if not _has("onnxruntime"):
        return Component("onnxruntime", "", "not installed (not needed)")
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    gpu = bool(_version("onnxruntime-gpu"))
    note = "onnxruntime-gpu is installed but offers no CUDA" if gpu and "CUDAExecutionProvider" not in providers else ""
    return Component("onnxruntime", onnxruntime.__version__, ", ".join(providers), note)


def _memory() -> tuple[float, float]:
    """Total and free memory in GB; zeros where the system does not say without psutil."""
    if _has("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        return round(memory.total / 1e9, 1), round(memory.available / 1e9, 1)
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0.0, 0.0
    page = os.sysconf("SC_PAGE_SIZE")
    return tuple(round(os.sysconf(key) * page / 1e9, 1) for key in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))  # type: ignore[return-value]
