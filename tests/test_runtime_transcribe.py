import json
import os
import pty
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import with_head_times

from cnngru_edge.models.nets.checkpoint import PRETRAINED
from cnngru_edge.models.spec.stream import BLANK, CTC, EndpointSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.answer import Transcriber, clip_answer, clip_transcript
from cnngru_edge.runtime.decode.ctc import DecodeConfig
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.live import StreamSession, TextEvent
from cnngru_edge.runtime.recognize import Transcription, recognize
from cnngru_edge.runtime.stream import clip_logits

SPEC = ModelSpec((BLANK, " ", "a", "b"), family=CTC, endpoint=EndpointSpec(silence_s=0.1))
DECODERS = [DecodeConfig(), DecodeConfig(beam=4)]
PAUSE = 5  # frames of 20 ms
RATE = 16_000
START = [sys.executable, "-c", "from cnngru_edge.export.cli import main; main()"]


def logits_of(labels):
    """Sure logits of `_` for blank, space, a and b, a frame each."""
    return 10 * np.eye(4, dtype=np.float32)[["_ ab".index(label) for label in labels]]


def heard(transcriber, *pieces):
    return [[said_of(said) for said in transcriber.push(logits_of(piece))] for piece in pieces]


def said_of(said):
    return said.transcript.text, said.is_final


@pytest.mark.parametrize("config", DECODERS, ids=["greedy", "beam"])
def test_a_text_grows_until_silence_ends_it(config):
    found = heard(Transcriber(SPEC, config), "__a", "_", "b", "_ _", "a", "____", "_", "____", "b")
    assert found == [
        [("a", False)],
        [],
        [("ab", False)],
        [],
        [("ab a", False)],
        [],
        [("ab a", True)],
        [],
        [("b", False)],
    ]


@pytest.mark.parametrize("config", DECODERS, ids=["greedy", "beam"])
def test_what_is_final_does_not_depend_on_the_pieces(config, rng):
    labels = "".join(rng.choice(list("____ ab"), 400))
    whole, by_frame = Transcriber(SPEC, config), Transcriber(SPEC, config)
    pieces = heard(by_frame, *labels)
    expected = [said.transcript for said in whole.push(logits_of(labels)) if said.is_final]
    found = [text for piece in pieces for text, is_final in piece if is_final]
    assert found == [transcript.text for transcript in expected]
    assert len(found) > 3
    ends = [transcript.words[-1].end for transcript in expected]
    starts = [transcript.words[0].start for transcript in expected]
    assert all(start > end for end, start in zip(ends, starts[1:], strict=False))


def test_spaces_are_silence_and_times_go_on():
    transcriber = Transcriber(SPEC)
    (first,) = transcriber.push(logits_of("__a" + " _ _ "))
    assert first.is_final
    (second,) = transcriber.push(logits_of("__bb_____"))
    assert second.transcript.words[0].start == pytest.approx((3 + PAUSE + 2) * 0.02)
    assert second.is_final


@pytest.mark.parametrize("config", DECODERS, ids=["greedy", "beam"])
def test_a_text_without_an_end_is_cut_at_a_space_or_at_last_anywhere(config):
    spec = replace(SPEC, endpoint=EndpointSpec(silence_s=0.1, longest_s=0.4))  # 20 frames
    (said,) = Transcriber(spec, config).push(logits_of("_a_b" * 5 + "b a b"))[:1]
    assert said_of(said) == ("ab" * 5, True)  # the next space ends it
    found = Transcriber(spec, config).push(logits_of("__" + "a_b_" * 30))
    texts = [said_of(one) for one in found]
    assert texts == [("ab" * 10, True)] * 3  # after 40 frames
    assert found[1].transcript.words[0].start == pytest.approx((2 + 40) * 0.02)


