import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from conftest import with_head_times

from cnngru_edge.calibration.corpus.read import Clip
from cnngru_edge.export.verdict.answers import (
    Answer,
    Answered,
    Artefact,
    Conditions,
    Results,
    answer,
    answer_clips,
)
from cnngru_edge.export.verdict.compare import (
    compare,
    compare_results,
    comparison_fields,
)
from cnngru_edge.export.verdict.doubt import doubt_about
from cnngru_edge.export.verdict.flips import hear_again, save_flips
from cnngru_edge.models.atomic import file_sha256
from cnngru_edge.models.errors import AudioError, CorpusError, SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.label import clip_scores
from cnngru_edge.runtime.inputs.audio import read_audio
from cnngru_edge.runtime.stream import clip_logits

FLOAT, INT8 = "model.fp32.onnx", "model.int8.onnx"
LABELS = ("silence", "yes", "no")


CLEAN_SHA256 = Conditions().sha256


def results(
    *answers, name="a.onnx", conditions=("clean",), paths=None, sha256=CLEAN_SHA256, root=None
):
    """Of clips, each as `true reference`, or `true first second` for two conditions."""
    clips = []
    for i, (true, *said) in enumerate(row.split() for row in answers):
        path = paths[i] if paths else f"{i}.flac"
        given = tuple(Answer(label, 0.5) for label in said)
        heard = file_sha256(root / path) if root else f"hash of {path}"
        clips.append(Answered(path, heard, true, f"speaker {i % 2}", given))
    artefact = Artefact(name, "sha256", "fp32", "onnxruntime", "cpu")
    return Results(artefact, LABELS, 16_000, conditions, sha256, tuple(clips))


@pytest.fixture
def few(demo):
    return demo.of("eval")[::12]


def test_each_clip_counts_where_it_belongs():
    reference = results("yes yes", "yes yes", "no no", "no yes", "silence silence")
    candidate = results("yes yes", "yes no", "no no", "no no", "silence silence", name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    assert found.clips == 5
    clean = found.clean
    assert (clean.reference_accuracy, clean.candidate_accuracy) == (0.8, 0.8)
    assert (clean.delta, clean.agreement, clean.mcnemar_p) == (0, 0.6, 1)
    assert found.confusion == {
        "reference": [[1, 0, 0], [0, 2, 0], [0, 1, 1]],
        "candidate": [[1, 0, 0], [0, 1, 1], [0, 0, 2]],
    }
    assert [(f.path, f.true, f.reference, f.candidate) for f in found.flips] == [
        ("1.flac", "yes", "yes", "no"),
        ("3.flac", "no", "yes", "no"),
    ]
    assert [(g.group, g.clips, g.delta, g.flips) for g in found.by_class] == [
        ("silence", 1, 0, 0),
        ("yes", 2, -50, 1),
        ("no", 2, 50, 1),
    ]
    assert [(g.group, g.clips) for g in found.by_speaker] == [("speaker 1", 2), ("speaker 0", 3)]
    assert found.verdict == "not enough data"
    assert not found.passed
    assert "for a margin of 0.5" in found.summary


@pytest.mark.parametrize(
    ("rows", "doubt"),
    [
        (
            ("yes yes", "no yes", "no yes"),
            "is right on 33.3% here, and always to answer 'no' would",
        ),
        (("yes yes", "no yes"), "is right on 50.0% here, and always to answer '"),
        (("yes yes", "yes yes", "no yes", "no no"), None),
        (("yes yes", "yes yes"), None),  # of one class
        (
            (*["silence silence"] * 30, *["yes no"] * 10, *["no yes"] * 9, "no no"),
            "answers 'no' to 10 of 10 clips of 'yes'",
        ),
        ((*["silence silence"] * 30, *["yes no"] * 8, "yes yes", *["no yes"] * 9), None),  # too few
        ((*["silence silence"] * 30, *["yes no"] * 10, *["no no"] * 10), None),  # one is not known
    ],
)
def test_a_model_that_is_no_better_than_one_answer_is_doubted(rows, doubt):
    found = doubt_about(compare_results(results(*rows), results(*rows), margin=1))
    assert (found is None) if doubt is None else found.startswith(f"the float model {doubt}")


def test_the_gravest_condition_decides():
    good, bad = ["yes yes yes"] * 2000, ["yes yes no"] * 2000
    heard = ("clean", "0 dB")
    reference = results(*good, conditions=heard)
    candidate = results(*bad, conditions=heard, name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    assert [c.verdict for c in found.conditions] == ["equal", "worse"]
    assert found.verdict == "worse"
    assert {c.confidence for c in found.conditions} == {0.975}
    assert {f.condition for f in found.flips} == {"0 dB"}
    better = compare_results(candidate, reference, margin=0.5)
    assert (better.verdict, better.passed) == ("better", True)
    # An interval of more confidence is wider than the one that is given for the clean clips alone.
    assert found.clean.delta_ci[0] < found.delta_ci95[0]


def test_only_clips_that_both_have_heard_are_compared():
    reference = results("yes yes", "no no", paths=["a", "b"])
    candidate = results("no no", "no yes", paths=["b", "c"], name="b.onnx")
    found = compare_results(reference, candidate, margin=0.5)
    assert (found.clips, found.left_out) == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": ("silence", "yes", "ja")},
            "b.onnx: labels are silence, yes, ja; those of a.on",
        ),
        ({"conditions": ("clean", "5 dB")}, "heard clean, 5 dB, those of a.onnx clean; give both"),
        ({"conditions_sha256": "other"}, "give both the same --noise, --snr and --seed"),
    ],
)
def test_what_was_not_asked_the_same_is_refused(change, message):
    with pytest.raises(SessionError, match=message):
        compare_results(
            results("yes yes"), replace(results("yes yes", name="b.onnx"), **change), margin=0.5
        )


