import json
import re

import numpy as np
import pytest
import soxr
from conftest import UNREADABLE, make_noise

from cnngru_edge.calibration.audit.findings import Finding
from cnngru_edge.calibration.audit.run import Audit, audit, with_scales
from cnngru_edge.calibration.corpus.read import (
    DEMO_PHRASES,
    Clip,
    Corpus,
    find_recordings,
    read_corpus,
)
from cnngru_edge.calibration.ranges.choose import Range, Ranges, Subset
from cnngru_edge.models.errors import CorpusError
from cnngru_edge.runtime.inputs.audio import read_audio

RATE = 16_000


@pytest.fixture(scope="module")
def speech(demo):
    """Words, each of another voice, loud enough to be worked on: peak 0.5."""
    voices = {clip.speaker: clip for clip in demo.clips if clip.label != "silence"}
    samples = [read_audio(clip.path, RATE).samples for clip in voices.values()]
    return [0.5 * s / np.abs(s).max() for s in samples]


@pytest.fixture
def recorded(wav, tmp_path):
    """A corpus of clips (name, samples[, label, set, speaker, rate]), written below tmp_path."""

    def write(*clips):
        def one(name, samples, label="yes", set_name="calib", speaker="", rate=RATE):
            subtype = None if name.endswith("flac") else "FLOAT"
            return Clip(wav(name, samples, rate, subtype=subtype), label, set_name, speaker)

        return Corpus(tmp_path, tuple(one(*clip) for clip in clips))

    return write


@pytest.fixture
def sound(speech):
    """Clips that nothing is wrong with, for calibration and evaluation."""
    half = len(speech) // 2
    return [
        (f"{set_name}{i}.wav", samples, "yes", set_name, f"{set_name}{i}")
        for set_name, words in (("calib", speech[:half]), ("eval", speech[half:]))
        for i, samples in enumerate(words)
    ]


def wrong(found):
    """(check, severity, clips) of what is more than a note."""
    return [(f.check, f.severity, f.clips) for f in found.findings if f.severity != "note"]


def text_of(found, check):
    return " | ".join(f.text for f in found.findings if f.check == check)


def white(seconds=1.0, amplitude=0.1):
    return amplitude * np.random.default_rng(1).standard_normal(int(seconds * RATE))


def telephone(samples):
    return soxr.resample(soxr.resample(samples, RATE, 8_000), 8_000, RATE)


def test_nothing_is_wrong_with_the_demo_clips(demo):
    done = []
    found = audit(demo, progress=done.append)
    assert wrong(found) == []
    assert not found.refused
    assert (found.clips, found.seconds) == (444, 444.0)
    assert found.summary == "444 recordings, 444 s: fit to calibrate with"
    assert sum(done) == 444
    assert text_of(found, "rates") == "444 at 16000 Hz; the model hears 16000 Hz"
    assert text_of(found, "labels") == "10 words, 17 recordings of each"
    assert text_of(found, "durations") == "1.00 to 1.00 s, median 1.00 s"
    assert re.fullmatch(r".* at -\d\d to -\d\d dBFS, median -\d\d dBFS", text_of(found, "levels"))


FAULTS = {
    "silence": (lambda word: np.zeros(RATE), "silent, below -50 dBFS throughout"),
    "noise": (lambda word: white(), "whose spectrum changes by less than 1.2 dB"),
    "quiet": (lambda word: word / 2**15, "very quiet, below -50 dBFS at their loudest"),
    "clipping": (lambda word: np.clip(20 * word, -1, 1), "clipped in more than 0.1% of the samp"),
    "offset": (lambda word: word + 0.1, "a DC offset less than 20 dB below the level"),
    "bandwidth": (telephone, "nothing above 4 kHz, as on a telephone"),
    "durations": (lambda word: word[6_000:9_000], "shorter than 0.25 s"),
}


@pytest.mark.parametrize(
    ("check", "make", "text"), [(c, *f) for c, f in FAULTS.items()], ids=FAULTS
)
def test_a_faulty_clip_is_named(recorded, sound, speech, check, make, text):
    found = audit(recorded(*sound, ("bad.wav", make(speech[0]))), least=1)
    assert wrong(found) == [(check, "warning", ("bad.wav",))]
    assert f"1 of {len(sound) + 1} recordings: " in text_of(found, check)
    assert text in text_of(found, check)
    assert all(finding.advice for finding in found.findings if finding.severity == "warning")
    assert not found.refused
    assert found.summary.endswith("fit to calibrate with; 1 warning")