def test_a_text_of_words_without_an_end_is_cut_between_words():
    labels = ("<blank>", " a", " b")
    endpoint = EndpointSpec(silence_s=0.1, longest_s=0.4)  # 20 frames
    spec = replace(SPEC, labels=labels, endpoint=endpoint)
    frames = np.array([1, 1, 0, 2] * 8)
    logits = 20 * np.eye(3, dtype=np.float32)[frames]
    (said,) = [one for one in Transcriber(spec).push(logits) if one.is_final]
    assert said.transcript.text == "a b a b a b a b a b a"  # frame 22 is the first blank


def test_an_end_makes_what_there_is_final():
    transcriber = Transcriber(SPEC)
    assert transcriber.end() == []
    transcriber.push(logits_of("ab"))
    assert [said_of(said) for said in transcriber.end()] == [("ab", True)]
    assert transcriber.end() == []
    transcriber.reset()
    (said,) = transcriber.push(logits_of("b"))
    assert said.transcript.words[0].start == 0


def test_rare_characters_do_not_add_up_in_a_long_silence():
    transcriber = Transcriber(SPEC, DecodeConfig(beam=8))
    quiet = np.log(np.array([[0.995, 0.001, 0.002, 0.002]], np.float32))
    assert transcriber.push(np.repeat(quiet, 3_000, 0)) == []
    assert transcriber.end() == []


# A model.


