"""`python -m mini_ht.kernels.benchmark`: the generated CNN's forward and backward pass against every alternative.

Correctness first: what is wrong is not timed. On a GPU every pass runs as a CUDA graph; without one the torch and NumPy
paths are compared. After each net and kind benchmark.csv and benchmark.png are written into --out; rows of the same
device and versions that are there already stay until they are measured again.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mini_ht.kernels import alternatives, reference_backward
from mini_ht.kernels.block import NORM_EPS, conv_stack
from mini_ht.kernels.problems import Problem, problems

KINDS = {"bf16": (torch.bfloat16, True), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
ALLOWED = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}  # by the norm of the error, of one block on exact products
PASSES = ("forward", "backward", "both")


def wrong_blocks(problem: Problem, kind: str) -> list[str]:
    """Blocks of the problem that are further from float64 than allowed; 4 episodes of them are looked at.

    Images and weights are multiples of 1/8: every product is exact, so that no maximum depends on rounding.
    """
    dtype, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, (size, inputs, outputs) in enumerate(problem.blocks, start=1):
        shape = (min(4, problem.episodes), problem.images, size, size, inputs)
        x = (torch.randn(shape, generator=generator) * 8).round().cuda() / 8
        weight = (torch.randn(shape[0], 3, 3, inputs, outputs, generator=generator) * 8).round().cuda() / 8
        both = []
        for impl, *kept in (("triton", dtype, torch.float32), ("torch", torch.float64, torch.float64)):
            leaves = [leaf.to(one).requires_grad_() for leaf, one in zip((x, weight), kept, strict=True)]
            ones = torch.ones(outputs, device="cuda", dtype=leaves[1].dtype)
            y, _ = conv_stack(leaves[0], leaves[1:], [ones], [ones], impl=impl)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(y)
            both.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
        for name, mine, other in zip(("y", "dx", "dw"), *both, strict=True):
            error = float((mine.double() - other).norm() / other.norm())
            if not error <= ALLOWED[kind]:
                found.append(f"block {number} {name}: relative error {error:.1e}, allowed {ALLOWED[kind]:.0e}")
    return found


def steps(net: alternatives.Net, arguments: Any) -> dict[str, Callable[[], Any]]:
    """The passes as calls; backward differentiates one forward pass again and again."""
    x, *parameters = arguments
    leaves = [leaf for parts in parameters for leaf in parts]
    y = net(x, *parameters)
    g = torch.ones_like(y)

    def forward() -> Tensor:
        with torch.no_grad():
            return net(x, *parameters)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, leaves, g, retain_graph=True),
        "both": lambda: torch.autograd.grad(net(x, *parameters), leaves, g),
    }


def cuda_seconds(make: Callable[[], dict[str, Callable[[], Any]]], name: str) -> float:
    """Median time of one pass as a CUDA graph, with a cold L2 cache."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs backward on the stream of forward, which must be the captured one
        step = make()[name]
        for _ in range(3):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return do_bench(graph.replay, return_mode="median") / 1e3


def cpu_seconds(step: Callable[[], Any], budget: float) -> float:
    """Median time of calls on one thread that fill the budget."""
    return Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=budget).median


