"""The built objects: none exports a symbol that could win at link time, none holds an instruction above its level.

TILEWRIGHT_BUILD_DIR names a CMake build directory; objects of level L lie in CMakeFiles/kernels_L.dir, those that any
x86-64 must run in core.dir and _C.dir.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = os.environ.get("TILEWRIGHT_BUILD_DIR")
needs_objects = pytest.mark.skipif(
    not BUILD or not shutil.which("objdump") or not shutil.which("nm"),
    reason="needs TILEWRIGHT_BUILD_DIR (a CMake build directory) and binutils",
)

# Instruction sets by level (CMakeLists.txt); "base" is x86-64 with SSE2.
ALLOWED = {"scalar": {"base"}}
ALLOWED["avx2"] = ALLOWED["scalar"] | {"sse4", "avx2"}
ALLOWED["avxvnni"] = ALLOWED["avx2"] | {"avxvnni"}
ALLOWED["avx512"] = ALLOWED["avx2"] | {"avx512"}
ALLOWED["avx512bf16"] = ALLOWED["avx512"] | {"avx512bf16"}
ALLOWED["amx"] = ALLOWED["avx512bf16"] | {"amx"}

# Registers and operands that only EVEX encodes: zmm, masks, the upper sixteen, broadcasts, embedded rounding.
_EVEX_OPERANDS = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b|\{z\}|\{1to|\{r[nduz]-sae\}|\{sae\}")
_AMX = re.compile(r"tile\w+|ldtilecfg|sttilecfg|tdp\w+|tcmm\w+")
_BF16 = re.compile(r"vdpbf16ps|vcvtne2?ps2bf16[xy]?")
_VNNI = re.compile(r"vpdp(busd|wssd)s?")
# Subsets that no level has: VBMI, VBMI2, BITALG, VPOPCNTDQ, IFMA, FP16, VP2INTERSECT, 4FMAPS, GFNI, VAES, carry-less
# products, the newer VEX and AVX10 dot products; BMI, ADX, LZCNT and MOVBE (tzcnt is "rep bsf" to an older CPU).
_ABOVE_ALL = re.compile(
    r"vperm(i2|t2)?b|vpmultishiftqb|vpcompress[bw]|vpexpand[bw]|vpsh[lr]dv?[wdq]|vpopcnt[bwdq]|vpshufbitqmb|vpmadd52\w+"
    r"|v(add|sub|mul|div|sqrt|max|min|scalef|getexp|getmant|reduce|rndscale|cmp|fpclass|fn?m(add|sub)\d+|fc?(madd|mul)c?)[ps]h"
    r"|vcvt(ph2(dq|udq|qq|uqq|w|uw|pd|psx)|(dq|udq|qq|uqq|w|uw|pd)2phx?|ps2phx)|vmovw|vp2intersect\w+|v4fn?madd\w+"
    r"|v?gf2p8\w+|vaes\w+|aes\w+|v?pclmul\w+|sha\d+\w+|vpdpb(ss|su|uu)ds?|vpdpw(su|us|uu)ds?|vbcstne\w+|vcvtneeb\w+|vcvtneob\w+"
    r"|andn[lq]?|bextr[lq]?|bls(r|i|msk)[lq]?|bzhi[lq]?|mulx[lq]?|pdep[lq]?|pext[lq]?|(sar|shl|shr|ror)x[lq]?|ad[co]x[lq]?"
    r"|lzcnt[wlq]?|movbe[wlq]?"
)
# EVEX-only instructions that can also name low xmm and ymm registers.
_EVEX_ONLY = re.compile(
    r"vpternlog[dq]|vpmov(db|dw|qb|qd|qw|wb|sdb|sdw|sqb|sqd|sqw|swb|usdb|usdw|usqb|usqd|usqw|uswb)|vscalef\w+|vrndscale\w+"
    r"|vp(and|andn|or|xor)[dq]|vmovdq[ua](8|16|32|64)|vperm[it]2\w+|vpermw|v(extract|insert)[fi](32x4|64x2|32x8|64x4)"
    r"|vp(min|max)[su]q|vpsraq|vpsravq|vpmullq|valign[dq]|vpro[lr]v?[dq]|vpabsq|vp?blendm\w+|vgetexp\w+|vgetmant\w+|vrange\w+"
    r"|vreduce\w+|vfpclass\w+|vfixupimm\w+|vrcp14\w+|vrsqrt14\w+|vdbpsadbw|vps(ll|rl|ra)vw|vptestn?m[bwdq]|vpconflict\w+"
    r"|vplzcnt\w+|vp?compress[pdq]\w*|vp?expand[pdq]\w*|vshuf[fi](32x4|64x2)|vcvtt?(ps|pd|ss|sd|ph)2u(dq|qq|si)\w*"
    r"|vcvtu(dq|qq|si)2\w+|vcvtt?p[sd]2qq|vcvtqq2p[sd]|vpscatter\w+|vscatter\w+|vbroadcast[fi](32x2|32x4|64x2|32x8|64x4)"
)
_SSE4 = re.compile(
    r"pshufb|palignr|ph(add|sub)(s?w|d)|pmulhrsw|pabs[bwd]|psign[bwd]|pmaddubsw|movddup|movs[hl]dup|h(add|sub)p[sd]"
    r"|addsubp[sd]|lddqu|pmulld|pmuldq|p(min|max)(s[bd]|u[wd])|p(extr|insr)[bdq]|p?blendv?\w*|round[ps][sd]|dpp[sd]|ptest"
    r"|pmov[sz]x\w+|pcmp(eq|gt)q|pcmp[ei]str\w+|packusdw|insertps|extractps|mpsadbw|phminposuw|crc32\w*|popcnt[wlq]?|movntdqa"
)
_LINE = re.compile(
    r"^\s+[0-9a-f]+:\t(?:(\{vex\d?\}|\{evex\}) )?(?:(?:rep[nez]*|lock|data16|notrack|bnd|cs|ds) )*([a-z]\w*)\s*(.*)$"
)


def feature(line: str) -> str | None:
    """The instruction set that a line of objdump's output needs; None for other lines."""
    found = _LINE.match(line)
    if not found:
        return None
    prefix, name, operands = found.groups()
    if _AMX.fullmatch(name):
        return "amx"
    if _ABOVE_ALL.fullmatch(name):
        return f"no level has {name}"
    if prefix and prefix.startswith("{vex") and (_VNNI.fullmatch(name) or _BF16.fullmatch(name)):
        return "avxvnni" if _VNNI.fullmatch(name) else f"no level has VEX {name}"
    if _BF16.fullmatch(name):
        return "avx512bf16"
    if (
        prefix == "{evex}" or _VNNI.fullmatch(name) or _EVEX_ONLY.fullmatch(name)
        or (_EVEX_OPERANDS.search(operands) and not name.startswith(("call", "j")))
    ):  # fmt: skip
        return "avx512"
    if name.startswith("v") and not name.startswith(("verr", "verw", "vmcall", "vmlaunch", "vmresume", "vmxo")):
        return "avx2"
    if "%ymm" in operands:
        return "avx2"
    return "sse4" if _SSE4.fullmatch(name) else "base"