def test_another_recording_of_the_same_name_is_refused():
    other = results("yes yes", name="b.onnx")
    other = replace(other, clips=(replace(other.clips[0], sha256="another"),))
    with pytest.raises(CorpusError, match=r"0.flac: not the recording, or not the label, that a.o"):
        compare_results(results("yes yes"), other, margin=0.5)
    with pytest.raises(CorpusError, match=r"a.onnx and b.onnx have no clip in common"):
        compare_results(
            results("yes yes"), results("yes yes", name="b.onnx", paths=["x"]), margin=0.5
        )


def test_the_answers_are_those_of_a_direct_computation(exported, demo, few):
    found, errors = answer_clips(exported / INT8, demo.root, few, Conditions())
    assert errors == []
    assert [clip.path for clip in found.clips] == [
        clip.path.relative_to(demo.root).as_posix() for clip in few
    ]
    with open_session(exported / INT8) as session:
        for clip, answered in zip(few, found.clips, strict=True):
            scores = clip_scores(
                session.spec, clip_logits(session, read_audio(clip.path, 16_000).samples)
            )
            first, second = np.sort(scores)[:-3:-1]
            assert answered.answers[0].label == session.spec.labels[scores.argmax()]
            assert answered.answers[0].margin == pytest.approx(first - second, abs=1e-6)
            assert answered.true == clip.label


@pytest.fixture
def noisy(wav, rng):
    wav("noise/white.wav", rng.normal(0, 0.1, 20_000))
    wav("noise/brown.wav", np.cumsum(rng.normal(0, 1e-3, 30_000)))
    folder = wav("noise/hum.wav", 0.1 * np.sin(np.arange(8_000) / 25)).parent
    return Conditions(tuple(sorted(folder.iterdir())), (20.0, 0.0), seed=3)


def test_noise_lies_so_many_db_below_a_clip(noisy, rng):
    clip = rng.normal(0, 0.05, 16_000).astype(np.float32)
    clean, *mixed = noisy.heard(clip, "f" * 64, 16_000)
    assert np.array_equal(clean, clip)
    for snr_db, heard in zip(noisy.snrs_db, mixed, strict=True):
        noise = heard - clip
        assert 10 * np.log10(np.mean(clip**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.1)
    noises = [heard - clip for heard in mixed]
    np.testing.assert_allclose(noises[0] * 10, noises[1], rtol=1e-2, atol=1e-4)  # the same noise
    hashes = [f"{i:016x}" * 4 for i in range(8)]
    others = [list(noisy.heard(clip, sha256, 16_000))[1] for sha256 in hashes]
    assert len({heard.tobytes() for heard in others}) > 4  # the hum is the same wherever it starts


def test_results_depend_on_neither_workers_nor_order(exported, demo, few, noisy):
    one, _ = answer_clips(exported / INT8, demo.root, few, noisy)
    two, _ = answer_clips(exported / INT8, demo.root, few[::-1], noisy, workers=2)
    assert replace(two, clips=two.clips[::-1]) == one
    other_seed = replace(noisy, seed=4)
    assert answer_clips(exported / INT8, demo.root, few, other_seed)[0] != one


def test_results_are_as_good_as_the_artefact(exported, demo, few, tmp_path):
    found, _ = answer_clips(exported / FLOAT, demo.root, few, Conditions())
    found.save(tmp_path / "float.json")
    assert Results.load(tmp_path / "float.json") == found
    direct, _ = compare(exported / FLOAT, exported / INT8, demo.root, few)
    carried, _ = compare(tmp_path / "float.json", exported / INT8, demo.root, few)
    assert carried == direct


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a results file"),
        ("no JSON", "not a results file"),
        ('{"format": 99}', "another version's format"),
        ('{"format": 1}', "not a results file"),
    ],
)
def test_what_is_no_results_file_is_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SessionError, match=message):
        Results.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"true": "ja"},
        {"answers": []},
        {"answers": [{"label": "ja", "margin": 1}]},
        {"answers": [{"label": "yes", "margin": "much"}]},
        {"path": "1.flac"},
    ],
)
def test_answers_that_are_none_of_the_labels_are_refused(tmp_path, change):
    path = tmp_path / "results.json"
    results("yes yes", "no no").save(path)
    raw = json.loads(path.read_text())
    raw["clips"][0] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(SessionError, match="not a results file"):
        Results.load(path)


