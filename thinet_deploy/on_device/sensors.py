"""What the machine says of itself while something is timed: clocks, temperature, throttling, load, memory, energy.

Python 3.8 and the standard library only: a copy lies beside run.py in every bundle. What a machine does not tell is
absent or None, never 0. Everything is read below a root folder ("/"), so that tests can show it other machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from pathlib import Path
from typing import Any, Callable, Mapping

# Shares of the time above which somebody else's work shows in a measurement. What others compute on processors of
# their own counts too: caches, memory and the clock's headroom are shared.
BUSY, STOLEN, OTHERS, LIMITED = 0.05, 0.01, 0.1, 0.01
# A cooling device of such a type slows the processor down while its state is not 0; fans do not.
_SLOWING = re.compile(r"cpufreq|devfreq|processor|gpu|cpu-throttle", re.IGNORECASE)
# Bits of the Raspberry Pi firmware's get_throttled that hold now: documentation of vcgencmd.
_PI_BITS = {0: "under-voltage", 1: "capped frequency", 2: "throttled", 3: "soft temperature limit"}
_RAIL_PERIOD_S = 0.02


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return ""


def _number(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_text(path))
    return None


def _numbers(root: Path, pattern: str, scale: float) -> dict[str, float]:
    """Files that hold a number, by the path's part that `pattern` leaves open."""
    found = {path: _number(path) for path in sorted(root.glob(pattern))}
    return {path.relative_to(root).as_posix(): value * scale for path, value in found.items() if value is not None}


def cpu_limit(read: Callable[[str], str] = lambda path: _text(Path(path))) -> float | None:
    """How many processors' time a container may use (cgroup 2, then 1); None without a limit."""
    group = "/sys/fs/cgroup"
    two = read(f"{group}/cpu.max").split()
    one = [read(f"{group}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = two if len(two) == 2 else one
    return round(int(quota) / int(period), 3) if quota.isdigit() and period.isdigit() else None


# ------------------------------------------------------------------------------------------- NVIDIA GPUs


class Nvml:
    """NVIDIA's management library, as far as it is there: on a Jetson it answers to little.

    Source of names and numbers: nvml.h (NVML API reference, read 2026-11).

    Args:
        bus: PCI address of the GPU that works (`cuda.bus_id`): what slows another one down says nothing of it. All GPUs
            where there is no such address, or the library does not know it.
        library: libnvidia-ml.
    """

    def __init__(self, bus: str | None = None, library: Any = None) -> None:
        self.devices: dict[str, ctypes.c_void_p] = {}
        with contextlib.suppress(OSError):
            self.library = library or ctypes.CDLL("libnvidia-ml.so.1")
            count = ctypes.c_uint()
            if self.library.nvmlInit_v2() == 0 and self.library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                self.devices = self._one(bus) or {f"gpu{at}": self._handle(at) for at in range(count.value)}

    def _handle(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        return handle

    def _one(self, bus: str | None) -> dict[str, ctypes.c_void_p]:
        handle, index = ctypes.c_void_p(), ctypes.c_uint()
        with contextlib.suppress(AttributeError):
            if bus and not self.library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)):
                self.library.nvmlDeviceGetIndex(handle, ctypes.byref(index))
                return {f"gpu{index.value}": handle}
        return {}

    def _ask(self, name: str, device: ctypes.c_void_p, *arguments: int) -> int | None:
        # Eight bytes hold answers of four as well: all these machines are little-endian.
        answer, function = ctypes.c_ulonglong(), getattr(self.library, name, None)
        if function is None or function(device, *arguments, ctypes.byref(answer)) != 0:
            return None
        return int(answer.value)

    def state(self) -> dict[str, dict[str, int]]:
        """Per GPU: clock_mhz (SM), temperature_c, slowed (reasons as a bit mask), energy_mj since the driver loaded."""
        found: dict[str, dict[str, int]] = {}
        for gpu, device in self.devices.items():
            answers = {key: self._ask(name, device, *given) for key, (name, *given) in _QUESTIONS.items()}
            found[gpu] = {key: value for key, value in answers.items() if value is not None}
        return found


_QUESTIONS: dict[str, tuple[Any, ...]] = {
    "clock_mhz": ("nvmlDeviceGetClockInfo", 1),  # NVML_CLOCK_SM
    "temperature_c": ("nvmlDeviceGetTemperature", 0),  # NVML_TEMPERATURE_GPU
    "slowed": ("nvmlDeviceGetCurrentClocksThrottleReasons",),
    "energy_mj": ("nvmlDeviceGetTotalEnergyConsumption",),
}
# Of nvmlClocksEventReasons: what slows a GPU that has work to do. Idle and clocks that the user set do not.
_GPU_BITS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}