@pytest.mark.parametrize("text, expected", [
    ("mov    %rax,%rbx", "base"), ("mulps  %xmm1,%xmm0", "base"), ("rep stos %al,%es:(%rdi)", "base"),
    ("tzcnt  %rax,%rdx", "base"), ("xgetbv", "base"), ("call   12 <f+0x12>", "base"), ("jmp    3 <k1_zmm>", "base"),
    ("pshufb %xmm1,%xmm0", "sse4"), ("popcnt %rax,%rax", "sse4"), ("blendvps %xmm0,%xmm1,%xmm2", "sse4"),
    ("vaddps %ymm0,%ymm1,%ymm2", "avx2"), ("vaddss %xmm0,%xmm15,%xmm2", "avx2"), ("vmulps %xmm0,%xmm1,%xmm2", "avx2"),
    ("vfmadd231ps (%rax),%ymm1,%ymm2", "avx2"), ("vcvtph2ps (%rax),%ymm1", "avx2"), ("vzeroupper", "avx2"),
    ("vmovdqu (%rax),%ymm1", "avx2"), ("vpsravd %ymm0,%ymm1,%ymm2", "avx2"), ("vmaskmovps (%rax),%ymm1,%ymm2", "avx2"),
    ("{vex} vpdpbusd %ymm8,%ymm12,%ymm0", "avxvnni"),
    ("vaddps %zmm0,%zmm1,%zmm2", "avx512"), ("vaddps %ymm0,%ymm1,%ymm17", "avx512"), ("kmovw  %eax,%k1", "avx512"),
    ("vpdpbusd %ymm8,%ymm12,%ymm0", "avx512"), ("vmovdqu32 (%rax),%ymm1", "avx512"),
    ("vpternlogd $0xff,%xmm0,%xmm0,%xmm0", "avx512"),
    ("vaddps (%rax){1to8},%ymm1,%ymm2", "avx512"), ("vmovaps %ymm0,%ymm1{%k1}{z}", "avx512"),
    ("vscalefps %ymm0,%ymm1,%ymm2", "avx512"),
    ("vpermw %zmm0,%zmm1,%zmm2", "avx512"), ("vcvtph2ps (%rax),%zmm1", "avx512"),
    ("vcvtps2ph $0x0,%zmm1,(%rax)", "avx512"),
    ("vdpbf16ps %zmm0,%zmm1,%zmm2", "avx512bf16"), ("vcvtneps2bf16 %zmm0,%ymm1", "avx512bf16"),
    ("tdpbssd %tmm0,%tmm1,%tmm2", "amx"), ("tileloadd (%rax),%tmm0", "amx"), ("tilerelease", "amx"),
    ("vpermb %zmm0,%zmm1,%zmm2", "no level has vpermb"), ("vpermi2b %zmm0,%zmm1,%zmm2", "no level has vpermi2b"),
    ("vpopcntd %zmm0,%zmm1", "no level has vpopcntd"), ("vaddph %zmm0,%zmm1,%zmm2", "no level has vaddph"),
    ("vpmadd52luq %zmm0,%zmm1,%zmm2", "no level has vpmadd52luq"), ("shlx   %rax,%rbx,%rcx", "no level has shlx"),
    ("andn   %rax,%rbx,%rcx", "no level has andn"), ("vpdpbssd %ymm0,%ymm1,%ymm2", "no level has vpdpbssd"),
    ("vpshldvd %zmm0,%zmm1,%zmm2", "no level has vpshldvd"), ("lzcnt  %rax,%rax", "no level has lzcnt"),
    ("vfmadd231ph %zmm0,%zmm1,%zmm2", "no level has vfmadd231ph"),
    ("vgf2p8mulb %zmm0,%zmm1,%zmm2", "no level has vgf2p8mulb"),
])  # fmt: skip
def test_classification(text: str, expected: str) -> None:
    assert feature(f"    1e7:\t{text}") == expected