def test_a_recording_that_nobody_has_cut_is_named(recorded, sound, speech):
    found = audit(recorded(*sound, ("bad.wav", np.tile(speech[0], 12))), least=1)
    assert wrong(found) == [("durations", "warning", ("bad.wav",))]
    assert "over 10 times the median's length" in text_of(found, "durations")


def test_a_rate_below_the_models_is_named(recorded, sound, speech):
    low, high = (soxr.resample(speech[0], RATE, rate) for rate in (8_000, 48_000))
    extra = [
        ("low.wav", low, "yes", "calib", "", 8_000),
        ("high.wav", high, "yes", "calib", "", 48_000),
    ]
    found = audit(recorded(*sound, *extra), least=1)
    assert wrong(found) == [("rates", "warning", ("low.wav",))]
    assert text_of(found, "rates").endswith(
        f"1 at 8000 Hz, {len(sound)} at 16000 Hz, 1 at 48000 Hz; the model hears 16000 Hz"
    )
    assert wrong(audit(recorded(*sound, *extra), least=1, sample_rate=8_000)) == []


@pytest.mark.parametrize("samples", [np.zeros(RATE), white(), white(amplitude=1e-4)])
def test_silence_may_be_silent_and_noisy(recorded, sound, samples):
    assert wrong(audit(recorded(*sound, ("hush.wav", samples, "silence")), least=1)) == []


def test_noise_instead_of_speech_is_refused(recorded, rng):
    clips = [(f"{i}.wav", rng.integers(-(2**15), 2**15, RATE) / 2**15) for i in range(10)]
    found = audit(recorded(*clips), least=1)
    assert wrong(found) == [("noise", "error", tuple(f"{i}.wav" for i in range(10)))]
    assert found.refused
    assert text_of(found, "noise").endswith("; most of the calibration is without speech")
    assert found.summary == "10 recordings, 10 s: not fit to calibrate with; 1 error"


def test_noise_and_silence_together_are_most_of_it(recorded, speech):
    words = [(f"{i}.wav", samples) for i, samples in enumerate(speech[:3])]
    hushed = [(f"zero{i}.wav", np.zeros(RATE)) for i in range(2)]
    hissing = [(f"hiss{i}.wav", white(1 + i / 10)) for i in range(2)]
    found = audit(recorded(*words, *hushed, *hissing), least=1)
    assert [(check, severity) for check, severity, _ in wrong(found)] == [
        ("silence", "error"),
        ("noise", "error"),
    ]
    found = audit(recorded(*words, *hushed, hissing[0]), least=1)
    assert not found.refused
    # In the evaluation they do not make a calibration unfit.
    found = audit(recorded(*words, *((*h, "yes", "eval") for h in hissing)), least=1)
    assert not found.refused


@pytest.mark.parametrize(
    ("label", "set_name", "severity", "text"),
    [
        ("yes", "calib", "warning", "in one set"),
        ("yes", "eval", "error", "in calibration and evaluation"),
        ("~", "calib", "error", "with two labels"),
    ],
)
def test_the_same_audio_under_another_name_is_found(
    recorded, speech, label, set_name, severity, text
):
    samples = np.round(speech[0] * 2**15) / 2**15
    clips = [("a.wav", samples), ("b.flac", samples, label, set_name), ("c.wav", speech[1])]
    found = audit(recorded(*clips), least=1)
    assert wrong(found) == [("duplicates", severity, ("a.wav", "b.flac"))]
    assert text_of(found, "duplicates") == f"1 times the same audio {text}, as a.wav and b.flac"


def test_zeros_are_no_copies(recorded, sound):
    zeros = [(f"{s}_zero.wav", np.zeros(RATE), "silence", s) for s in ("calib", "eval")]
    assert wrong(audit(recorded(*sound, *zeros), least=1)) == []


def test_a_speaker_in_two_sets_is_a_finding(manifest, demo):
    clips = demo.of("calib")[:2]
    rows = [
        (clip.path, s, clip.label, "s1") for clip, s in zip(clips, ("calib", "eval"), strict=True)
    ]
    folder = manifest(("path", "set", "label", "speaker"), *rows)
    found = audit(find_recordings(folder), least=1)
    assert wrong(found) == [("speakers", "error", tuple(str(clip.path) for clip in clips))]
    assert text_of(found, "speakers") == "1 in more than one set, as 's1' in calib and eval"
    with pytest.raises(CorpusError, match="1 speakers are in more than one set"):
        read_corpus(folder)


