"""sensors.py on machines of paper: folders that look like /sys and /proc of a PC, a Jetson and a Raspberry Pi."""

import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy.on_device import sensors


def stat(number: int, name: str, parent: int, ticks: int) -> str:
    """A line of /proc/PID/stat: proc(5)."""
    return f"{number} ({name}) S {parent} 7 7 0 -1 4194304 0 0 0 0 {ticks} 0 0 0 20 0 1 0 100"


PC = {
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "3000000",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2800000",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7",
    "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp",
    "sys/class/thermal/thermal_zone0/temp": "61000",
    "sys/class/thermal/cooling_device0/type": "Processor",
    "sys/class/thermal/cooling_device0/cur_state": "0",
    "sys/class/thermal/cooling_device1/type": "pwm-fan",
    "sys/class/thermal/cooling_device1/cur_state": "3",
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "900000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "1000000000",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
    "sys/class/powercap/intel-rapl:1/name": "psys",
    "sys/class/powercap/intel-rapl:1/energy_uj": "1",
    "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\nfull avg10=0.00 total=0",
    "proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 1 1 1",
    "proc/self/stat": stat(7, "python", 1, 40),
    "proc/7/stat": stat(7, "python", 1, 40),
    "proc/8/stat": stat(8, "a) worker (", 7, 60),
    "proc/9/stat": stat(9, "other", 1, 1000),
    "proc/self/status": "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB",
}
JETSON = {
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "2000",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "0",
    "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
    "sys/class/thermal/cooling_device0/cur_state": "0",
}
PI = {"sys/devices/platform/soc/soc:firmware/get_throttled": "0"}
PI_5 = {"sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0"}