def noise_of(rng, seconds=1):
    loud = np.repeat(rng.uniform(0, 1, 20 * seconds) ** 4, RATE // 20)
    return (0.3 * loud * rng.standard_normal(len(loud))).astype(np.float32)


@pytest.fixture
def clip(wav, rng):
    return wav("clip.wav", noise_of(rng), subtype="FLOAT")


def test_a_transcription_says_what_was_written_and_when(tiny_ctc_onnx, clip):
    with open_session(tiny_ctc_onnx) as session:
        found = recognize(session, clip)
        logits = clip_logits(session, read_audio(clip, RATE).samples)
        expected = clip_transcript(session.spec, logits)
        assert clip_answer(session.spec, logits) == expected.text
    assert isinstance(found, Transcription)
    fields = json.loads(found.to_json())
    assert fields["text"] == expected.text == " ".join(word["word"] for word in fields["words"])
    assert fields["text"]
    words = [replace(word, end=min(word.end, 1.0)) for word in expected.words]
    assert fields["words"] == [asdict(word) for word in words]
    assert fields["score"] == expected.score
    assert fields["precision"] == "fp32"
    assert fields["duration_s"] == 1.0
    assert fields["latency_ms"] > 0
    assert fields.keys() == {
        *("path", "text", "score", "words", "duration_s"),
        *("latency_ms", "backend", "device", "precision"),
    }


def test_no_word_ends_behind_the_recording(tiny_ctc_onnx, wav, rng):
    heard = 0
    with open_session(tiny_ctc_onnx) as session:
        for i in range(4):
            found = recognize(
                session, wav(f"{i}.wav", noise_of(rng)[: 15_000 + i], subtype="FLOAT")
            )
            logits = clip_logits(session, read_audio(Path(found.path), RATE).samples)
            heard += clip_transcript(session.spec, logits).words[-1].end > found.duration_s
            assert all(0 <= w.start <= w.end <= found.duration_s for w in found.words)
    assert heard


def test_a_reference_checks_the_text(tiny_ctc_onnx, clip, tmp_path):
    other = with_head_times(0.3, tiny_ctc_onnx, tmp_path / "other.onnx")
    with open_session(tiny_ctc_onnx) as session, open_session(other) as reference:
        same = recognize(session, clip, session)
        assert (same.check.agrees, same.check.max_abs_error) == (True, 0)
        found = recognize(session, clip, reference)
    fields = json.loads(found.to_json())
    assert not fields["agrees"]
    assert fields["reference_text"] != fields["text"]
    assert fields["max_abs_error"] > 1
    assert f"[reference: {fields['reference_text']} (error " in found.to_line(10)
    assert "[agrees (error 0.000)]" in same.to_line(10)


def test_the_command_writes_texts(cli, tiny_ctc_onnx, clip):
    shown = cli("run", "--engine", tiny_ctc_onnx, clip)
    assert shown.exit_code == 0, shown.stderr
    with open_session(tiny_ctc_onnx) as session:
        text = recognize(session, clip).text
    assert shown.stdout.endswith(f" ms  {text}\n")


def test_the_command_writes_only_the_words_of_a_list(cli, tiny_ctc_onnx, clip, tmp_path):
    words, lm = tmp_path / "words.txt", tmp_path / "words.arpa"
    words.write_text("c\nab\n")
    lm.write_text("\\data\\\nngram 1=2\n\\1-grams:\n-1 c\n-1 ab\n\\end\\\n")
    run = ("run", "--engine", tiny_ctc_onnx, "--json", clip)
    free = json.loads(cli(*run, "--beam", 4).stdout)
    limited = json.loads(cli(*run, "--words", words, "--lm", lm).stdout)
    assert not set(free["text"].split()) <= {"c", "ab"}
    assert set(limited["text"].split()) <= {"c", "ab"}
    assert limited["text"]


@pytest.mark.parametrize("option", ["--beam", "--words", "--lm"])
def test_a_keyword_model_has_no_search(cli, tiny_onnx, clip, option):
    done = cli("run", "--engine", tiny_onnx, option, 4, clip)
    assert done.exit_code == 2
    wrong = f"--beam, --words and --lm are for models that write text, not for {tiny_onnx}"
    assert wrong in done.stderr


def test_a_word_list_that_is_none_is_one_line(refused, tiny_ctc_onnx, clip, tmp_path):
    (tmp_path / "words.txt").write_text("ab\nabd\n")
    said = refused("run", "--engine", tiny_ctc_onnx, "--words", tmp_path / "words.txt", clip)
    assert said == (
        f"{tmp_path / 'words.txt'}: line 2 has 'd', and the characters of this model are 'abc'; "
        "give one word on each line"
    )


# As a stream.


def events_of(path, samples, step, rate=None, decode=None):
    with StreamSession(path, rate, decode=decode) as stream:
        found = [
            e for i in range(0, len(samples), step) for e in stream.push(samples[i : i + step])
        ]
        return found + stream.flush()


def finals(events):
    return [(e.text, e.start, e.end) for e in events if e.type == "final"]


@pytest.mark.parametrize("config", DECODERS, ids=["greedy", "beam"])
def test_a_stream_is_the_text_of_its_clip(tiny_ctc_onnx, rng, config):
    samples = noise_of(rng)
    with open_session(tiny_ctc_onnx) as session:
        expected = clip_transcript(session.spec, clip_logits(session, samples), config)
    for step in (100, 4_000, 10**6):
        events = events_of(tiny_ctc_onnx, samples, step, decode=config)
        end = min(expected.words[-1].end, 1.0)
        assert finals(events) == [(expected.text, expected.words[0].start, end)]
        partial = [event for event in events if event.type == "partial"]
        assert len(partial) > 3 or step > 100
        assert all(isinstance(event, TextEvent) and event.text for event in events)


def test_audio_that_was_lost_moves_the_times(tiny_ctc_onnx, rng):
    samples = noise_of(rng)
    ((text, start, end),) = finals(events_of(tiny_ctc_onnx, samples, 1600))
    with StreamSession(tiny_ctc_onnx) as stream:
        stream.lose(2.5)
        moved = finals(stream.push(samples) + stream.flush())
        stream.reset()
        again = finals(stream.push(samples) + stream.flush())
    assert moved == [(text, pytest.approx(start + 2.5), pytest.approx(end + 2.5))]
    assert again == [(text, start, end)]


def test_audio_that_was_lost_in_a_text_moves_what_comes_after_it(tiny_ctc_onnx, rng):
    samples = noise_of(rng, 3)
    with StreamSession(tiny_ctc_onnx) as stream:
        stream.push(samples)
        (whole,) = (event for event in stream.flush() if event.type == "final")
        torn_s = whole.words[len(whole.words) // 2].start
        torn_at = round(torn_s * RATE)
        stream.reset()
        stream.push(samples[:torn_at])
        stream.lose(2.5)
        stream.push(samples[torn_at:])
        (torn,) = (event for event in stream.flush() if event.type == "final")
    assert torn.text == whole.text
    late = [2.5 if word.start >= torn_s else 0 for word in whole.words]
    assert set(late) == {0, 2.5}
    moved = [b.start - a.start for a, b in zip(whole.words, torn.words, strict=True)]
    assert moved == pytest.approx(late)
    assert (torn.start, torn.end) == (whole.start, pytest.approx(whole.end + 2.5))


def test_the_command_writes_a_stream(cli, tiny_ctc_onnx, clip):
    run = ("run", "--engine", tiny_ctc_onnx, "--stream", clip)
    shown = cli(*run)
    assert shown.exit_code == 0, shown.stderr
    ((text, start, _),) = finals(events_of(tiny_ctc_onnx, read_audio(clip, RATE).samples, 1600))
    assert shown.stdout == f"{start:9.2f} s  {text}\n"
    assert "1.0 s of audio, 1 texts, real-time factor " in shown.stderr
    assert "\x1b" not in shown.stderr
    events = [json.loads(line) for line in cli(*run, "--json").stdout.splitlines()]
    assert [event["type"] for event in events[-1:]] == ["final"]
    keys = {"type", "text", "start", "end", "words", "latency_ms"}
    assert all(e.keys() == keys for e in events)
    words = events[-1]["words"]
    assert " ".join(word["word"] for word in words) == text
    assert (words[0]["start"], words[-1]["end"]) == (events[-1]["start"], events[-1]["end"])


def test_on_a_terminal_the_line_is_rewritten(tiny_ctc_onnx, clip):
    ours, theirs = pty.openpty()
    command = [*START, "run", "--engine", tiny_ctc_onnx, "--stream", clip]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        written = process.stdout.read().decode()
        shown = b""
        try:
            while more := os.read(ours, 1 << 16):
                shown += more
        except OSError:  # how a terminal ends on Linux
            pass
    os.close(ours)
    assert process.returncode == 0
    text = written.split("s  ")[1].strip()
    first, *lines = shown.decode().split("\r\x1b[K")
    assert first == ""
    assert lines[-1].startswith("1.0 s of audio, 1 texts")  # what was partial is gone
    assert all(text.startswith(line) or line == "" for line in lines[:-1])
    assert any(lines[:-1])


CTC_CHECKPOINT = PRETRAINED / "ctc.safetensors"


@pytest.mark.skipif(not CTC_CHECKPOINT.exists(), reason="no CTC model comes with the package yet")
def test_the_ctc_model_that_comes_with_the_package_writes_words(demo, tmp_path):
    from cnngru_edge.export.trace.model import export_onnx
    from cnngru_edge.models.nets.checkpoint import load_checkpoint

    path = tmp_path / "ctc.onnx"
    export_onnx(load_checkpoint(CTC_CHECKPOINT).for_export(), path)
    clips = [clip for clip in demo.of("eval") if clip.text and clip.text != "unknown"]
    wanted = {clip.text for clip in clips}
    with open_session(path) as session:
        right = sum(recognize(session, clip.path).text == clip.text for clip in clips)
    assert right / len(clips) > 0.5
    said = {clip.text: read_audio(clip.path, RATE).samples for clip in clips}
    pause = np.zeros(RATE, np.float32)
    samples = np.concatenate([part for text in sorted(said) for part in (said[text], pause)])
    events = finals(events_of(path, samples, 1600))
    found = [text for text, _, _ in events]
    assert sum(text in wanted for text in found) > len(wanted) / 2