def test_a_model_that_answers_nan_is_named(exported, tmp_path):
    damaged = with_head_times(np.float32("nan"), exported / FLOAT, tmp_path / "damaged.onnx")
    with (
        open_session(damaged) as session,
        pytest.raises(SessionError, match="answers NaN; its file is damaged, export it again"),
    ):
        answer(session, np.zeros(16_000, np.float32))


def test_flips_are_saved_as_they_were_heard(wav, tmp_path, rng, noisy):
    said = rng.normal(0, 0.05, 8_000).astype(np.float32)
    wav("corpus/yes/one two.wav", said, subtype="FLOAT")
    path = "yes/one two.wav"
    options = {
        "conditions": noisy.names,
        "sha256": noisy.sha256,
        "paths": [path],
        "root": tmp_path / "corpus",
    }
    comparison = compare_results(
        results("yes yes yes yes", **options),
        results("yes no yes no", **options, name="b.onnx"),
        margin=0.5,
    )
    folder = tmp_path / "flips"
    save_flips(comparison, tmp_path / "corpus", folder, noisy)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["001_clean_yes_yes_no_one-two.wav", "002_0-dB_yes_yes_no_one-two.wav"]
    clean = soundfile.read(folder / names[0], dtype="float32")[0]
    np.testing.assert_allclose(clean, said, atol=2**-15)  # 16 bits
    mixed, rate = soundfile.read(folder / names[1])
    assert rate == 16_000
    noise = mixed - said
    assert np.mean(said**2) / np.mean(noise**2) == pytest.approx(1, abs=0.05)


def test_a_clip_that_is_not_here_cannot_be_saved(tmp_path):
    comparison = compare_results(results("yes yes"), results("yes no", name="b.onnx"), margin=0.5)
    with pytest.raises(AudioError, match=r"0.flac: no such file"):
        save_flips(comparison, tmp_path, tmp_path / "flips")
    assert not (tmp_path / "flips").exists()


def test_flips_are_not_added_to_those_of_another_comparison(wav, tmp_path):
    wav("flips/001_old.wav", np.zeros(100, np.float32))
    comparison = compare_results(results("yes yes"), results("yes no", name="b.onnx"), margin=0.5)
    with pytest.raises(SessionError, match="flips: is there and not empty; give another folder"):
        save_flips(comparison, tmp_path, tmp_path / "flips")


def test_only_what_was_answered_is_heard_again(wav, tmp_path, rng, noisy):
    wav("corpus/a.wav", rng.normal(0, 0.1, 8_000))
    options = {"paths": ["a.wav"], "root": tmp_path / "corpus"}
    comparison = compare_results(
        results("yes yes", **options), results("yes no", **options), margin=0.5
    )
    hear = hear_again(comparison, tmp_path / "corpus", Conditions())
    assert len(hear("a.wav", "clean").samples) == 8_000
    with pytest.raises(SessionError, match=r"heard clean, not clean, 20 dB, 0 dB with thes"):
        hear_again(comparison, tmp_path / "corpus", noisy)
    wav("corpus/a.wav", rng.normal(0, 0.1, 8_000))
    with pytest.raises(AudioError, match=r"a.wav: another recording than the one that was answer"):
        hear("a.wav", "clean")


def test_other_noise_is_noticed_before_the_long_part(exported, demo, few, noisy, tmp_path):
    found, _ = answer_clips(exported / FLOAT, demo.root, few[:2], noisy)
    found.save(tmp_path / "float.json")
    with pytest.raises(SessionError, match=r"float.json: answers to clips heard clean, 20 dB"):
        compare(tmp_path / "float.json", exported / INT8, demo.root, few[:2])
    again = tmp_path / "float.json", tmp_path / "float.json"
    assert compare(*again, demo.root, few[:2])[0].clips == 2  # nothing is heard, nothing to check


def test_json_has_what_follows_from_the_answers():
    comparison = compare_results(results("yes yes"), results("yes no", name="b.onnx"), margin=0.5)
    fields = json.loads(json.dumps(comparison_fields(comparison)))
    assert fields["verdict"] == comparison.verdict
    assert fields["delta"] == -100
    assert fields["delta_ci95"] == pytest.approx(comparison.delta_ci95)
    assert fields["candidate"]["path"] == "b.onnx"
    assert fields["flips"][0]["candidate_margin"] == 0.5