def test_an_unknown_speaker_is_in_no_set(manifest, demo):
    clips = demo.of("calib")[:2]
    rows = [(c.path, s, c.label, "unknown") for c, s in zip(clips, ("calib", "eval"), strict=True)]
    found = audit(find_recordings(manifest(("path", "set", "label", "speaker"), *rows)), least=1)
    assert wrong(found) == []
    assert text_of(found, "speakers").startswith("2 of 2 recordings do not say who speaks")


def test_a_rare_word_is_named(recorded, speech):
    many = [(f"{i}.wav", samples[i:], "yes") for i, samples in enumerate(speech[:11])]
    few = [("few.wav", speech[-1], "no"), ("unknown.wav", speech[-2], "unknown")]
    found = audit(recorded(*many, *few), least=1)
    assert wrong(found) == [("labels", "warning", ("few.wav",))]
    assert text_of(found, "labels").endswith("2 words, 1 (no) to 11 (yes) recordings of each")
    assert wrong(audit(recorded(*many[1:], *few), least=1)) == []


@pytest.mark.parametrize(("label", "severity"), [("no", "warning"), ("silence", "note")])
def test_a_label_that_only_evaluates_is_named(recorded, sound, speech, label, severity):
    found = audit(recorded(*sound, ("a.wav", speech[0][100:], label, "eval")), least=1)
    (finding,) = (f for f in found.findings if "not in calibration" in f.text)
    assert finding.text == f"in evaluation but not in calibration: {label}"
    assert finding.severity == severity


def test_a_training_set_helps_out(recorded, speech):
    clips = [(f"{i}.wav", samples, "yes", "train") for i, samples in enumerate(speech[:3])]
    found = audit(recorded(*clips), least=1)
    assert found.clips == 3
    assert text_of(found, "sets") == (
        "no evaluation set, so no overlap with it is looked for | 0 recordings in the calibration "
        "set, so that the training set calibrates too"
    )


def test_recordings_without_labels_are_heard(loose):
    found = audit(find_recordings(loose(20)), least=20)
    assert found.clips == 20
    assert wrong(found) == []
    assert text_of(found, "labels") == (
        "recordings without labels: neither labels, sets nor speakers are checked"
    )


def test_what_cannot_be_read_is_left_out_and_named(recorded, sound, tmp_path):
    corpus = recorded(*sound)
    bad = tmp_path / "bad.wav"
    make_noise(bad)
    corpus = Corpus(corpus.root, (*corpus.clips, Clip(bad, "yes", "calib", "")))
    found = audit(corpus, least=1)
    assert wrong(found) == [("unreadable", "error", ("bad.wav",))]
    assert found.clips == len(sound)
    text = rf"1 of {len(sound) + 1} recordings cannot be read: .*bad\.wav: {UNREADABLE}"
    assert re.fullmatch(text, text_of(found, "unreadable"))


def test_too_few_are_refused(recorded, sound):
    found = audit(recorded(*sound))
    half = len(sound) // 2
    assert wrong(found) == [("count", "error", ())]
    assert text_of(found, "count") == f"{half} recordings for calibration, expected at least 100"


# Scales.


def measured(*subsets, a=1.0, b=1.0):
    """Ranges of 80 clips, and what 10, 20 and 40 of them would have given for (a, b)."""
    tensors = {n: Range(-amax, amax, -9.0, 9.0, 0.0, 1.0, 0.0) for n, amax in (("a", a), ("b", b))}
    parts = zip((10, 20, 40)[-len(subsets) :], subsets, strict=True)
    convergence = tuple(Subset(n, dict(zip("ab", amax, strict=True))) for n, amax in parts)
    return Ranges("", "", 80, 80.0, (1, 1, 1), "entropy", 99.99, tensors, convergence)


