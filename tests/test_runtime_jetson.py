from pathlib import Path

import pytest

from cnngru_edge.runtime.machine import jetson
from cnngru_edge.runtime.machine.jetson import JetPack

# What real boards printed, as others have published it.


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        # rbonghi/jetson_stats#711 for R38; the others are alike on every board of the release.
        (
            "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, "
            "DATE: Tue Aug  1 19:57:35 UTC 2023",
            "35.4.1",
            JetPack("5.1.2", "8.5.2", "11.4", "3.8"),
        ),
        (
            "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic, EABI: aarch64, "
            "DATE: Fri Jul 19 23:24:25 UTC 2024",
            "36.3.0",
            JetPack("6.0", "8.6.2", "12.2", "3.10"),
        ),
        (
            "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
            "DATE: Thu Sep 18 22:54:44 UTC 2025",
            "36.4.7",
            JetPack("6.2.1", "10.3.0", "12.6", "3.10"),
        ),
        (
            "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, "
            "DATE: Fri Aug 22 00:55:42 UTC 2025",
            "38.2.0",
            JetPack("7.0", "10.13", "13.0", "3.12"),
        ),
        (
            "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, "
            "DATE: Mon Jun  1 09:28:48 PM UTC 2026",
            "39.2.0",
            JetPack("7.2", "10.16.2", "13.2", "3.12"),
        ),
    ],
    ids=["5", "6.0", "6.2.1", "7.0", "7.2"],
)
def test_the_release_says_which_jetpack(release, l4t, jetpack):
    assert jetson.l4t_version(release) == l4t
    assert jetson.JETPACKS[l4t] == jetpack
    assert jetson.jetpack_generation(l4t) == int(jetpack.name[0])


def test_a_release_that_is_not_known_is_not_guessed():
    assert "36.4.5" not in jetson.JETPACKS
    assert jetson.jetpack_generation("36.4.5") == 6
    assert jetson.l4t_version("# R41 (release), REVISION: 1.0, GCID: 1") == "41.1.0"
    assert jetson.jetpack_generation("41.1.0") is None
    assert jetson.l4t_version("Ubuntu 24.04") is None


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: 25W\n1\n", ("25W", 1)),  # Orin Nano, L4T 36.4.3
        ("NV Power Mode: MAXN\n0\n", ("MAXN", 0)),  # AGX Thor: anduril/jetpack-nixos#460
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W\n2\n", ("MODE_15W", 2)),  # JetPack 5
        (  # AGX Xavier, not root
            "NV Fan Mode:quiet\nNV Power Mode: MODE_15W_DESKTOP\n7\n"
            "NVPM ERROR: Error opening /sys/kernel/nvpmodel_emc_cap/emc_iso_cap: 13\n",
            ("MODE_15W_DESKTOP", 7),
        ),
        (  # --verbose
            "NVPM VERB: parsing done for /etc/nvpmodel.conf\n"
            "NVPM VERB: Current mode: NV Power Mode: 25W\n1\nNVPM VERB: PARAM CPU_ONLINE: 1\n",
            ("25W", 1),
        ),
        ("NV Power Mode: MAXN\n", ("MAXN", None)),  # as jetson_clocks --show ends
        ("NVPM ERROR: Error opening /etc/nvpmodel.conf\n", None),
    ],
)
def test_nvpmodel(text, mode):
    assert jetson.parse_power_mode(text) == mode


def test_memory_that_programs_can_have(tmp_path):
    """Orin Nano: what only caches files is not free, and can be had."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 7802844 kB\nMemFree:  210000 kB\nMemAvailable: 5000000 kB\n")
    assert jetson.available_bytes(meminfo) == 5_000_000 * 1024
    assert jetson.available_bytes(tmp_path / "none") is None


@pytest.fixture
def sys_root(tmp_path):
    """/sys of a Thor, as its hwmon is published: INA3221 with labels, INA238 with power alone."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    chip = "class/hwmon/hwmon5"
    write(f"{chip}/name", "ina3221")
    channels = {1: ("VDD_GPU", 19864, 20), 2: ("VDD_CPU_SOC_MSS", 19856, 300), 3: ("NC", 0, 0)}
    for channel, (label, millivolts, milliamperes) in channels.items():
        write(f"{chip}/in{channel}_label", label)
        write(f"{chip}/in{channel}_input", millivolts)
        write(f"{chip}/curr{channel}_input", milliamperes)
    write(f"{chip}/in7_label", "sum of shunt voltages")  # no current, no rail
    write(f"{chip}/in7_input", 680)
    write("class/hwmon/hwmon4/name", "ina238")
    write("class/hwmon/hwmon4/label", "VIN")
    write("class/hwmon/hwmon4/power1_input", 20_986_000)
    write("class/hwmon/hwmon1/name", "pwmfan")
    write("class/hwmon/hwmon1/label", "fan")
    write("class/hwmon/hwmon1/power1_input", 1000)
    write("class/devfreq/gpu-gpc-0/cur_freq", 315_000_000)
    write("class/devfreq/15340000.vic/cur_freq", 115_200_000)
    write("devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 972_000)
    write("devices/system/cpu/cpufreq/boost", 1)
    return tmp_path


def test_power_of_each_rail(sys_root):
    assert jetson.power_mw(sys_root) == {
        "VIN": 20_986.0,
        "VDD_GPU": 397.28,
        "VDD_CPU_SOC_MSS": 5956.8,
    }


def test_a_rail_that_cannot_be_read_is_left_out(sys_root):
    (sys_root / "class/hwmon/hwmon5/curr1_input").write_text("no number\n")
    (sys_root / "class/hwmon/hwmon4/name").unlink()
    assert list(jetson.power_mw(sys_root)) == ["VDD_CPU_SOC_MSS"]


def test_clocks_of_gpu_and_cpu(sys_root):
    assert jetson.clocks_mhz(sys_root) == {"cpu0": 972.0, "gpu-gpc-0": 315.0}


def test_where_nothing_is_there_is_nothing(tmp_path, monkeypatch):
    assert jetson.power_mw(tmp_path) == {}
    assert jetson.clocks_mhz(tmp_path) == {}
    assert jetson.release(tmp_path / "nv_tegra_release") is None
    assert jetson.module_name(tmp_path) is None  # a folder
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jetson.power_mode() is None


def test_the_device_tree_ends_its_text_with_a_zero(tmp_path):
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Thor Developer Kit\0")
    assert jetson.module_name(tmp_path / "model") == "NVIDIA Jetson AGX Thor Developer Kit"


def test_the_power_mode_is_asked_of_nvpmodel(tmp_path, monkeypatch):
    nvpmodel = tmp_path / "nvpmodel"
    nvpmodel.write_text(
        '#!/bin/sh\n[ "$1" = -q ] && printf "NV Power Mode: MAXN_SUPER\\n2\\n"; exit 1\n'
    )
    nvpmodel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert jetson.power_mode() == "MAXN_SUPER (2)"
    nvpmodel.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(jetson, "_PATIENCE_S", 0.2)
    assert jetson.power_mode() is None


def test_the_release_is_one_line(tmp_path):
    path: Path = tmp_path / "nv_tegra_release"
    path.write_text("# R36 (release), REVISION: 4.7, GCID: 42132812\n# KERNEL_VARIANT: oot\n")
    assert jetson.release(path) == "# R36 (release), REVISION: 4.7, GCID: 42132812"
