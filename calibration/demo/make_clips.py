"""Synthesize the demo clips: keyword clips spoken by free text-to-speech programs.

Every clip is one second of 16 kHz mono 16-bit FLAC, laid out like a Speech Commands clip: one
word near the middle, a faint noise floor, sometimes light background noise or a short room
reverb.  `manifest.csv` lists them.  The voices of the `calib` set and of the `eval` set are
disjoint.  The same program versions give the same samples each time: all chance comes from SEED
and the clip's own path.

    python make_clips.py [--out DIR]

Needs numpy, soundfile and soxr, and the Debian packages named in PROGRAMS and FESTIVAL.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

Wave = npt.NDArray[np.float64]
RATE, SAMPLES, SEED = 16000, 16000, 20240607
LONGEST = 12800  # samples of a trimmed word: at least 0.1 s is left free on both sides
COLUMNS = ("path", "set", "label", "word", "speaker", "samples", "licence", "source")
WORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
# The other Speech Commands words: `calib` has the first 17, `eval` the last 20, one take each.
OTHERS = """bird happy nine sheila backward zero bed house three forward marvin cat wow tree
    five follow dog eight four one seven six two learn visual"""
NOISES = {"white": 0.0, "pink": 0.5, "brown": 1.0, "hum": 1.0}  # fall of the amplitude: f^-x
PROGRAMS = {"flite": "flite", "text2wave": "festival", "espeak-ng": "espeak-ng"}
FESTIVAL = {  # festival voice: its Debian package
    "kal_diphone": "festvox-kallpc16k",
    "ked_diphone": "festvox-kdlpc16k",
    "cmu_us_slt_arctic_hts": "festvox-us-slt-hts",
}
# Voices and their takes of each word.  One person, and one espeak-ng variant, is in one set only:
# flite kal16 and festival kal_diphone are one person, flite slt and festival slt HTS another.
ESPEAK_CALIB = """en-us en-us+f3 en-us+f4 en-gb+aunty en-gb-x-rp+grandma en-us+Annie en-029+m2
    en-us+m6 en-gb-scotland+max en-us+paul en-gb+marcelo en-us-nyc+michel"""
ESPEAK_EVAL = """en-us+f2 en-us+steph en-gb-x-rp+belinda en-us+m7 en-us-nyc+rob en-gb+quincy
    en-us+edward en-us+adam"""
VOICES: dict[str, dict[str, int]] = {
    "calib": {"flite:kal16": 2, "festival:ked_diphone": 2, "festival:kal_diphone": 1}
    | {f"espeak-ng:{name}": 1 for name in ESPEAK_CALIB.split()},
    "eval": {"flite:slt": 3, "flite:rms": 3, "flite:awb": 3, "festival:cmu_us_slt_arctic_hts": 3}
    | {f"espeak-ng:{name}": 1 for name in ESPEAK_EVAL.split()},
}


def missing() -> str | None:
    """The first Debian package that is not installed, if one is."""
    absent = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    voices = Path("/usr/share/festival/voices")
    absent += [package for name, package in FESTIVAL.items() if not list(voices.glob(f"*/{name}"))]
    return absent[0] if absent else None


def speak(voice: str, word: str, rate: float, pitch: float) -> Wave:
    """`word` as the program says it, `rate` and `pitch` times the voice's usual; 16 kHz."""
    program, name = voice.split(":")
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/word.wav"
        if program == "flite":
            tuning = ["--setf", f"duration_stretch={1 / rate:.3f}", "--setf", f"f0_shift={pitch}"]
            command = ["flite", "-voice", name, *tuning, "-t", word, "-o", wav]
        elif program == "festival":
            tempo = f"(Parameter.set 'Duration_Stretch {1 / rate:.3f})"
            if name.endswith("_hts"):
                option = f'(list (list "-r" {rate:.3f}))'
                tempo = f"(set! hts_engine_params (append hts_engine_params {option}))"
            command = ["text2wave", "-o", wav, "-eval", f"(voice_{name})", "-eval", tempo]
        else:
            tuning = ["-s", f"{190 * rate:.0f}", "-p", f"{50 + 150 * (pitch - 1):.0f}"]
            command = ["espeak-ng", "-v", name, *tuning, "-w", wav, word]
        subprocess.run(command, input=word, text=True, check=True, capture_output=True)
        audio, given = soundfile.read(wav, dtype="float64")
    return np.asarray(soxr.resample(audio, given, RATE, quality="VHQ"), dtype=np.float64)


