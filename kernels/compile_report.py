"""`python -m mini_ht.kernels.compile_report`: compiles all kernels as shipped, without a GPU; prints what they became.

For each entry registers, spilled bytes, shared memory and tensor-core instructions. Exits with 1 if one spills, wants
more shared memory than the device has, or multiplies without tensor cores where it should not.
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

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
NETS = tuple((images, width) for images in (1, 3) for width in (8, 16, 32, 64))
KINDS = (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "bf16x3"), ("float32", "ieee"), ("float16", "tf32"))
QUICK = {(1, 8), (8, 8), (16, 16), (3, 32), (32, 32), (64, 64)}
FUSED = {"enable_fp_fusion": True}  # as `triton_launch.run` has it
SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class Entry:
    """One kernel to compile: job, channels, the dtype that is stored and the precision of float32 products."""

    job: str  # forward, input, weight; or the name of a kernel without matrix product
    inputs: int
    outputs: int
    dtype: str
    precision: str


def shipped(quick: bool) -> Iterator[Entry]:
    """Every kernel of the paper's nets, images with 1 and 3 channels, 8 to 64 channels, in every precision."""
    pairs: dict[tuple[int, int], tuple[str, ...]] = {net: ("forward", "weight") for net in NETS}
    pairs |= {(width, width): ("forward", "input", "weight") for _, width in NETS}
    for dtype, precision in KINDS[:2] if quick else KINDS:
        for (inputs, outputs), jobs in sorted(pairs.items()):
            if not quick or (inputs, outputs) in QUICK:
                yield from (Entry(job, inputs, outputs, dtype, precision) for job in jobs)
    for width in (8,) if quick else (8, 16, 32, 64):
        for job in ("merge_statistics", "apply_norm", "output_sums", "finish_block"):
            yield Entry(job, width, width, "bfloat16", "tf32")


def kernel_and_constants(entry: Entry, hopper: bool) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The kernel, its constants, and the compiler's options, as the host side would choose them."""
    import triton.language as tl

    from mini_ht.kernels import triton_backward, triton_forward, triton_weights
    from mini_ht.kernels.tiles import choose, padded

    wide = padded(entry.outputs, 1)
    flags = {"AFFINE": entry.inputs > 3, "BIAS": False, "OWN": True, "SUMS": True, "WIDE": False}
    if entry.job not in ("forward", "input", "weight"):
        window = choose("weight", entry.inputs, entry.outputs, entry.dtype, entry.precision, hopper)
        values = {
            "CI": entry.inputs, "CO": entry.outputs, "CIP": window.inputs, "COP": window.outputs, "C": entry.outputs,
            "CP": wide, "BS": 32, "BLOCK": 1024, "BM": 128, "WINDOW": window.form == "window", "WEIGHTS": True,
            "USED": False, **flags,
        }  # fmt: skip
        module = {"finish_block": triton_weights, "output_sums": triton_backward}.get(entry.job, triton_forward)
        big = entry.job == "finish_block" and window.inputs * window.outputs >= 1024
        return getattr(module, entry.job), values, {"num_warps": 8 if big else 4, "num_stages": 1, **FUSED}
    tile = choose(entry.job, entry.inputs, entry.outputs, entry.dtype, entry.precision, hopper)
    module = {"forward": triton_forward, "input": triton_backward, "weight": triton_weights}[entry.job]
    values = {
        "CI": entry.inputs, "CO": entry.outputs, "CIP": tile.inputs, "COP": tile.outputs, "BM": tile.windows,
        "PIXELS": tile.pixels, "PRECISION": entry.precision, "DT": getattr(tl, entry.dtype), **flags,
    }  # fmt: skip
    kernel = getattr(module, f"{entry.job}_{tile.form}")
    return kernel, values, {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED}


def parameter_type(name: str, dtype: str) -> str:
    """A kernel parameter's type by its name: activations and their gradients are stored in the net's dtype."""
    if name in ("x_ptr", "p_ptr", "g_ptr", "y_ptr", "dx_ptr"):
        return f"*{SHORT[dtype]}"
    if name.endswith("_ptr"):
        return "*i8" if name == "code_ptr" else "*fp32"
    return "fp32" if name in ("slope", "eps") else "i32"


def compile_entry(entry: Entry, capability: int) -> dict[str, Any]:
    """Compile for sm_<capability> and read registers, spills, shared memory and instructions off the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    kernel, values, options = kernel_and_constants(entry, capability >= 90)
    constexprs = {name: values[name] for name in kernel.arg_names if name in values}
    signature = {
        name: "constexpr" if name in constexprs else parameter_type(name, entry.dtype) for name in kernel.arg_names
    }
    # Buffers start at multiples of 16 bytes, as torch allocates them; it decides how wide loads are.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name.endswith("_ptr")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(ptx), "-o", f"{folder}/out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        code = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),  # type: ignore[union-attr]
        "spilled": sum(map(int, spilled)),
        "shared": compiled.metadata.shared,
        "tensor": len(re.findall(r"\bHGMMA|\bHMMA|\bQGMMA", code)),
        "windows": constexprs.get("BM", 0),
        "warps": options["num_warps"],
        "kernel": kernel.__name__,
    }


def misses(entry: Entry, found: dict[str, Any], capability: int) -> list[str]:
    """Which bars an entry misses."""
    tensor_cores = entry.job in ("forward", "input", "weight") and (entry.dtype, entry.precision) != ("float32", "ieee")
    return [
        *(["spills"] if found["spilled"] else []),
        *(["shared memory"] if found["shared"] > SHARED[capability] else []),
        *(["no tensor cores"] if tensor_cores and not found["tensor"] else []),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a cross-section instead of everything")
    parser.add_argument("--only", default="", help="a regular expression; only table rows that match it")
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=[80, 90], help="default: 80 90")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    print("arch   kernel            dtype  precision  channels  windows  warps  registers  spilled  shared  tensor")
    failed = count = 0
    for capability in chosen.arch:
        for entry in shipped(chosen.quick):
            label = (
                f"sm_{capability} {entry.job} {SHORT[entry.dtype]} {entry.precision} {entry.inputs}->{entry.outputs}"
            )
            if not re.search(chosen.only, label):
                continue
            found = compile_entry(entry, capability)
            missed = misses(entry, found, capability)
            failed, count = failed + bool(missed), count + 1
            channels = f"{entry.inputs}->{entry.outputs}"
            print(
                f"sm_{capability}  {found['kernel']:16}  {SHORT[entry.dtype]:5}  {entry.precision:9}  {channels:8}  "
                f"{found['windows']:7}  {found['warps']:5}  {found['registers']:9}  {found['spilled']:7}  "
                f"{found['shared']:6}  {found['tensor']:6}  {', '.join(missed)}".rstrip(),
                flush=True,
            )
    print(f"{count} compiled, {failed} miss a bar (0 spilled bytes, shared memory of the device, tensor cores)")
    return int(failed > 0 or not count)


if __name__ == "__main__":
    sys.exit(main())