def test_other_lines_are_not_instructions() -> None:
    for line in (
        "",
        "0000000000000000 <norm_avx512>:",
        "a.o:     file format elf64-x86-64",
        "Disassembly of section .text:",
    ):
        assert feature(line) is None


def level_of(path: Path) -> str:
    folder = next(part for part in path.parts if part.endswith(".dir"))
    return folder.removesuffix(".dir").removeprefix("kernels_") if folder.startswith("kernels_") else "scalar"


def objects() -> list[Path]:
    """Every object of the extension; objects of tests and of the compiler's own checks excluded."""
    return sorted(
        p for p in Path(BUILD, "CMakeFiles").glob("**/*.o") if re.search(r"/(kernels_\w+|core|_C)\.dir/", str(p))
    )


def run(*command: str) -> Iterator[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    yield from done.stdout.splitlines()


def above(path: Path, level: str) -> dict[str, str]:
    """Instruction sets in the object that the level lacks, each with the first line that needs it."""
    found: dict[str, str] = {}
    for line in run("objdump", "-d", "--no-show-raw-insn", str(path)):
        needed = feature(line)
        if needed and needed not in ALLOWED[level]:
            found.setdefault(needed, line.strip())
    return found


@needs_objects
def test_no_instruction_above_the_level() -> None:
    paths = objects()
    assert {level_of(p) for p in paths} >= {"scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"}
    wrong = {str(p): found for p in paths if (found := above(p, level_of(p)))}
    assert not wrong


@needs_objects
@pytest.mark.parametrize("level, lower, finds", [
    ("avx2", "scalar", "avx2"), ("avxvnni", "avx2", "avxvnni"), ("avx512", "avxvnni", "avx512"),
    ("avx512bf16", "avx512", "avx512bf16"), ("amx", "avx512bf16", "amx"),
])  # fmt: skip
def test_the_check_finds_what_a_level_adds(level: str, lower: str, finds: str) -> None:
    """The same objects held to the level below must be reported, or the check above proves nothing."""
    paths = [p for p in objects() if level_of(p) == level]
    assert paths
    assert any(finds in above(p, lower) for p in paths)


@needs_objects
def test_kernels_export_only_their_own_strong_names() -> None:
    """A weak or unique symbol compiled with ISA flags could replace the portable copy and crash an older CPU; a name
    without its level could be linked twice."""
    wrong = []
    for path in objects():
        if "kernels_" not in str(path):
            continue
        level = level_of(path)
        symbols = [line.split(maxsplit=2) for line in run("nm", "-C", "--defined-only", str(path))]
        assert any(kind == "T" for _, kind, _ in symbols), f"{path} exports nothing"
        for _, kind, name in symbols:
            if kind in "WVwvu" or (kind.isupper() and not name.split("(")[0].endswith(f"_{level}")):
                wrong.append(f"{path.name} ({level}): {kind} {name}")
    assert not wrong


@needs_objects
def test_amx_tiles() -> None:
    """What the emulated build cannot show: that the instructions are there, each with its operands in their order
    (objdump names B's tile, A's, C's; attention_tile.h keeps C in 0-3, A in 4 and 5, B in 6 and 7)."""
    (path,) = (p for p in objects() if level_of(p) == "amx" and p.name == "attention_prefill.cpp.o")
    found = [m.groups() for line in run("objdump", "-d", "--no-show-raw-insn", str(path)) if (m := _LINE.match(line))]
    tiles = [(name, operands.strip()) for _, name, operands in found if _AMX.fullmatch(name)]
    assert {name for name, _ in tiles} == {
        "ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"
    }  # fmt: skip
    products = {operands for name, operands in tiles if name == "tdpbf16ps"}
    assert products == {f"%tmm{6 + j},%tmm{4 + i},%tmm{2 * i + j}" for i in (0, 1) for j in (0, 1)}
    assert all(re.match(r"%tmm[0-3],", operands) for name, operands in tiles if name == "tilestored")


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_no_wheel_holds_an_emulated_amx(tmp_path: Path) -> None:
    """scikit-build-core sets SKBUILD; the emulation is refused there."""
    source = Path(__file__).parent.parent
    command = ["cmake", "-S", source, "-B", tmp_path, "-DSKBUILD=2", "-DTILEWRIGHT_EMULATE_AMX=ON"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "a wheel must not hold an emulated AMX" in done.stderr


@needs_objects
def test_the_extension_does_not_link_torch() -> None:
    libraries = list(Path(BUILD).glob("_C*.so"))
    assert libraries
    for library in libraries:
        needed = [line for line in run("objdump", "-p", str(library)) if "NEEDED" in line]
        assert needed and not any("torch" in line or "c10" in line or "stdc++" in line for line in needed), needed