def trim(audio: Wave) -> Wave:
    """`audio` less the silence before and after the word, with short fades at its ends."""
    frames = audio[: len(audio) // 80 * 80].reshape(-1, 80)
    level = np.sqrt((frames**2).mean(axis=1))
    loud = np.flatnonzero(level > level.max() * 10 ** (-38 / 20))
    word = audio[max(0, loud[0] * 80 - 240) : loud[-1] * 80 + 400].copy()
    fade = np.sin(np.linspace(0, np.pi / 2, 120)) ** 2
    word[:120] *= fade
    word[-120:] *= fade[::-1]
    return word


def utter(voice: str, word: str, rng: np.random.Generator) -> tuple[Wave, float]:
    """A trimmed take of `word` and its rate: slow, as in a lone word, but LONGEST at most."""
    rate, pitch = float(rng.uniform(0.65, 1.0)), round(float(rng.uniform(0.92, 1.1)), 3)
    take = trim(speak(voice, word, rate, pitch))
    while len(take) > LONGEST:
        rate *= 1.02 * max(1.03, len(take) / LONGEST)
        take = trim(speak(voice, word, rate, pitch))
    return take, rate


def noise(colour: str, level: float, rng: np.random.Generator) -> Wave:
    """One second of noise of the given RMS level in dBFS."""
    spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
    spectrum[0] = 0
    spectrum[1:] *= np.maximum(np.arange(1, len(spectrum)), 20.0) ** -NOISES[colour]
    wave = np.fft.irfft(spectrum, SAMPLES)
    wave /= np.std(wave)
    if colour == "hum":  # mains hum with harmonics, on brown noise
        mains, time = rng.choice([50.0, 60.0]), np.arange(SAMPLES) / RATE
        for k in range(1, 8):
            phase = 2 * np.pi * (k * mains * time + rng.uniform())
            wave += rng.uniform(0.3, 2.0) / k * np.sin(phase)
    wave *= 10 ** (level / 20) / np.sqrt(np.mean(wave**2))
    return np.asarray(wave, dtype=np.float64)


def spoken(voice: str, word: str, rng: np.random.Generator) -> tuple[Wave, str]:
    """A clip of `word`, and how it was made."""
    take, rate = utter(voice, word, rng)
    notes = [voice.replace(":", " voice "), f"rate {rate:.2f}"]
    free = SAMPLES - len(take)
    start = int(np.clip(free / 2 + rng.normal(0, 1200), 1600, free - 1600))
    clip = np.zeros(SAMPLES)
    clip[start : start + len(take)] = take
    if rng.uniform() < 0.25:
        length = rng.uniform(0.10, 0.30)  # seconds until the reverb has fallen by 60 dB
        time = np.arange(int(length * RATE)) / RATE
        tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / length)
        tail *= rng.uniform(0.2, 0.5) / np.sqrt(np.sum(tail**2))
        tail[:48] = 0  # the first echo comes 3 ms after the direct sound
        tail[0] = 1
        clip = np.convolve(clip, tail)[:SAMPLES]
        clip[-400:] *= np.linspace(1, 0, 400)
        notes.append(f"reverb {length:.2f} s")
    clip *= 10 ** (rng.uniform(-20, -3) / 20) / np.abs(clip).max()
    if rng.uniform() < 0.2:
        colour, snr = str(rng.choice(list(NOISES))), rng.uniform(20, 30)
        level = 10 * np.log10(np.mean(clip[start : start + len(take)] ** 2)) - snr
        clip += noise(colour, level, rng)
        notes.append(f"{colour} noise at {snr:.0f} dB SNR")
    return clip + noise("pink", rng.uniform(-66, -58), rng), "; ".join(notes)


def plan(group: str) -> list[tuple[str, str, str]]:
    """(label, word, voice) of every clip of a set; silence has neither word nor voice."""
    takes = [voice for voice, count in VOICES[group].items() for _ in range(count)]
    clips = [(word, word, voice) for word in WORDS for voice in takes]
    others = OTHERS.split()[:17] if group == "calib" else OTHERS.split()[-20:]
    clips += [("unknown", word, voice) for word, voice in zip(others, takes, strict=True)]
    return clips + [("silence", "", "")] * len(takes)


def main() -> int:
    """Write the clips and their manifest; 1 where a synthesizer is missing."""
    parser = argparse.ArgumentParser(description="Synthesize the demo clips.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    out: Path = parser.parse_args().out
    if (package := missing()) is not None:
        print(f"make_clips: a synthesizer is missing: apt-get install {package}", file=sys.stderr)
        return 1
    rows: list[tuple[str | int, ...]] = []
    count: dict[str, int] = {}
    for group in VOICES:
        for label, word, voice in plan(group):
            speaker = voice.replace(":", "-") or f"noise-{group}"
            stem = f"{label}/{word}_{speaker}" if label == "unknown" else f"{label}/{speaker}"
            number = count[stem] = count.get(stem, -1) + 1
            path = f"{stem}_{number}.flac"
            rng = np.random.default_rng([SEED, zlib.crc32(path.encode())])
            if voice:
                clip, source = spoken(voice, word, rng)
            else:
                colour, level = list(NOISES)[number % len(NOISES)], rng.uniform(-68, -38)
                clip = noise(colour, level, rng)
                source = f"numpy; {colour} noise at {level:.0f} dBFS"
            (out / label).mkdir(parents=True, exist_ok=True)
            pcm = np.clip(np.rint(clip * 32768), -32768, 32767).astype(np.int16)
            soundfile.write(out / path, pcm, RATE, subtype="PCM_16", compression_level=1.0)
            rows.append((path, group, label, word, speaker, SAMPLES, "CC0-1.0", source))
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(rows)} clips in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
