"""What a Jetson says of itself: release, module, power mode, clocks and power, all without root.

The functions over text are pure. Those that read the device give None or nothing where there is
nothing to read: not a Jetson, in a container, not permitted.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

SYS = Path("/sys")
RELEASE = Path("/etc/nv_tegra_release")
MODEL = Path("/proc/device-tree/model")
MEMINFO = Path("/proc/meminfo")

_PATIENCE_S = 5.0
_NOT_CONNECTED = "NC"  # name of a power rail that leads nowhere


@dataclass(frozen=True)
class JetPack:
    """What a release of JetPack comes with."""

    name: str  # as 6.2.1
    tensorrt: str  # the numbers of its version that are known, as 10.3.0
    cuda: str
    python: str


_5 = ("8.5.2", "11.4", "3.8")
_6 = ("10.3.0", "12.6", "3.10")
_7_0 = ("10.13", "13.0", "3.12")
_7_2 = ("10.16.2", "13.2", "3.12")

JETPACKS: Mapping[str, JetPack] = MappingProxyType(
    {
        "35.2.1": JetPack("5.1", *_5),
        "35.3.1": JetPack("5.1.1", *_5),
        "35.4.1": JetPack("5.1.2", *_5),
        "35.5.0": JetPack("5.1.3", *_5),
        "35.6.0": JetPack("5.1.4", *_5),
        "35.6.1": JetPack("5.1.5", *_5),
        "35.6.2": JetPack("5.1.5", *_5),
        "35.6.4": JetPack("5.1.6", *_5),
        "36.3.0": JetPack("6.0", "8.6.2", "12.2", "3.10"),
        "36.4.0": JetPack("6.1", *_6),
        "36.4.3": JetPack("6.2", *_6),
        "36.4.4": JetPack("6.2.1", *_6),
        "36.4.7": JetPack("6.2.1", *_6),
        "36.5.0": JetPack("6.2.2", *_6),
        "38.2.0": JetPack("7.0", *_7_0),
        "38.2.1": JetPack("7.0", *_7_0),
        "38.2.2": JetPack("7.0", *_7_0),
        "38.4.0": JetPack("7.1", *_7_0),
        "39.2.0": JetPack("7.2", *_7_2),
        "39.2.1": JetPack("7.2.1", *_7_2),
    }
)
"""By L4T release (https://developer.nvidia.com/embedded/jetpack-archive). One that is not here is
newer than this table, or a preview: what it comes with is not known, and not guessed."""

_GENERATIONS = {35: 5, 36: 6, 38: 7, 39: 7}


def l4t_version(release: str) -> str | None:
    """The L4T release, as 36.4.3, out of the text of /etc/nv_tegra_release."""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", release)
    return ".".join(found.groups()) if found else None


def jetpack_generation(l4t: str) -> int | None:
    """5, 6 or 7, also for a release that is not in JETPACKS; None if newer than all of those."""
    return _GENERATIONS.get(int(l4t.split(".")[0]))


def parse_power_mode(nvpmodel: str) -> tuple[str, int | None] | None:
    """Name and number of the power mode, out of what `nvpmodel -q` prints."""
    found = re.search(r"NV Power Mode: *(\S+) *(?:\n *(\d+) *$)?", nvpmodel, re.MULTILINE)
    if not found:
        return None
    name, number = found.groups()
    return name, int(number) if number else None


def release(path: Path = RELEASE) -> str | None:
    """The line of /etc/nv_tegra_release that names the release; None: not a Jetson."""
    text = _read(path)
    return text.splitlines()[0] if text else None


def module_name(path: Path = MODEL) -> str | None:
    """What the device tree calls this board, as "NVIDIA Jetson AGX Orin Developer Kit"."""
    return _read(path)


def power_mode() -> str | None:
    """Name and number of the power mode in force, as "MAXN (0)"."""
    try:
        # It complains about what only root can read, and fails then, but says the mode first.
        found = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    mode = parse_power_mode(found.stdout)
    if mode is None:
        return None
    return mode[0] if mode[1] is None else f"{mode[0]} ({mode[1]})"


def power_mw(root: Path = SYS) -> dict[str, float]:
    """Power in mW that each rail draws now, by the name of the rail.

    From the power monitors on the board, INA3221 and INA238: VDD_IN, or VIN on Thor, is all that
    the module or board draws, where there is such a rail; others are parts of it. Units as in
    https://docs.kernel.org/hwmon/sysfs-interface.html (mV, mA, uW).
    """
    rails: dict[str, float] = {}
    for chip in sorted(root.glob("class/hwmon/hwmon*")):
        if (_read(chip / "name") or "").startswith("ina"):
            for channel, label in _channels(chip).items():
                power = _channel_mw(chip, channel)
                if power is not None and label != _NOT_CONNECTED:
                    rails[label] = power
    return rails


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Memory that programs can have, what only caches files included."""
    found = re.search(r"^MemAvailable: *(\d+) kB$", _read(meminfo) or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def clocks_mhz(root: Path = SYS) -> dict[str, float]:
    """The clocks in MHz that GPU and CPU cores run at now, by the kernel's names for them."""
    kernel = root / "devices/system/cpu"
    files = {p.parent.name: (p, 1e6) for p in root.glob("class/devfreq/*/cur_freq")}  # Hz
    clocks = {name: file for name, file in files.items() if re.search("gpu|ga10b|gv11b", name)}
    for path in kernel.glob("cpu*/cpufreq/scaling_cur_freq"):
        clocks[path.parent.parent.name] = (path, 1e3)  # kHz
    found = {name: (_number(path), scale) for name, (path, scale) in sorted(clocks.items())}
    return {name: value / scale for name, (value, scale) in found.items() if value is not None}


def _channels(chip: Path) -> dict[str, str]:
    """Name of the rail on each channel; a chip with one channel has its name for all of it."""
    labels = {p.name[2 : -len("_label")]: _read(p) for p in chip.glob("in*_label")}
    labels = labels or {"1": _read(chip / "label")}
    return {channel: label for channel, label in sorted(labels.items()) if label}


def _channel_mw(chip: Path, channel: str) -> float | None:
    power = _number(chip / f"power{channel}_input")
    if power is not None:
        return power / 1000
    voltage, current = _number(chip / f"in{channel}_input"), _number(chip / f"curr{channel}_input")
    return None if voltage is None or current is None else voltage * current / 1000


def _read(path: Path) -> str | None:
    """The text of a small file, without the zero that the device tree ends it with."""
    try:
        return path.read_text(errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_read(path) or "")
    except ValueError:
        return None
