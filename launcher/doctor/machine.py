"""This machine as the standard library and the kernel's files tell of it: no torch here."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launcher.doctor.finding import Finding
from launcher.recipe.device import gpu_count
from launcher.recipe.find import folders, label, package_folder
from launcher.recipe.resolve import cores
from launcher.run.folder import git_commit

MEGATRON_CORE = "0.16"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "tokenizers", "gigatoken", "sentencepiece", "omegaconf", "typer")
OPEN_FILES = 4096  # a pipeline rank's sockets and the checkpoint's files, with room
SHARED_MIB = 1024  # data loaders hand batches over, and NCCL its buffers; containers often get 64 MiB
FREE_GIB = 5


def findings() -> list[Finding]:
    return [_yuan(), _packages(), _machine(), _gpus(), _limits(), _disk(), _recipes(), _slurm(), _huge_pages()]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _yuan() -> Finding:
    commit = git_commit()
    dirty = ", with changes" if commit and commit.endswith("+") else ""
    text = installed("yuan") or "not installed"
    text += f", commit {commit[:12].rstrip('+')}{dirty}" if commit else ""
    return Finding("yuan", f"{text}, Python {platform.python_version()}, {platform.platform()}")


def _packages() -> Finding:
    found = {package: installed(package) for package in PACKAGES}
    there = ", ".join(f"{package} {number}" for package, number in found.items() if number)
    missing = ", ".join(package for package, number in found.items() if not number)
    wrong = not (found["megatron-core"] or "").startswith(f"{MEGATRON_CORE}.") or not found["torch"]
    mend = f"pip install 'megatron-core=={MEGATRON_CORE}.*' torch: yuan is made for these" if wrong else ""
    return Finding("packages", there + (f"; without {missing}" if missing else ""), mend, wrong)


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    cpu = f"{cores()} of {os.cpu_count()} cores, {model.group(1) if model else platform.machine()}"
    return Finding("machine", f"{cpu}, {memory.total / 2**30:.1f} GiB of memory, {memory.available / 2**30:.1f} free")


def _gpus() -> Finding:
    driver = re.search(r"Kernel Module.*?(\d+\.\d+[\d.]*)", _read("/proc/driver/nvidia/version"))
    present = list(Path("/proc/driver/nvidia/gpus").glob("*")) or list(Path("/dev").glob("nvidia[0-9]*"))
    if not present:
        return Finding("GPUs", "none of NVIDIA's")
    names = [re.search(r"Model:\s*(.*)", _read(f"{one}/information")) for one in present]
    kinds = {name.group(1) for name in names if name}
    text = f"{len(present)} x {', '.join(sorted(kinds)) or 'NVIDIA'}, driver {driver.group(1) if driver else 'unknown'}"
    if gpu_count() == len(present):
        return Finding("GPUs", text)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Finding("GPUs", f"{text}; CUDA_VISIBLE_DEVICES={visible} leaves {gpu_count()}")
    return Finding("GPUs", f"{text}; the installed torch is one for CPUs", "install a torch that is built for CUDA", broken=True)


def _limits() -> Finding:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = shutil.disk_usage("/dev/shm").total / 2**20 if Path("/dev/shm").is_dir() else 0
    many = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    mend = []
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        mend.append(f"ulimit -n {OPEN_FILES}")
    if shared < SHARED_MIB:
        mend.append("more shared memory: docker run --shm-size=8g, or --ipc=host")
    return Finding("limits", f"{many} open files, {_size(shared * 2**20)} of shared memory (/dev/shm)", "; ".join(mend))


def _disk() -> Finding:
    free = {"here": shutil.disk_usage(".").free}
    if Path("runs").is_dir():
        free["in runs/"] = shutil.disk_usage("runs").free
    unwritable = [place for place in (".", "runs") if Path(place).is_dir() and not os.access(place, os.W_OK)]
    if unwritable:
        return Finding("disk", f"{' and '.join(unwritable)} cannot be written", "work in another folder, or give run.dir=…", broken=True)
    text = ", ".join(f"{_size(size)} free {where}" for where, size in free.items())
    few = min(free.values()) < FREE_GIB * 2**30
    return Finding("disk", text, "a checkpoint takes 12 to 18 bytes per parameter; checkpoint.keep_last=2 keeps two" if few else "")


def _recipes() -> Finding:
    parts = []
    for folder in folders():
        if folder != package_folder() and folder.resolve() == package_folder():  # ./recipes of a checkout
            continue
        count = len(list(folder.glob("*.yaml")))
        name = "yuan's own" if folder == package_folder() else label(folder)
        parts.append(f"{name} ({count})" if folder.is_dir() else f"{name} (not there)")
    none = not list(package_folder().glob("*.yaml"))
    return Finding("recipes", ", ".join(parts), "the installed package lacks its recipes: install it again" if none else "", none)


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("slurm", "no sbatch on the PATH")
    plugins = _read("/etc/slurm/plugstack.conf") + "".join(_read(str(one)) for one in Path("/etc/slurm/plugstack.conf.d").glob("*.conf"))
    containers = "with containers (pyxis)" if "pyxis" in plugins else "pyxis not seen in /etc/slurm/plugstack.conf: no containers"
    return Finding("slurm", f"{shutil.which('sbatch')}, {containers}")


def _huge_pages() -> Finding:
    chosen = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    if chosen is None or chosen.group(1) == "never":
        mend = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", "off: large tensors on a CPU cost 512 times the page faults", mend)
    return Finding("huge pages", f"on ({chosen.group(1)})")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