# ------------------------------------------------------------------------------------------------ watching


class Watch:
    """Looks at the machine from its making on, whenever `look` is called, and says what happened in between.

    Args:
        root: where /sys and /proc are.
        gpus: NVIDIA's library where the work is a GPU's: what slows a GPU down says nothing of work on the CPU.
    """

    def __init__(self, root: str = "/", gpus: Nvml | None = None) -> None:
        self.root, self.gpus = Path(root), gpus
        self.started, self.looks = time.perf_counter(), [self._state()]
        self._own_before = self._own_ticks()

    def look(self) -> None:
        """Read the sensors once; takes well under a millisecond per core."""
        self.looks.append(self._state())

    def _state(self) -> dict[str, Any]:
        cpu, thermal = "sys/devices/system/cpu", "sys/class/thermal"
        events = _numbers(self.root, f"{cpu}/cpu[0-9]*/thermal_throttle/*_throttle_count", 1)
        events.update(_numbers(self.root, "sys/class/hwmon/hwmon*/oc*_event_cnt", 1))
        cooling = _numbers(self.root, f"{thermal}/cooling_device*/cur_state", 1)
        slowing = {p: v for p, v in cooling.items() if _SLOWING.search(_text((self.root / p).with_name("type")))}
        return {
            "time": time.perf_counter(),
            "clocks_mhz": _numbers(self.root, f"{cpu}/cpu[0-9]*/cpufreq/scaling_cur_freq", 1e-3),
            "temperatures_c": _numbers(self.root, f"{thermal}/thermal_zone*/temp", 1e-3),
            "events": events,
            "slowing": slowing,
            "firmware": self._firmware(),
            "gpus": self.gpus.state() if self.gpus else {},
            "waited_us": self._waited_us(),
            "ticks": self._ticks(),
            "periods": self._periods(),
        }

    def _firmware(self) -> str:
        """What a Raspberry Pi's firmware says, "" elsewhere; in soc/soc:firmware up to the 4, then with an address."""
        return next(map(_text, self.root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled")), "")

    def _waited_us(self) -> int | None:
        """Time in which some process had to wait for a processor, since the machine started."""
        found = re.search(r"^some .*total=(\d+)", _text(self.root / "proc/pressure/cpu"), re.MULTILINE)
        return int(found[1]) if found else None

    def _ticks(self) -> list[int]:
        """Of all processors: user, nice, system, idle, iowait, irq, softirq, steal …"""
        found = re.search(r"^cpu +(.*)$", _text(self.root / "proc/stat"), re.MULTILINE)
        return [int(number) for number in found[1].split()] if found else []

    def _periods(self) -> tuple[int, int] | None:
        """How many periods of a container's quota there were, and in how many it was used up (cgroup 2, then 1)."""
        group = self.root / "sys/fs/cgroup"
        text = _text(group / "cpu.stat") or _text(group / "cpu/cpu.stat")
        all_, full = (re.search(rf"^nr_{name} (\d+)$", text, re.MULTILINE) for name in ("periods", "throttled"))
        return (int(all_[1]), int(full[1])) if all_ and full else None

    def _own_ticks(self) -> int | None:
        """Of this process and all that it started, the ended ones included."""
        found = _text(self.root / "proc/self/stat")
        if not found:
            return None
        mine, (me, _, own) = {}, _process(found)
        for path in self.root.glob("proc/[0-9]*/stat"):
            if text := _text(path):  # it may have ended meanwhile
                each, parent, used = _process(text)
                mine[each] = parent, used
        family = {me}
        while more := {each for each, (parent, _) in mine.items() if parent in family} - family:
            family |= more
        return own + sum(mine[each][1] for each in family - {me})

    def summary(self) -> dict[str, Any]:
        """JSON-ready: clocks and temperatures as [lowest, highest], `throttled`, and four shares; None if unknown.

        `throttled` is a list of reasons, empty when the sensors saw none. `busy` is the share of the time in which
        processes waited for a processor, `others` that of all processors in which other programs computed, `stolen`
        that which the hypervisor took away, `limited` that of the periods in which a container's quota was used up.
        `warnings` are sentences on these.
        """
        self.look()
        temperatures = {_text((self.root / p).with_name("type")) or p: _span(v) for p, v in self._of("temperatures_c")}
        temperatures.update({gpu: _span(v) for gpu, v in self._of_gpus("temperature_c")})
        clocks = [v for _, values in self._of("clocks_mhz") for v in values]
        busy, stolen, others, limited = self._busy(), self._stolen(), self._others(), self._limited()
        return {
            "seconds": self.looks[-1]["time"] - self.looks[0]["time"],
            "cpu_clock_mhz": _span(clocks) if clocks else None,
            "gpu_clock_mhz": {gpu: _span(v) for gpu, v in self._of_gpus("clock_mhz")} or None,
            "temperatures_c": temperatures or None,
            "throttled": self._throttled(),
            "busy": busy,
            "stolen": stolen,
            "others": others,
            "limited": limited,
            "warnings": _load_warnings(busy, stolen, others, limited),
        }

    def _of(self, what: str) -> list[tuple[str, list[float]]]:
        names = self.looks[0][what]
        return [(name, [look[what][name] for look in self.looks if name in look[what]]) for name in names]

    def _of_gpus(self, what: str) -> list[tuple[str, list[float]]]:
        names = [gpu for gpu, state in self.looks[0]["gpus"].items() if what in state]
        return [(gpu, [look["gpus"][gpu][what] for look in self.looks if what in look["gpus"][gpu]]) for gpu in names]

    def _throttled(self) -> list[str] | None:
        """Why the machine slowed itself down, in words; None where it has nothing that would tell."""
        found, told = [], False
        for name, counts in self._of("events"):
            told, more = True, counts[-1] - counts[0]
            found += [f"{_short(name)} rose by {more:g}"] if more > 0 else []
        for name, states in self._of("slowing"):
            told = True
            found += [f"{_text((self.root / name).with_name('type'))} was active"] if max(states) > 0 else []
        firmware = [int(look["firmware"], 16) for look in self.looks if look["firmware"]]
        # Sixteen bits up it remembers what was: what it did not remember at the start came between two looks.
        firmware = [value | (value & ~firmware[0]) >> 16 for value in firmware]
        masks = [("", firmware, _PI_BITS, True)]
        masks += [(f"{gpu}: ", [int(v) for v in v], _GPU_BITS, False) for gpu, v in self._of_gpus("slowed")]
        for who, values, bits, shift in masks:
            told = told or bool(values)
            found += [
                who + word
                for bit, word in bits.items()
                if any(value & (1 << bit if shift else bit) for value in values)
            ]
        return list(dict.fromkeys(found)) if told else None

    def _busy(self) -> float | None:
        first, last = self.looks[0], self.looks[-1]
        if first["waited_us"] is None or last["waited_us"] is None:
            return None
        return float((last["waited_us"] - first["waited_us"]) / 1e6 / max(last["time"] - first["time"], 1e-9))

    def _stolen(self) -> float | None:
        first, last = self.looks[0]["ticks"], self.looks[-1]["ticks"]
        if len(first) < 8 or len(last) < 8 or sum(last[:8]) <= sum(first[:8]):
            return None
        return float((last[7] - first[7]) / (sum(last[:8]) - sum(first[:8])))

    def _others(self) -> float | None:
        first, last = self.looks[0]["ticks"], self.looks[-1]["ticks"]
        before, after = self._own_before, self._own_ticks()
        if before is None or after is None or len(first) < 8 or sum(last[:8]) <= sum(first[:8]):
            return None
        worked = sum(last[index] - first[index] for index in (0, 1, 2, 5, 6))
        return float(max(0, worked - (after - before)) / (sum(last[:8]) - sum(first[:8])))

    def _limited(self) -> float | None:
        first, last = self.looks[0]["periods"], self.looks[-1]["periods"]
        if first is None or last is None:
            return None
        return float((last[1] - first[1]) / max(last[0] - first[0], 1))


def _span(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def _short(path: str) -> str:
    parts = path.split("/")
    return f"{next((part for part in parts if re.fullmatch('(cpu|hwmon)[0-9]+', part)), parts[0])} {parts[-1]}"


def _process(stat: str) -> tuple[int, int, int]:
    """Number, parent's number, and ticks that it and its ended children used: proc(5), /proc/PID/stat."""
    # The name, in parentheses, may hold anything.
    number, fields = int(stat.split(" ", 1)[0]), stat.rpartition(")")[2].split()
    return number, int(fields[1]), sum(map(int, fields[11:15]))


def _load_warnings(busy: float | None, stolen: float | None, others: float | None, limited: float | None) -> list[str]:
    found = []
    if busy is not None and busy > BUSY:
        found.append(f"unstable because the machine is busy: processes waited for a processor {busy:.0%} of the time")
    if stolen is not None and stolen > STOLEN:
        found.append(f"unstable because the hypervisor gave {stolen:.1%} of the processors' time to others")
    if others is not None and others > OTHERS:
        found.append(f"unstable because other programs used {others:.0%} of the processors' time")
    if limited is not None and limited > LIMITED:
        found.append(
            f"unstable because the container had used up its processors' time in {limited:.0%} of the periods"
            " (fewer threads, or a larger --cpus)"
        )
    return found


# -------------------------------------------------------------------------------------------------- memory


def memory_bytes(root: str = "/") -> dict[str, int | None]:
    """Resident memory of this process, now and at its highest; None where the system does not tell (not Linux)."""
    # Not getrusage: its peak includes the parent's memory from before the child became another program.
    status = _text(Path(root, "proc/self/status"))
    found = {key: re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE) for key, name in _STATUS.items()}
    return {key: int(match[1]) * 1024 if match else None for key, match in found.items()}


_STATUS = {"now": "VmRSS", "peak": "VmHWM"}


# -------------------------------------------------------------------------------------------------- energy


class EnergyMeter:
    """Energy that passes the machine's sensors: RAPL (x86), NVML (NVIDIA GPUs), INA3221 rails (Jetson).

    Each sensor sees a whole package, GPU or rail, not one process. Arguments are those of `Watch`.
    """

    def __init__(self, root: str = "/", gpus: Nvml | None = None) -> None:
        self.root, self.gpus = Path(root), gpus

    def measure(self, work: Callable[[], int]) -> dict[str, Any] | None:
        """Meter `work`, which returns how often it ran: joules per run by sensor; None without a sensor that moves."""
        rails: dict[str, float] = {}
        stop, before, start = threading.Event(), self._counters(), time.perf_counter()
        meter = threading.Thread(target=self._integrate, args=(rails, stop), daemon=True)
        meter.start()
        runs = work()
        seconds = time.perf_counter() - start
        stop.set()
        meter.join()
        joules = {**_used(before, self._counters()), **rails}
        per_run = {sensor: energy / runs for sensor, energy in joules.items() if energy > 0}
        return {"joules_per_run": per_run, "runs": runs, "seconds": seconds} if per_run else None

    @property
    def there(self) -> bool:
        """Whether there is any sensor."""
        return bool(self._counters() or self._watts())

    def _counters(self) -> dict[str, tuple[float, float]]:
        """Joules so far and where the counter starts again (0: never), by sensor."""
        found = {}
        for zone in sorted(self.root.glob("sys/class/powercap/intel-rapl:[0-9]*")):
            name, used = _text(zone / "name"), _number(zone / "energy_uj")
            # Sub-zones (intel-rapl:0:1) are part of their package, and psys holds all of it once more.
            if used is not None and zone.name.count(":") == 1 and name != "psys":
                found[f"RAPL {name}"] = (used / 1e6, (_number(zone / "max_energy_range_uj") or 0) / 1e6)
        for gpu, state in (self.gpus.state() if self.gpus else {}).items():
            if "energy_mj" in state:
                found[f"NVML {gpu}"] = (state["energy_mj"] / 1e3, 0.0)
        return found

    def _watts(self) -> dict[str, float]:
        """Power of the rails now: volts × amperes."""
        found = {}
        for label in sorted(self.root.glob("sys/class/hwmon/hwmon*/in*_label")):
            if _text(label.with_name("name")) == "ina3221":
                number = label.name[2 : -len("_label")]
                volts, amperes = (_number(label.with_name(f"{kind}{number}_input")) for kind in ("in", "curr"))
                if volts is not None and amperes is not None:  # in millivolts and milliamperes
                    found[f"INA3221 {_text(label)}"] = volts * amperes / 1e6
        return found

    def _integrate(self, rails: dict[str, float], stop: threading.Event) -> None:
        """Add up power × time until told to stop."""
        last = time.perf_counter()
        while watts := self._watts():
            done = stop.wait(_RAIL_PERIOD_S)
            now = time.perf_counter()
            for rail, power in watts.items():
                rails[rail] = rails.get(rail, 0.0) + power * (now - last)
            last = now
            if done:
                break


def _used(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Joules between two readings of counters; one that started again meanwhile counts on from its range."""
    used = {}
    for sensor, (end, again_at) in after.items():
        if sensor in before:
            energy = end - before[sensor][0]
            used[sensor] = energy if energy >= 0 else energy + again_at
    return used
