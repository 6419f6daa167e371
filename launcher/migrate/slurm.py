"""A batch script's #SBATCH lines: machines, processes, queue."""

from __future__ import annotations

import re

from launcher.migrate.result import Line

DIRECTIVE = re.compile(r"^#SBATCH\s+(--?[A-Za-z][\w-]*)(?:[= ]\s*(\S+))?", re.M)
SHORT = {"-N": "--nodes", "-A": "--account", "-p": "--partition", "-q": "--qos", "-t": "--time", "-J": "--job-name"}
KEYS = {
    "--nodes": "launch.nnodes", "--ntasks-per-node": "launch.nproc_per_node", "--gpus-per-node": "launch.nproc_per_node",
    "--account": "slurm.account", "--partition": "slurm.partition", "--qos": "slurm.qos", "--time": "slurm.time",
}  # fmt: skip


def directives(text: str) -> list[Line]:
    """Each #SBATCH line of a script as a line; none where it has none."""
    lines = [_line(SHORT.get(name, name), value) for name, value in DIRECTIVE.findall(text)]
    if lines:
        lines.insert(0, Line("#SBATCH", "sbatch", "", {"launch.kind": "slurm"}))
    per_node = [line for line in lines if "launch.nproc_per_node" in line.became]
    for line in per_node:  # one task per machine that starts torchrun, beside the number of its GPUs
        if line.became["launch.nproc_per_node"] == 1 and len(per_node) > 1:
            line.became, line.note = {}, "dropped: torchrun starts the processes of a machine"
    return lines


def _line(name: str, value: str) -> Line:
    line = Line("#SBATCH", name, value)
    count = re.search(r"\d+", value.rpartition(":")[2] if name in ("--gres", "--gpus-per-node") else value)
    if name == "--gres" and value.startswith("gpu") and count:
        line.became = {"launch.nproc_per_node": int(count.group())}
    elif name not in KEYS:
        line.note = f"kept as it is: slurm.sbatch_args=['{name}{'=' if value else ''}{value}']"
        line.note = "dropped: yuan's own batch script has its say" if name in OWN else line.note
    elif KEYS[name].startswith("slurm."):
        line.became = {KEYS[name]: value}
    elif count:
        line.became = {KEYS[name]: int(count.group())}
    else:
        line.lost = f"no number: give {KEYS[name]}"
    return line


OWN = {"--job-name", "--output", "--error", "--signal", "--requeue", "--ntasks", "--open-mode", "-o", "-e", "-n"}


def joined(batch: list[Line], launcher: list[Line]) -> list[Line]:
    """#SBATCH lines and torchrun's: what torchrun takes from Slurm's variables is what #SBATCH says."""
    said = {key for line in batch for key in line.became}
    for line in launcher:
        key = {"--nnodes": "launch.nnodes", "--nproc_per_node": "launch.nproc_per_node"}.get(line.name)
        if said and (key in said or line.name in ("--node_rank", "--rdzv_endpoint", "master_addr:port")) and line.lost:
            line.became, line.lost, line.note = {}, "", "dropped: Slurm says it"
    others = [line for line in batch if line.note.startswith("kept")]
    if others:
        args = [f"{line.name}{'=' if line.value else ''}{line.value}" for line in others]
        batch = [*batch, Line("#SBATCH", "others", "", {"slurm.sbatch_args": args})]
        for line in others:
            line.note = "see slurm.sbatch_args"
    return [*batch, *launcher]