def paper(folder: Path, files: dict[str, str]) -> Path:
    """A machine of files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


def watched(root: Path, change: dict[str, str]) -> dict[str, Any]:
    """What a watch says when files change while it watches."""
    watch = sensors.Watch(str(root))
    paper(root, change)
    watch.look()
    found = watch.summary()
    json.dumps(found, allow_nan=False)
    return found


def test_a_quiet_machine(tmp_path: Path) -> None:
    found = watched(paper(tmp_path, PC), {})
    assert found["cpu_clock_mhz"] == [2800, 3000]
    assert found["temperatures_c"] == {"x86_pkg_temp": [61, 61]}
    assert found["throttled"] == [], "there are sensors, and the fan is none that slows"
    assert found["busy"] == 0
    assert found["warnings"] == []


def test_a_machine_that_tells_nothing_is_not_said_to_be_fine(tmp_path: Path) -> None:
    found = watched(tmp_path, {})
    assert {found[key] for key in ("cpu_clock_mhz", "gpu_clock_mhz", "throttled", "busy", "stolen", "others")} == {None}
    assert found["temperatures_c"] is None
    assert sensors.memory_bytes(str(tmp_path)) == {"now": None, "peak": None}
    assert not sensors.EnergyMeter(str(tmp_path)).there


@pytest.mark.parametrize(
    ("machine", "file", "text", "words"),
    [
        (PC, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "9", "core_throttle_count rose by 2"),
        (PC, "sys/class/thermal/cooling_device0/cur_state", "2", "Processor was active"),
        (JETSON, "sys/class/thermal/cooling_device0/cur_state", "1", "cpufreq-cpu0 was active"),
        (JETSON, "sys/class/hwmon/hwmon2/oc1_event_cnt", "3", "hwmon2 oc1_event_cnt rose by 3"),
        (PI, "sys/devices/platform/soc/soc:firmware/get_throttled", "50005", "under-voltage"),
        (PI, "sys/devices/platform/soc/soc:firmware/get_throttled", "0x4", "throttled"),
        (PI_5, "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "0x4", "throttled"),
    ],
)
def test_throttling_is_seen(machine: dict[str, str], file: str, text: str, words: str, tmp_path: Path) -> None:
    found = watched(paper(tmp_path, machine), {file: text})
    assert words in " ".join(found["throttled"])


def test_throttling_that_is_over_at_the_end_is_seen_too(tmp_path: Path) -> None:
    root = paper(tmp_path, JETSON)
    watch, state = sensors.Watch(str(root)), root / "sys/class/thermal/cooling_device0/cur_state"
    state.write_text("2")
    watch.look()
    state.write_text("0")
    assert watch.summary()["throttled"] == ["cpufreq-cpu0 was active"]


def test_what_a_raspberry_pi_remembers_from_earlier_is_not_now(tmp_path: Path) -> None:
    firmware = "sys/devices/platform/soc/soc:firmware/get_throttled"
    found = watched(paper(tmp_path, {**PI, firmware: "50000"}), {firmware: "50000"})
    assert found["throttled"] == []


def test_what_a_raspberry_pi_did_between_two_looks_is_remembered(tmp_path: Path) -> None:
    firmware = "sys/devices/platform/soc/soc:firmware/get_throttled"
    found = watched(paper(tmp_path, {**PI, firmware: "10000"}), {firmware: "50000"})
    assert found["throttled"] == ["throttled"]


def test_a_busy_machine_is_called_busy(tmp_path: Path) -> None:
    change = {"proc/pressure/cpu": "some avg10=9 total=900000000", "proc/stat": "cpu  200 0 100 800 0 0 0 50 0 0"}
    found = watched(paper(tmp_path, PC), change)
    busy, stolen, _ = found["warnings"]
    assert "unstable because the machine is busy: processes waited for a processor" in busy
    assert stolen == "unstable because the hypervisor gave 33.3% of the processors' time to others"


def test_programs_on_other_processors_disturb_too(tmp_path: Path) -> None:
    change = {"proc/stat": "cpu  200 0 120 980 0 0 0 0 0 0", "proc/9/stat": stat(9, "other", 1, 1090)}
    change |= {"proc/self/stat": stat(7, "python", 1, 50), "proc/8/stat": stat(8, "a) worker (", 7, 80)}
    found = watched(paper(tmp_path, PC), change)
    assert found["others"] == pytest.approx(0.3), "120 of 300 ticks were worked, 30 by this process and its child"
    assert found["warnings"] == ["unstable because other programs used 30% of the processors' time"]


@pytest.mark.parametrize("file", ["sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"])
def test_a_container_that_used_up_its_share_waits(file: str, tmp_path: Path) -> None:
    root = paper(tmp_path, PC | {file: "usage_usec 900\nnr_periods 100\nnr_throttled 7\nthrottled_usec 5"})
    found = watched(root, {file: "usage_usec 999\nnr_periods 180\nnr_throttled 27\nthrottled_usec 99"})
    assert found["limited"] == 0.25
    (warning,) = found["warnings"]
    assert warning.startswith("unstable because the container had used up its processors' time in 25% of the periods")
    assert watched(root, {})["warnings"] == [], "what was before does not count"


def test_a_machine_without_a_container_has_no_share_to_use_up(tmp_path: Path) -> None:
    root = paper(tmp_path, PC | {"sys/fs/cgroup/cpu.stat": "usage_usec 900\nuser_usec 5\nsystem_usec 3"})
    assert watched(root, {})["limited"] is None


def test_a_child_that_ended_was_no_other_program(tmp_path: Path) -> None:
    ended = stat(7, "python", 1, 40).replace(" 0 0 0 20 0 1 ", " 0 90 0 20 0 1 ")
    root = paper(tmp_path, PC)
    watch = sensors.Watch(str(root))
    (root / "proc/8/stat").unlink()
    paper(root, {"proc/self/stat": ended, "proc/7/stat": ended, "proc/stat": "cpu  130 0 100 870 0 0 0 0 0 0"})
    assert watch.summary()["others"] == 0


def test_memory_is_this_process_alone(tmp_path: Path) -> None:
    assert sensors.memory_bytes(str(paper(tmp_path, PC))) == {"now": 1 << 20, "peak": 2 << 20}


# ------------------------------------------------------------------------------------------------ energy


def test_rapl_counts_packages_once_and_goes_round(tmp_path: Path) -> None:
    root = paper(tmp_path, PC)

    def work() -> int:
        (root / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("100000000")  # 200 J on, past its end
        return 50

    found = sensors.EnergyMeter(str(root)).measure(work)
    assert found is not None
    assert found["joules_per_run"] == pytest.approx({"RAPL package-0": 4.0})
    assert found["runs"] == 50


def test_a_counter_that_stands_still_is_no_measurement(tmp_path: Path) -> None:
    assert sensors.EnergyMeter(str(paper(tmp_path, PC))).measure(lambda: 5) is None


def test_power_of_a_jetsons_rails_is_added_up(tmp_path: Path) -> None:
    meter = sensors.EnergyMeter(str(paper(tmp_path, JETSON)))

    def work() -> int:
        time.sleep(0.1)
        return 10

    found = meter.measure(work)
    assert found is not None
    assert found["joules_per_run"]["INA3221 VDD_IN"] * 10 == pytest.approx(10.0 * found["seconds"], rel=0.5)


# -------------------------------------------------------------------------------------------- NVIDIA GPUs


class FakeLibrary:
    """Answers like libnvidia-ml with two GPUs; the second one supports nothing, as on a Jetson."""

    def __init__(self, **answers: int) -> None:
        self.answers = answers

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's name
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802 - NVML's name
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802 - NVML's name
        handle._obj.value = index + 1
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in self.answers:
            raise AttributeError(name)

        def answer(device: ctypes.c_void_p, *arguments: Any) -> int:
            if device.value != 1:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            arguments[-1]._obj.value = self.answers[name]
            return 0

        return answer


def test_a_gpu_that_throttles(tmp_path: Path) -> None:
    library = FakeLibrary(
        nvmlDeviceGetClockInfo=1500,
        nvmlDeviceGetTemperature=83,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x1,
        nvmlDeviceGetTotalEnergyConsumption=5000,
    )
    gpus = sensors.Nvml(library=library)
    assert gpus.state()["gpu1"] == {}
    watch = sensors.Watch(str(tmp_path), gpus)
    assert watch.summary()["throttled"] == [], "an idle GPU does not throttle"
    library.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x21
    found = watch.summary()
    assert found["throttled"] == ["gpu0: temperature"]
    assert found["gpu_clock_mhz"] == {"gpu0": [1500, 1500]}
    assert found["temperatures_c"] == {"gpu0": [83, 83]}

    def work() -> int:
        library.answers["nvmlDeviceGetTotalEnergyConsumption"] += 3000
        return 6

    energy = sensors.EnergyMeter(str(tmp_path), gpus).measure(work)
    assert energy is not None
    assert energy["joules_per_run"] == {"NVML gpu0": 0.5}


def test_of_several_gpus_only_the_one_that_works(tmp_path: Path) -> None:
    """Another one at its power cap, with somebody else's training on it, makes no time invalid."""
    by_address = {b"0000:65:00.0": 1, b"0000:b3:00.0": 2}

    class Two(FakeLibrary):
        def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:  # noqa: N802 - NVML's name
            handle._obj.value = by_address.get(bus, 0)
            return 0 if bus in by_address else 6  # NVML_ERROR_NOT_FOUND

        def nvmlDeviceGetIndex(self, handle: ctypes.c_void_p, index: Any) -> int:  # noqa: N802 - NVML's name
            index._obj.value = (handle.value or 0) - 1
            return 0

    library = Two(nvmlDeviceGetCurrentClocksThrottleReasons=0x4)  # the first one's; the second one tells nothing
    told = {
        bus: sensors.Watch(str(tmp_path), sensors.Nvml(bus, library)).summary()["throttled"]
        for bus in ("0000:65:00.0", "0000:b3:00.0", "0000:ff:00.0", None)
    }
    slowed = ["gpu0: power cap"]
    assert told == {"0000:65:00.0": slowed, "0000:b3:00.0": None, "0000:ff:00.0": slowed, None: slowed}
    assert list(sensors.Nvml("0000:b3:00.0", library).devices) == ["gpu1"]


def test_this_machine_can_be_watched() -> None:
    watch = sensors.Watch()
    json.dumps(watch.summary(), allow_nan=False)
    if Path("/proc/self/status").exists():
        memory = sensors.memory_bytes()
        assert memory["now"]
        assert memory["peak"]
        assert memory["peak"] >= memory["now"]