@pytest.mark.parametrize(
    ("subsets", "severity", "text"),
    [
        ([(0.95, 1.05)] * 3, "note", "10 recordings are enough for scales within 10% of "),
        ([(1.0, 1.2), (1.0, 1.0), (1.0, 1.0)], "note", "20 recordings are enough"),
        # That a small subset happened to be right does not count when a larger one is not.
        ([(1.0, 1.0), (0.8, 1.0), (1.0, 1.0)], "note", "40 recordings are enough"),
        (
            [(1.0, 1.0), (1.0, 1.0), (0.88, 1.25)],
            "warning",
            "2 of 2 scales moved by more than 10% from 40 to 80 recordings: b by 25%, a by 12%; "
            "more than 80 are needed",
        ),
        ([(0.95, 0.5)], "warning", "1 of 2 scales moved by more than 10% from 40 to 80"),
    ],
)  # fmt: skip
def test_scales_that_still_move_are_named(subsets, severity, text):
    before = Audit(80, 80.0, (Finding("rates", "note", ""),))
    found = with_scales(before, measured(*subsets))
    (finding,) = (f for f in found.findings if f.check == "scales")
    assert (finding.severity, bool(finding.advice)) == (severity, severity == "warning")
    assert finding.text.startswith(text)
    assert (found.findings[0] == finding) == (severity == "warning")


def test_a_dead_tensor_is_stable():
    (finding,) = with_scales(Audit(80, 80.0, ()), measured((1.0, 0.0), b=0.0)).findings
    assert finding.text.startswith("40 recordings are enough")


def test_of_a_single_clip_no_stability_is_told():
    ranges = measured((1.0, 1.0))
    alone = Ranges(**vars(ranges) | {"convergence": ()})
    (finding,) = with_scales(Audit(1, 1.0, ()), alone).findings
    assert finding.text == "too few recordings to tell whether the scales are stable"


# The command.


def test_warnings_do_not_fail_the_command(cli, recorded, sound, tmp_path):
    recorded(*(sound[:10]), *((f"zero{i}.wav", np.zeros(RATE)) for i in range(7)))
    result = cli("audit", tmp_path, "--min-clips", 10)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "17 recordings, 17 s: fit to calibrate with; 1 warning"
    assert lines[1] == "warning: silence: 7 of 17 recordings: silent, below -50 dBFS throughout"
    zeros = [f"zero{i}.wav" for i in range(7)]
    assert lines[2] == f"    {', '.join(zeros[:5])} and 2 more; --json lists them all"
    assert lines[3] == "    -> remove them, or label them 'silence'"
    result = cli("audit", tmp_path, "--min-clips", 10, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (found["clips"], found["seconds"], found["refused"]) == (17, 17.0, False)
    assert found["findings"][0] == {
        "check": "silence",
        "severity": "warning",
        "text": "7 of 17 recordings: silent, below -50 dBFS throughout",
        "advice": "remove them, or label them 'silence'",
        "clips": zeros,
    }


def test_an_error_fails_the_command(cli, recorded, sound, tmp_path):
    recorded(*sound)
    result = cli("audit", tmp_path)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines()[1].startswith("error: count: ")
    assert json.loads(cli("audit", tmp_path, "--json").stdout)["refused"]


def test_the_scales_of_a_graph_are_told(cli, tiny_onnx, loose):
    result = cli("audit", loose(16), "--graph", tiny_onnx, "--min-clips", 16, "--json")
    assert result.exit_code == 0, result.stderr
    (finding,) = (f for f in json.loads(result.stdout)["findings"] if f["check"] == "scales")
    assert re.search(r" (all|to) 16\b", finding["text"])


def test_unfit_audio_is_not_calibrated_with(cli, tiny_onnx, loose):
    result = cli("audit", loose(16), "--graph", tiny_onnx)
    assert result.exit_code == 1
    assert "scales" not in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none"], "none: no such folder or manifest"),
        (["empty"], r"empty: no recordings found \(WAV, FLAC or Ogg, in a folder per label\)"),
        (["DEMO", "--graph", "none.onnx"], r"none\.onnx: no such file"),
        (["DEMO", "--graph", "noise.onnx"], r".*noise\.onnx: ONNX Runtime does not open it \(.+\)"),
        (["DEMO", "--task", "kws"], r".*manifest\.csv: no task 'kws', it has none"),
    ],
)
def test_what_cannot_be_audited_is_one_line(refused, demo, tmp_path, monkeypatch, args, message):
    (tmp_path / "empty").mkdir()
    make_noise(tmp_path / "noise.onnx")
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(message, refused("audit", *[demo.root if a == "DEMO" else a for a in args]))


def test_phrases_are_not_audited(cli):
    done = cli("audit", DEMO_PHRASES)
    assert done.exit_code == 1
    assert done.stderr == f"Error: {DEMO_PHRASES}: phrases; recordings are what is audited\n"