# The command.


def test_exit_codes_follow_the_verdict(cli, exported, tmp_path):
    graphs = exported / FLOAT, exported / INT8
    unsettled = cli("compare", *graphs)
    assert unsettled.exit_code == 3
    assert "not enough data for a margin of 0.5; about " in unsettled.stdout
    settled = cli("compare", *graphs, "--margin", 5, "--json")
    assert settled.exit_code == 0
    assert json.loads(settled.stdout)["verdict"] == "equal"


def test_a_device_needs_neither_the_float_model_nor_the_corpus_of_the_host(cli, exported, tmp_path):
    saved = tmp_path / "float.json"
    kept = cli("compare", exported / FLOAT, "--save-results", saved)
    assert kept.exit_code == 0
    assert kept.stdout == f"{saved}: 240 clips\n"
    on_device = cli("compare", saved, exported / INT8, "--margin", 5, "--json")
    direct = cli("compare", exported / FLOAT, exported / INT8, "--margin", 5, "--json")
    assert json.loads(on_device.stdout) == json.loads(direct.stdout)


def test_the_command_mixes_noise_and_keeps_flips(cli, exported, noisy, tmp_path):
    folder = noisy.noises[0].parent
    found = cli(
        "compare",
        *(exported / FLOAT, exported / INT8),
        *("--noise", folder, "--snr", 0, "--margin", 50, "--workers", 2),
        *("--save-flips", tmp_path / "flips", "--json"),
    )
    assert found.exit_code == 0, found.stderr
    fields = json.loads(found.stdout)
    assert [c["condition"] for c in fields["conditions"]] == ["clean", "0 dB"]
    assert fields["conditions"][1]["reference_accuracy"] < fields["reference_accuracy"]
    assert len(list((tmp_path / "flips").iterdir())) == len(fields["flips"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a CANDIDATE too, or --save-results"),
        (
            (INT8, "--streaming", "--save-flips", "x"),
            "--streaming takes only --margin, --data, --ta",
        ),
        ((INT8, "--streaming", "--snr", 5), "--streaming takes only --margin, --data, --task and"),
        ((INT8, "--streaming", "--workers", 2), "--streaming takes only --margin, --data, --task"),
        ((INT8, "--save-results", "x.txt"), "--save-results: a name that ends with .json"),
        ((INT8, "--noise", "x", "--seed", -1), "'--seed': -1 is not in the range x>=0"),
        ((INT8, "--noise", "x", "--snr", "nan"), "'--snr': nan is no finite number"),
        ((INT8, "--margin", "nan"), "'--margin': nan is no finite number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(cli, exported, arguments, message):
    done = cli("compare", exported / FLOAT, *[exported / a if a == INT8 else a for a in arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_where_there_is_no_noise_is_named(refused, exported, demo, tmp_path):
    (tmp_path / "empty").mkdir()
    graphs = exported / FLOAT, exported / INT8
    how = "give a folder of WAV, FLAC or Ogg with --noise"
    assert refused("compare", *graphs, "--noise", tmp_path / "empty") == (
        f"{tmp_path / 'empty'}: no recordings found; {how}"
    )
    assert refused("compare", *graphs, "--snr", 5) == f"{demo.root}: no noises in the set; {how}"


def test_the_noises_of_the_corpus_are_those_of_the_same_set(
    cli, exported, manifest, demo, wav, rng
):
    for name in ("calib", "eval"):
        wav(f"data/{name}.wav", rng.normal(0, 0.1, 16_000))
    clips = [(clip.path, "eval", clip.label, "kws") for clip in demo.of("eval")[::40]]
    noises = [(f"{name}.wav", name, "_background_noise_", "noise") for name in ("calib", "eval")]
    data = manifest(("path", "set", "label", "task"), *clips, *noises)
    saved = data / "results.json"
    found = cli("compare", exported / FLOAT, "--data", data, "--snr", 3, "--save-results", saved)
    assert found.exit_code == 0, found.stderr
    results_found = Results.load(saved)
    assert results_found.conditions == ("clean", "3 dB")
    assert results_found.conditions_sha256 == Conditions((data / "eval.wav",), (3.0,)).sha256


def test_clips_of_unknown_speakers_are_in_no_group(exported, wav, rng):
    path = wav("corpus/yes/a.wav", rng.normal(0, 0.1, 16_000))
    clips = [Clip(path, "yes", "eval", "")]
    found, _ = compare(exported / FLOAT, exported / INT8, path.parents[1], clips)
    assert found.by_speaker == ()
    assert [group.group for group in found.by_class] == ["yes"]
