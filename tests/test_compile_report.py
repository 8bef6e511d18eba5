"""The compile report: it compiles what is launched, and what is shipped misses no bar."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mini_ht.kernels import NORM_EPS

if sys.platform != "linux" and importlib.util.find_spec("triton") is None:
    pytest.skip("there is no triton for this system", allow_module_level=True)

from mini_ht.kernels import compile_report, triton_launch, triton_launch_backward
from mini_ht.kernels.problems import Problem


@pytest.mark.slow
def test_everything_shipped_compiles():
    """A cross-section of the kernels compiles for sm_80 and sm_90 without spills and with tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "mini_ht.kernels.compile_report", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_are_launched_as_they_are_reported(monkeypatch):
    """The report compiles what a pass launches: the same kernels, constants and options, in the same order."""
    launched = []

    def run(kernel, grid, *arguments, **named):
        launched.append((kernel, named))

    for module in (triton_launch, triton_launch_backward):
        monkeypatch.setattr(module, "run", run)
    x, *parameters = Problem("net", 2, 80, 28, 1, 8).draw("cpu", torch.float32)
    options = 0.0, NORM_EPS, "tf32"
    y, blocks = triton_launch.forward(x, *parameters, [], [], *options)
    triton_launch_backward.Backward(y, [], x, *parameters, [], blocks, True, options)(False)
    reported = compile_report.launches(1, 8, "float32", "tf32", 90)
    assert len(launched) == len(reported) == 14
    for (kernel, named), entry in zip(launched, reported, strict=True):
        options = triton_launch.compiler_options(named.pop("warps", 4), named.pop("stages", 1))
        assert (kernel, named, options) == (entry.kernel, entry.constants, entry.options)
    older = compile_report.launches(1, 32, "bfloat16", "tf32", 80)
    assert [entry.options for entry in older] != [entry.options for entry in reported]
    assert triton_launch.run is triton_launch_backward.run is run and triton_launch.hopper(torch.device("cpu"))


def test_no_number_of_images_compiles_a_kernel_anew():
    """Every number that a launch has outside of a tuple is one for whose value no kernel is compiled again."""
    for entry in compile_report.launches(1, 8, "bfloat16", "tf32", 90):
        names = [
            name
            for name, argument in zip(entry.kernel.arg_names, entry.arguments, strict=False)
            if isinstance(argument, int)
        ]
        options = getattr(entry.kernel, "kwargs", vars(entry.kernel))  # of the interpreter's, or as compiled
        assert names and set(names) <= set(options["do_not_specialize"]), (entry.label, names)


def test_instructions_of_a_tile():
    """Those of the longest loop count, times warps, for each window; none are given where another loop is inside."""
    before, body = "  /*0000*/  MOV R1, R2 ;", ["  /*0010*/  IADD R1 ;"] * 14
    outer = [before, ".L_x_1:", *body, "  /*00f0*/  @P0 BRA `(.L_x_1) ;", before]
    assert compile_report.each_window("\n".join(outer), 60, 4) == "1.0"
    inner = [before, ".L_x_1:", before, ".L_x_2:", before, "  /*00f0*/  @!P1 BRA `(.L_x_2) ;", *outer[3:]]
    assert compile_report.each_window("\n".join(inner), 60, 4) == ""
    assert (
        compile_report.each_window("\n".join(body), 60, 4) == compile_report.each_window("\n".join(outer), 0, 4) == ""
    )