def count_launches(step: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@cache
def ceilings(kind: str) -> tuple[float, float]:
    """What this GPU reaches: bytes/s of a large copy, FLOP/s of a large matrix product of the kind."""
    from triton.testing import do_bench

    source = torch.empty(2**28, device="cuda")
    copied = do_bench(lambda: source.clone(), return_mode="median") / 1e3
    a = torch.randn(8192, 8192, device="cuda", dtype=KINDS[kind][0])
    product = do_bench(lambda: a @ a, return_mode="median") / 1e3
    return 2 * source.numel() * 4 / copied, 2 * 8192**3 / product


def set_products(kind: str) -> None:
    """Whether float32 products may be rounded to tf32, in convs and matrix products, ours included."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = KINDS[kind][1]


def gpu_rows(problem: Problem, kind: str) -> list[dict[str, Any]]:
    """Every net on one problem: seconds, launches, memory, bandwidth and share of the roofline."""
    set_products(kind)
    faults = wrong_blocks(problem, kind)
    if faults:
        raise SystemExit(f"not timed, because wrong: {problem.name} {problem.channels} {kind}: {'; '.join(faults)}")
    dtype = KINDS[kind][0]
    arguments = problem.draw("cuda", dtype)
    bandwidth, speed = ceilings(kind)
    wanted = alternatives.torch_path(*arguments).detach().float()
    rows = []
    for name, net in ({"triton": alternatives.fused} | alternatives.alternatives(True)).items():
        row: dict[str, Any] = {"problem": problem.name, "channels": problem.channels, "kind": kind, "net": name}
        try:
            error = float((net(*arguments).detach().float() - wanted).norm() / wanted.norm())
            if not error <= 0.1:
                raise ValueError(f"wrong, relative error {error:.1e}")
            both = steps(net, arguments)["both"]
            both()  # what cuDNN tries when it first meets a shape is no cost of a step
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            row["launches"] = count_launches(both) or "not seen"  # where the profiler may not look
            del both
            for part in PASSES:
                row[f"{part}_us"] = round(1e6 * cuda_seconds(partial(steps, net, arguments), part), 1)
            if name == "triton":
                for part in PASSES:
                    moved, seconds = problem.bytes(dtype.itemsize)[part], row[f"{part}_us"] / 1e6
                    floor = max(moved / bandwidth, problem.flops()[part] / speed)
                    row[f"{part}_tb_s"] = round(moved / seconds / 1e12, 2)
                    row[f"{part}_share"] = round(floor / seconds, 3)
        except Exception as error:  # whatever keeps one net from running must not keep the others
            row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        rows.append(row)
    add_ratios(rows, "triton")
    return rows


def add_ratios(rows: Sequence[dict[str, Any]], ours: str) -> None:
    """How many times faster each net would have to be to equal ours; on our own row, the best alternative's."""
    mine = next(row for row in rows if row["net"] == ours)
    for part in PASSES:
        key = f"{part}_us"
        others = [row[key] for row in rows if row is not mine and key in row]
        for row in rows:
            if key in row and key in mine:
                row[f"{part}_ratio"] = round((min(others, default=np.nan) if row is mine else row[key]) / mine[key], 2)


def cpu_rows(problem: Problem, budget: float) -> list[dict[str, Any]]:
    """The torch path against plain torch, and NumPy, on one thread."""
    torch.set_num_threads(1)
    arguments = problem.draw("cpu", torch.float32)
    x, *parameters = ([part.detach().numpy() for part in parts] for parts in ([arguments[0]], *arguments[1:]))
    (images,), (weights, gammas, betas) = x, parameters
    wanted, _ = conv_stack(images.astype(np.float64), *([p.astype(np.float64) for p in parts] for parts in parameters))
    g = np.ones_like(wanted, dtype=np.float32)

    options = None, None, 0.0, np.float32(NORM_EPS), g
    passes: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, net in ({"torch path": alternatives.torch_path} | alternatives.alternatives(False)).items():
        error = float(np.abs(net(*arguments).detach().double().numpy() - wanted).max() / np.abs(wanted).max())
        if not error <= 1e-3:
            raise SystemExit(f"not timed, because wrong: {name}: relative error {error:.1e}")
        passes[name] = steps(net, arguments)
    passes["numpy"] = {
        "forward": lambda: conv_stack(images, weights, gammas, betas),
        "both": lambda: reference_backward.stack_backward(images, weights, gammas, betas, *options),
    }
    rows = []
    for name, calls in passes.items():
        row: dict[str, Any] = {"problem": problem.name, "channels": problem.channels, "kind": "cpu fp32", "net": name}
        rows.append(row | {f"{part}_us": round(1e6 * cpu_seconds(step, budget), 1) for part, step in calls.items()})
    add_ratios(rows, "torch path")
    return rows


def label(row: dict[str, Any]) -> str:
    """Net and kind of a row, as the option --only reads them."""
    return f"{row['problem']}-{row['channels']} {row['kind']}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A block of the table: one row a net."""
    for row in rows:
        parts = [f"{part} {row.get(f'{part}_us', '-')} us x{row.get(f'{part}_ratio', '-')}" for part in PASSES]
        extra = [f"{key} {row[key]}" for key in row if key.endswith(("_tb_s", "_share", "launches", "peak_mb", "note"))]
        print(f"{label(row):24} {row['net']:23} {'  '.join(parts)}  {'  '.join(extra)}".rstrip(), flush=True)


def earlier(file: Path, device: str) -> list[dict[str, Any]]:
    """Rows of a benchmark.csv that were measured on the same device with the same versions."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]
    return [row for row in rows if row.get("device") == device]


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """benchmark.csv, and benchmark.png: time of both passes by channels, a panel for each problem and kind."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    part = out / "benchmark.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(out / "benchmark.csv")  # whole at every moment
    panels = list(dict.fromkeys((row["problem"], row["kind"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        mine = [row for row in rows if (row["problem"], row["kind"]) == panel and "both_us" in row]
        for net in dict.fromkeys(row["net"] for row in mine):
            points = sorted((int(row["channels"]), float(row["both_us"])) for row in mine if row["net"] == net)
            axis.plot(*zip(*points, strict=True), marker="o", label=net)
        axis.set(title=" ".join(panel), xlabel="channels", ylabel="forward + backward, us", yscale="log")
        axis.set_xscale("log", base=2)
    axes[0].legend(fontsize=7)
    figure.savefig(out / "benchmark.png", dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number on a CPU")
    parser.add_argument("--only", default="", help="nets and kinds, as in 'omniglot-8 bf16', that contain this")
    parser.add_argument("--resume", action="store_true", help="leave out what the CSV in --out has already")
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    pairs = product(KINDS if cuda else ["cpu fp32"], problems(cuda))
    jobs = {label(vars(one) | {"problem": one.name, "kind": kind}): (kind, one) for kind, one in pairs}
    if not any(chosen.only in name for name in jobs):
        parser.error(f"--only {chosen.only!r} is in none of these: {', '.join(jobs)}")
    device = f"{torch.cuda.get_device_name()}; triton {version('triton')}" if cuda else "CPU, one thread"
    device += f"; torch {torch.__version__}"
    print(f"device: {device}")
    rows = earlier(chosen.out / "benchmark.csv", device)
    for name, (kind, problem) in jobs.items():
        if chosen.only in name and not (chosen.resume and name in map(label, rows)):
            found = gpu_rows(problem, kind) if cuda else cpu_rows(problem, chosen.seconds)
            show(found)
            rows = [row for row in rows if label(row) != name] + [{"device": device} | row for row in found]
            write(rows, chosen.out)


if __name__ == "__main__":
    main()
