from __future__ import annotations

import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from thinet_deploy import target
from thinet_deploy.errors import TargetError, UnknownNameError
from thinet_deploy.interfaces import Precision
from thinet_deploy.target import TargetProfile, load_profile, profile_names

SHIPPED = {
    *("cpu", "nvidia-gpu", "raspberry-pi-5", "android", "ios"),
    *("jetson", "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor"),
}
MINIMAL = """
id = "mine"
family = "board"
os = "linux"
arch = "aarch64"
runtimes = ["ncnn"]
precisions = { supported = ["fp32", "fp16"], recommended = "fp16" }
build = { where = "host" }
sources = [{ facts = ["runtimes", "precisions"], source = "tried", as_of = 2026-01-02, confidence = "check" }]
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(TargetError) as caught:
        load_profile(write(folder, text))
    assert caught.value.exit_code == 2
    assert "mine.toml" in caught.value.what
    return str(caught.value)


def test_the_promised_targets_are_shipped() -> None:
    assert set(profile_names()) == SHIPPED
    assert profile_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_profile_loads_and_is_named_like_its_file(name: str) -> None:
    profile = load_profile(name)
    assert profile.id == name
    assert TargetProfile.model_validate(profile.model_dump(exclude_unset=True)) == profile


def test_ids_and_aliases_are_unique_and_resolve() -> None:
    names = Counter(n for i in profile_names() for n in (i, *load_profile(i).aliases))
    assert max(names.values()) == 1
    for owner in profile_names():
        for alias in load_profile(owner).aliases:
            assert load_profile(alias).id == owner


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_fact_has_a_dated_source(name: str) -> None:
    profile = load_profile(name)
    for fact in profile._given_facts():
        source = profile.source_of(fact)
        assert source is not None, fact
        assert source.as_of >= date(2026, 1, 1)


def test_the_entry_that_names_a_fact_comes_before_its_group() -> None:
    jetson = load_profile("jetson")
    confidences = {
        name: s.confidence for name in ("jetpack-6.2", "jetpack-7.2") if (s := jetson.source_of(f"stacks.{name}"))
    }
    assert confidences == {"jetpack-6.2": "documented", "jetpack-7.2": "third-party"}
    assert jetson.source_of("gpu") is None


@pytest.mark.parametrize("opset", range(17, target.EXPORT_OPSET + 1))
def test_every_opset_we_may_export_has_its_ir_version(tmp_path: Path, opset: int) -> None:
    from onnx.helper import OP_SET_ID_VERSION_MAP

    stack = f'stacks = [{{ name = "s", opset_max = {opset}, ir_max = 13 }}]\nsources'
    text = MINIMAL.replace('["runtimes", ', '["stacks", "runtimes", ').replace("sources", stack)
    mine = load_profile(write(tmp_path, text))
    assert (mine.opset, mine.ir_version) == (opset, OP_SET_ID_VERSION_MAP["ai.onnx", opset])


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_opset_and_ir_version_are_a_pair_that_every_stack_reads(name: str) -> None:
    from onnx.helper import OP_SET_ID_VERSION_MAP

    profile = load_profile(name)
    for build in [profile, *(profile.on_stack(stack.name) for stack in profile.stacks)]:
        assert build.ir_version == OP_SET_ID_VERSION_MAP["ai.onnx", build.opset]
        if build.stack:
            assert build.opset <= build.stack.opset_max
            assert build.ir_version <= build.stack.ir_max
            assert build.stack.ir_max == OP_SET_ID_VERSION_MAP["ai.onnx", build.stack.opset_max]


def test_the_jetson_default_is_jetpack_6_2() -> None:
    jetson = load_profile("jetson")
    assert jetson.stack is not None
    assert (jetson.stack.name, jetson.stack.tensorrt) == ("jetpack-6.2", "10.3.0")
    assert (jetson.opset, jetson.ir_version) == (20, 9)
    assert jetson.builds_on_device
    assert not jetson.is_local


def test_an_old_jetpack_lowers_the_opset() -> None:
    old = load_profile("jetson").on_stack("jetpack-5.1")
    assert (old.opset, old.ir_version) == (17, 8)
    assert load_profile("jetson").opset == 20


def test_an_unknown_stack_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"jetpack-6\.2"):
        load_profile("jetson").on_stack("jetpack-6.3")
    with pytest.raises(UnknownNameError):
        load_profile("jetson@")


def test_cpu_runs_here_with_openvino_first() -> None:
    cpu = load_profile("cpu")
    assert cpu.runtimes == ("openvino", "onnxruntime")
    assert cpu.is_local
    assert not cpu.builds_on_device


def test_modules_extend_jetson_and_state_their_own_hardware() -> None:
    family = load_profile("jetson")
    for name in ("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor"):
        module = load_profile(name)
        assert (module.family, module.runtimes, module.connect) == ("jetson", family.runtimes, "ssh")
        assert module.gpu is not None
        assert module.gpu.compute_capability == ("11.0" if name == "jetson-thor" else "8.7")
        assert module.memory is not None
        assert module.memory.unified
        assert module.part_numbers
        # A module lists only stacks that the family knows, with the same versions.
        known = {stack.name: stack for stack in family.stacks}
        for stack in module.stacks:
            assert stack.tensorrt == known[stack.name].tensorrt
            assert stack.l4t == known[stack.name].l4t


def test_no_dla_on_orin_nano_and_thor() -> None:
    for name in ("jetson-orin-nano", "jetson-thor"):
        dla = load_profile(name).dla
        assert dla is not None
        assert dla.cores == 0
    assert load_profile("jetson").dla is None  # differs from module to module, so the family does not say


def test_a_forbidden_precision_is_refused_with_its_reason() -> None:
    cpu = load_profile("cpu")
    cpu.require_precision("int8")
    with pytest.raises(TargetError, match=r"cpu cannot compute in fp16: ONNX Runtime widens") as caught:
        cpu.require_precision("fp16")
    assert "int8" in caught.value.hint
    with pytest.raises(TargetError, match="does not list it"):
        load_profile("ios").require_precision("bf16")


def test_an_unknown_target_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jetson'"):
        load_profile("jetsno")


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_profile("cpu").channel_grid = 3  # type: ignore[misc]


def test_a_profile_of_the_user_loads(tmp_path: Path) -> None:
    mine = load_profile(write(tmp_path, MINIMAL))
    assert mine.runtimes == ("ncnn",)
    assert (mine.opset, mine.ir_version, mine.channel_grid, mine.connect) == (20, 9, 1, None)


def test_a_profile_of_the_user_extends_a_built_in_one(tmp_path: Path) -> None:
    text = """
        extends = "orin-nano"
        id = "our-camera"
        part_numbers = ["p3767-0004"]
        memory = { total_mb = [4096] }
        build = { ram_guard_mb = 300 }
        sources = [{ facts = ["part_numbers", "memory"], source = "ours", as_of = 2026-11-20, confidence = "check" }]
    """
    mine, base = load_profile(write(tmp_path, text)), load_profile("jetson-orin-nano")
    assert (mine.id, mine.aliases) == ("our-camera", ())  # aliases stay with the one that has them
    assert mine.part_numbers == ("p3767-0004",)  # lists replace
    assert mine.memory is not None
    assert (mine.memory.total_mb, mine.memory.unified) == ((4096,), True)  # tables merge
    assert (mine.build.ram_guard_mb, mine.build.workspace_mb) == (300, base.build.workspace_mb)
    assert mine.stacks == base.stacks
    assert {s.source for f in ("memory", "part_numbers") if (s := mine.source_of(f))} == {"ours"}
    assert mine.source_of("stacks") == base.source_of("stacks")


def test_a_source_of_the_base_does_not_vouch_for_what_is_stated_anew(tmp_path: Path) -> None:
    text = 'extends = "jetson-orin-nano"\nid = "mine"\npart_numbers = ["p1"]\n'
    assert "no [[sources]] entry covers part_numbers" in error_of(tmp_path, text)


def test_a_profile_extends_another_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.toml")
    mine = load_profile(write(tmp_path, 'extends = "base.toml"\nid = "second"\n'))
    assert (mine.id, mine.family) == ("second", "board")


@pytest.mark.parametrize("first", ["b.toml", "../{here}/b.toml"])
def test_a_circle_is_refused(tmp_path: Path, first: str) -> None:
    write(tmp_path, 'extends = "a.toml"\nid = "b"\n', "b.toml")
    path = write(tmp_path, f'extends = "{first.format(here=tmp_path.name)}"\nid = "a"\n', "a.toml")
    with pytest.raises(TargetError, match=r"a\.toml → b\.toml → a\.toml"):
        load_profile(path)


def test_an_extended_name_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="jetson"):
        load_profile(write(tmp_path, 'extends = "jetsonn"\nid = "mine"\n'))


SWAPS = [
    ('os = "linux"', 'os = "linux"\ncolour = "red"', "colour: there is no such field"),
    ('where = "host"', 'where = "cloud"', "build.where"),
    ('where = "host"', 'where = "host", ram_mb = 3', "build.ram_mb: there is no such field"),
    ('family = "board"', "family = 7", "family"),
    ('id = "mine"', "", "id: Field required"),
    ('["ncnn"]', '["ncmm"]', "runtimes.0"),
    ('"fp16"], recommended = "fp16"', '"fp16"], recommended = "int8"', "'int8' is not among supported"),
    ('recommended = "fp16"', 'recommended = "fp16", forbidden = { fp16 = "no" }', "both supported and forbidden: fp16"),
    ('os = "linux"', 'os = "linux"\nsoc = "x1"', "no [[sources]] entry covers soc"),
    ('["runtimes", ', '["runtimes", "gpu", ', "speaks of what is not stated: gpu"),
    ('["runtimes", ', '["runtimes", "stacks.x", ', "speaks of what is not stated: stacks.x"),
    ("as_of = 2026-01-02, ", "", "sources.0.as_of: Field required"),
    ('"check"', '"sure"', "sources.0.confidence"),
    ('os = "linux"', 'os = "linux"\ndetect = [{ pattern = "x" }]', "give either file or command"),
    ('os = "linux"', 'os = "linux"\ndetect = [{ file = "/f", pattern = "(" }]', "not a regular expression"),
    ('os = "linux"', 'os = "linux"\nextends = 3', "extends must be the name"),
    ('os = "linux"', 'os = "linux', "not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "expected"), SWAPS)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    assert expected in error_of(tmp_path, MINIMAL.replace(old, new, 1))


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        ([("a", False), ("b", False)], "exactly one of several stacks must have default = true"),
        ([("a", True), ("b", True)], "exactly one of several stacks must have default = true"),
        ([("a", True), ("a", False)], "two stacks have the same name"),
    ],
)
def test_stacks_need_names_and_one_default(tmp_path: Path, stacks: list[tuple[str, bool]], expected: str) -> None:
    rows = ", ".join(
        f'{{ name = "{name}", opset_max = 20, ir_max = 9, default = {str(default).lower()} }}'
        for name, default in stacks
    )
    text = MINIMAL.replace('["runtimes", ', '["stacks", "runtimes", ').replace("sources", f"stacks = [{rows}]\nsources")
    assert expected in error_of(tmp_path, text)


def test_a_missing_file_is_an_error_with_a_way_on(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"none\.toml cannot be read: No such file") as caught:
        load_profile(str(tmp_path / "none.toml"))
    assert "thinet-deploy targets" in caught.value.hint


def test_malformed_sources_do_not_crash_an_extension(tmp_path: Path) -> None:
    assert "sources" in error_of(tmp_path, 'extends = "cpu"\nid = "mine"\nsources = "me"\n')
    assert "sources.0" in error_of(tmp_path, 'extends = "cpu"\nid = "mine"\nsources = ["me"]\n')


def test_importing_loads_no_runtime() -> None:
    code = (
        "import sys; from thinet_deploy import target, environment; target.load_profile('jetson');"
        "environment.fingerprint(); environment.doctor();"
        "print(*{'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_profile_files_are_found_in_the_installed_package() -> None:
    assert set(target._builtin()) == SHIPPED


@pytest.mark.parametrize(
    ("name", "stack", "core", "why"),
    [
        ("jetson-orin-nano", "jetpack-6.2", 0, "it has none"),
        ("jetson-thor", "jetpack-7.1", 0, "it has none"),
        ("jetson-agx-orin", "jetpack-6.2", 2, "it has 2"),
        ("jetson-agx-orin", "jetpack-7.2", 0, "jetpack-7.2 cannot drive one"),
        ("cpu", "", 0, "its profile knows of none"),
    ],
)
def test_a_dla_that_is_not_there_is_refused(name: str, stack: str, core: int, why: str) -> None:
    profile = load_profile(name)
    profile = profile.on_stack(stack) if stack else profile
    with pytest.raises(TargetError, match=f"DLA {core} was asked for on {name}: {why}"):
        profile.require_dla(core)


@pytest.mark.parametrize("name", ["jetson", "jetson-agx-orin"])
def test_a_dla_that_is_there_may_be_asked_for(name: str) -> None:
    load_profile(name).require_dla(0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_dla_is_not_asked_for_what_it_cannot_compute_in(precision: Precision) -> None:
    board = load_profile("jetson-agx-orin")
    said = f"with jetpack-6.2 it takes ONNX files in fp16 only, not in {precision}"
    with pytest.raises(TargetError, match=said):
        board.require_dla(0, precision)
    newest = board.on_stack("jetpack-7.2.2")
    newest.require_dla(0, "int8")
    board.require_dla(0, "fp16")
    assert (board.dla_precisions, newest.dla_precisions) == (("fp16",), ("fp16", "int8"))


def test_a_stack_is_found_by_its_jetson_linux() -> None:
    jetson = load_profile("jetson")
    assert [jetson.stack_of(l4t) and jetson.stack_of(l4t).name for l4t in ("36.4.3", "36.40", "")] == [  # type: ignore[union-attr]
        "jetpack-6.2",
        None,
        None,
    ]
