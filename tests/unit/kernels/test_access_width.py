"""The widths of the kernels' loads and stores are counted as the machine code has them."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("triton")

from benchmarks.access_width import counted

SASS = """
	.section	.text.some_kernel,"ax",@progbits
some_kernel:
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.U16 R8, desc[UR6][R16.64] ;
        /*0020*/               @P0 LDG.E.U16.CONSTANT R9, desc[UR6][R16.64+0x2] ;
        /*0030*/                   LDG.E R10, desc[UR6][R14.64] ;
        /*0040*/                   LDG.E.EF.128 R20, desc[UR6][R14.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7+0x800], desc[UR6][R4.64], P2 ;
        /*0060*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0070*/                   LDSM.16.M88.4 R24, [R3] ;
        /*0080*/                   LDSM.16.M88 R25, [R3] ;
        /*0090*/                   LDS.U16 R26, [R3] ;
.L_x_0:
        /*00a0*/                   STS.64 [R3], R8 ;
        /*00b0*/                   STG.E.U8 desc[UR6][R8.64], R11 ;
        /*00c0*/                   RED.E.ADD.STRONG.GPU desc[UR6][R8.64], R11 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA `(.L_x_0);
        /*00f0*/                   NOP;
"""


def test_accesses_are_counted_by_width() -> None:
    counts = counted(SASS)
    assert counts.instructions == 15
    assert counts.widths == {
        "global loads": {2: 2, 4: 1, 16: 1},
        "global stores": {1: 1},
        "global to shared": {16: 1},
        "global atomics": {4: 1},
        "shared loads": {2: 1, 4: 1, 16: 1},
        "shared stores": {8: 1},
    }
    assert counts.tma == 1
    # Both loads of two bytes and the store of one; shared memory has no lines to fill.
    assert counts.narrow == 3


def test_a_compiled_kernel_has_accesses_of_every_kind() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.access_width", "--json", "--kernel", "likelihood"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert {(r["kernel"], r["case"]) for r in results} == {
        ("log_likelihood_kernel", "forward"),
        ("log_likelihood_backward_kernel", "backward"),
    }
    for r in results:
        assert r["target"] == "sm_90"
        assert sum(r["counts"]["widths"]["global loads"].values()) > 0
        assert sum(r["counts"]["widths"]["global stores"].values()) > 0
        assert r["counts"]["instructions"] > 20
