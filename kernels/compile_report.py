"""`python -m mini_ht.kernels.compile_report`: compiles all kernels as shipped, without a GPU; prints what they became.

For each kernel registers, spilled bytes, shared memory, tensor-core instructions, and how many instructions all warps
need for a window of a tile, where the loop over tiles has no other inside. Exits with 1 if one spills, wants more
shared memory than the device has, or multiplies without tensor cores where it should not.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
NETS = tuple((images, width) for images in (1, 4) for width in (8, 16, 32, 64))
KINDS = (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "bf16x3"), ("float32", "ieee"), ("float16", "tf32"))
QUICK = {"1->8", "8->8", "16->16", "4->32", "32->32", "64->64"}
HEAD = "arch   kernel           dtype, precision  channels  windows  warps  registers  spilled  shared  tensor    each"
ROW = "sm_{}  {:15}  {:16}  {:8}  {:7}  {:5}  {registers:9}  {spilled:7}  {shared:6}  {tensor:6}  {each:>6}"
SHORT = {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float16": "fp16", "torch.int8": "i8"}


@dataclass(frozen=True)
class Entry:
    """One launch that the host side would make."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    net: str  # dtype and precision
    channels: str  # in and out

    @property
    def label(self) -> str:
        """What makes an entry another one, in words."""
        return f"{self.kernel.__name__} {self.net} {self.channels}"


def launches(images: int, width: int, dtype: str, precision: str, capability: int) -> list[Entry]:
    """What forward and backward of a four-block net would launch on a GPU of a capability; tensors have no values."""
    import torch

    from mini_ht.kernels import NORM_EPS, triton_launch, triton_launch_backward

    found: list[Entry] = []

    def record(kernel: Any, grid: Any, *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
        inputs, outputs = (constants.get(name, width) for name in ("CI", "CO"))
        channels = f"{images}->{width}" if kernel.__name__ == "add_up" else f"{inputs}->{outputs}"
        options = triton_launch.compiler_options(warps, stages)
        found.append(Entry(kernel, arguments, constants, options, f"{SHORT[str(x.dtype)]} {precision}", channels))

    x = torch.empty(2, 80, 28, 28, images, dtype=getattr(torch, dtype), device="meta")
    weights = [torch.empty(2, 3, 3, images if k == 0 else width, width, device="meta") for k in range(4)]
    small = [torch.empty(width, device="meta")] * 4
    options = (0.0, NORM_EPS, precision)
    pretended = patch.multiple(triton_launch, run=record, hopper=lambda device: capability >= 90)
    with pretended, patch.object(triton_launch_backward, "run", record):
        y, blocks = triton_launch.forward(x, weights, small, small, [], [], *options)
        triton_launch_backward.Backward(y, [], x, weights, small, small, [], blocks, True, options)(False)
    return found


def shipped(quick: bool, capability: int) -> Iterator[Entry]:
    """Every kernel of the paper's nets once: images of 1 channel and of 4, as which 3 are read, every precision."""
    seen = set()
    for dtype, precision in KINDS[:2] if quick else KINDS:
        for images, width in NETS:
            for entry in launches(images, width, dtype, precision, capability):
                small = "DT" not in entry.constants and (dtype != "bfloat16" or (quick and width > 8))
                if entry.label not in seen and not small and (not quick or entry.channels in QUICK):
                    seen.add(entry.label)
                    yield entry


def parameter_type(argument: Any) -> Any:
    """An argument's type in Triton's words."""
    if isinstance(argument, tuple):
        return tuple(map(parameter_type, argument))
    if hasattr(argument, "dtype"):
        return f"*{SHORT[str(argument.dtype)]}"
    return "fp32" if isinstance(argument, float) else "i32" if argument < 2**31 else "i64"


def pointers(arguments: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    """Where tensors are among arguments, those in tuples too."""
    for index, argument in enumerate(arguments):
        if isinstance(argument, tuple):
            yield from ((index, *path) for path in pointers(argument))
        elif hasattr(argument, "dtype"):
            yield (index,)


def each_window(code: str, windows: int, warps: int) -> str:
    """Instructions of the loop over tiles, for each window and all warps; empty without one, or if one is inside."""
    labels: dict[str, int] = {}
    count, loops = 0, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif re.match(r"/\*[0-9a-f]{4,}\*/ ", line.strip()):
            count += 1
            if (jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels.get(jump[1], count) < count - 1:
                loops.append((labels[jump[1]], count))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    alone = not any(first <= start and end < last for start, end in loops)
    return f"{(last - first) * warps / windows:.1f}" if windows and loops and alone else ""


def compile_entry(entry: Entry, capability: int) -> dict[str, Any]:
    """Compile for sm_<capability> and read registers, spills, shared memory and instructions off the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    signature = dict(zip(names, map(parameter_type, entry.arguments), strict=False))
    signature |= {name: "constexpr" for name in names[len(entry.arguments) :]}
    # Buffers start at multiples of 16 bytes, as torch allocates them; it decides how wide loads are.
    aligned = {path: [["tt.divisibility", 16]] for path in pointers(entry.arguments)}
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=entry.constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(ptx), "-o", f"{folder}/out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),  # type: ignore[union-attr]
        "spilled": sum(map(int, spilled)),
        "shared": compiled.metadata.shared,
        "tensor": len(re.findall(r"\bHGMMA|\bHMMA|\bQGMMA", code)),
        "each": each_window(code, entry.constants.get("BM", 0), entry.options["num_warps"]),
    }


def misses(entry: Entry, found: dict[str, Any], capability: int) -> list[str]:
    """Which bars an entry misses."""
    wanted = "DT" in entry.constants and entry.net != "fp32 ieee"
    bars = {"spills": found["spilled"], "shared memory": found["shared"] > SHARED[capability]}
    return [name for name, missed in (bars | {"no tensor cores": wanted and not found["tensor"]}).items() if missed]


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a cross-section instead of everything")
    parser.add_argument("--only", default="", help="a regular expression; only table rows that match it")
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=[80, 90], help="default: 80 90")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    print(HEAD)
    failed = count = 0
    for capability in chosen.arch:
        for entry in shipped(chosen.quick, capability):
            if not re.search(chosen.only, f"sm_{capability} {entry.label}"):
                continue
            found = compile_entry(entry, capability)
            missed = misses(entry, found, capability)
            failed, count = failed + bool(missed), count + 1
            sizes = entry.constants.get("BM", 0), entry.options["num_warps"]
            row = ROW.format(capability, entry.kernel.__name__, entry.net, entry.channels, *sizes, **found)
            print(f"{row}  {', '.join(missed)}".rstrip(), flush=True)
    print(f"{count} compiled, {failed} miss a bar (0 spilled bytes, shared memory of the device, tensor cores)")
    return int(failed > 0 or not count)


if __name__ == "__main__":
    sys.exit(main())
