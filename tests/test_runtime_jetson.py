from pathlib import Path

import pytest

from cnngru_edge.runtime import jetson
from cnngru_edge.runtime.jetson import JetPack, Rail

# What real boards printed, as others have published it. CPU cores and engines that are not read are
# cut, numbers are as they were.

# AGX Orin, JetPack 5 (April 2023), root: catid/supercharger, README of its hardware.
AGX_ORIN_5 = (
    "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) "
    "CPU [0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 "
    "CV0@-256C CPU@42.593C Tboard@32C GPU@-256C tj@42.593C VDD_GPU_SOC 2399mW/2399mW "
    "VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW "
    "NC 0mW/0mW"
)
# Orin Nano, JetPack 6 (kernel 5.15.148-tegra), root: henrygd/beszel#286.
ORIN_NANO_6 = (
    "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) "
    "CPU [15%@729,11%@729] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off APE 200 cpu@53.968C "
    "gpu@53.343C tj@53.968C VDD_IN 12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW "
    "VDD_SOC 2817mW/2817mW"
)
# Orin Nano, JetPack 6, not root: henrygd/beszel, agent/gpu_test.go.
ORIN_NANO_6_USER = (
    "06-18-2025 11:25:24 RAM 3452/7620MB (lfb 25x4MB) CPU [1%@1420,2%@729] GR3D_FREQ 0% "
    "cpu@50.031C soc0@50C VDD_IN 4824mW/4824mW VDD_CPU_GPU_CV 518mW/518mW"
)
# AGX Thor, L4T 38.4.0 (GCID 43443517), root: three clusters and no load.
THOR_7_1 = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 "
    "GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 VIC off APE 300 cpu@37.343C gpu@38.875C "
    "VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW "
    "VIN 19780mW/19780mW"
)
# AGX Thor, L4T 39.2.0, not root: wendylabsinc/WendyOS#1316. VIN's average shows which number it is.
THOR_7_2 = (
    "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) "
    "CPU [2%@972,1%@972] cpu@60.406C tj@63.281C gpu@62.906C VDD_GPU 37528mW/37528mW/37528mW "
    "VDD_CPU_SOC_MSS 18961mW/18961mW/18961mW VIN_SYS_5V0 18331mW/18331mW/18331mW "
    "VIN 87426mW/43713mW/87426mW"
)
# AGX Orin, L4T 39.2, root: rbonghi/jetson_stats#894.
AGX_ORIN_7_2 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 0%@[1300,1300] NVENC0 off NVDEC0 off APE 174 cpu@52.968C/52.968C"
)
# Orin NX with two cores off; the rail of AGX Thor below zero when idle: seen in published logs.
CORES_OFF = "CPU [55%@1036,off,off,0%@729] GR3D_FREQ 0%"
BELOW_ZERO = "VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3835mW"


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


def test_tegrastats_of_jetpack_5():
    found = jetson.parse_tegrastats(AGX_ORIN_5)
    assert (found.ram_used_mb, found.ram_total_mb) == (1282, 62795)
    assert (found.cpu_mhz, found.gpu_mhz, found.gpu_load, found.emc_mhz) == (
        (729, 729),
        (0, 0),
        0,
        2133,
    )
    assert found.rails == {  # without the two that are not connected
        "VDD_GPU_SOC": Rail(2399, 2399),
        "VDD_CPU_CV": Rail(400, 400),
        "VIN_SYS_5V0": Rail(4032, 4032),
        "VDDQ_VDD2_1V8AO": Rail(301, 301),
    }
    assert found.temperatures_c == {"CPU": 42.593, "Tboard": 32.0, "tj": 42.593}


def test_tegrastats_of_jetpack_6():
    found = jetson.parse_tegrastats(ORIN_NANO_6)
    assert (found.gpu_mhz, found.gpu_load, found.emc_mhz) == ((621,), 63, 2133)
    assert found.rails == {
        "VDD_IN": Rail(12479, 12479),
        "VDD_CPU_GPU_CV": Rail(4667, 4667),
        "VDD_SOC": Rail(2817, 2817),
    }
    assert found.temperatures_c == {"cpu": 53.968, "gpu": 53.343, "tj": 53.968}


def test_tegrastats_without_root_has_no_clock_of_the_gpu():
    found = jetson.parse_tegrastats(ORIN_NANO_6_USER)
    assert (found.gpu_mhz, found.gpu_load, found.emc_mhz) == ((), 0, None)
    assert found.cpu_mhz == (1420, 729)
    assert found.rails["VDD_IN"] == Rail(4824, 4824)


def test_tegrastats_of_jetpack_7():
    found = jetson.parse_tegrastats(THOR_7_1)
    assert (found.gpu_mhz, found.gpu_load, found.emc_mhz) == ((314, 314, 314), None, 2750)
    assert found.rails["VDD_CPU_SOC_MSS"] == Rail(5887, 5887)
    assert found.rails["VIN"] == Rail(19780, 19780)


def test_tegrastats_of_jetpack_7_2_has_peaks():
    found = jetson.parse_tegrastats(THOR_7_2)
    assert found.rails["VIN"] == Rail(87426, 43713)
    assert list(found.rails) == ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"]
    assert (found.gpu_mhz, found.gpu_load) == ((), None)
    orin = jetson.parse_tegrastats(AGX_ORIN_7_2)
    assert (orin.gpu_mhz, orin.gpu_load, orin.emc_mhz) == ((1300, 1300), 0, 3199)
    assert orin.temperatures_c == {"cpu": 52.968}


def test_tegrastats_of_cores_that_are_off_and_of_a_rail_below_zero():
    assert jetson.parse_tegrastats(CORES_OFF).cpu_mhz == (1036, None, None, 729)
    assert jetson.parse_tegrastats(BELOW_ZERO).rails["VDD_GPU"] == Rail(-392, -392)


def test_a_line_of_something_else_has_nothing():
    found = jetson.parse_tegrastats("tegrastats: command not found")
    assert found == jetson.Tegrastats(None, None, {}, (), (), None, None, {})


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
