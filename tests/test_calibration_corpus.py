from pathlib import Path

import pytest

from cnngru_edge.calibration.corpus.read import (
    Clip,
    calibration_clips,
    calibration_sources,
    match_labels,
    match_texts,
    read_corpus,
)
from cnngru_edge.models.errors import CorpusError


@pytest.fixture
def touch(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.fixture
def manifest(tmp_path):
    def write(*lines):
        (tmp_path / "manifest.csv").write_text("\n".join(lines))
        return tmp_path

    return write


def test_folders_as_in_speech_commands(touch):
    root = touch(
        "yes/aa_nohash_0.wav", "yes/bb_nohash_0.wav", "no/cc_nohash_1.WAV", "no/notes.txt",
        "_background_noise_/hum.wav", "no/._cc.wav",
    )  # fmt: skip
    (root / "validation_list.txt").write_text("yes/bb_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("no/cc_nohash_1.WAV\n")
    corpus = read_corpus(root)
    assert corpus.of("train") == (Clip(root / "yes/aa_nohash_0.wav", "yes", "train", "aa", "yes"),)
    assert corpus.of("calib") == (Clip(root / "yes/bb_nohash_0.wav", "yes", "calib", "bb", "yes"),)
    assert corpus.of("eval") == (Clip(root / "no/cc_nohash_1.WAV", "no", "eval", "cc", "no"),)
    assert [noise.path.name for noise in corpus.noises_of("train")] == ["hum.wav"]


def test_without_lists_speakers_are_drawn_and_stay(touch):
    names = [f"{word}/s{i}_nohash_0.flac" for i in range(400) for word in ("yes", "no")]
    corpus = read_corpus(touch(*names))
    sets = {name: {c.speaker for c in corpus.of(name)} for name in ("train", "calib", "eval")}
    assert 20 < len(sets["calib"]) < 65
    assert 20 < len(sets["eval"]) < 65
    assert sum(map(len, sets.values())) == 400  # no speaker is in two
    again = read_corpus(touch("maybe/new_nohash_0.flac"))
    assert set(corpus.clips) < set(again.clips)


def test_a_manifest_with_tasks(manifest):
    root = manifest(
        "path,set,task,label,speaker",
        "a.wav,train,kws,yes,s1",
        "b.wav,validation,kws,no,s2",
        "c.wav,test,kws,no,s3",
        "d.wav,train,wake,jarvis,",
        "n.wav,train,noise,rain,",
    )
    corpus = read_corpus(root, "kws")
    assert [(c.path, c.set) for c in corpus.clips] == [
        (root / "a.wav", "train"), (root / "b.wav", "calib"), (root / "c.wav", "eval"),
    ]  # fmt: skip
    assert [noise.label for noise in corpus.noises] == ["rain"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label", "a.wav,yes"], "no column set"),
        (["path,set,word", "a.wav,train,yes"], "no column label"),
        (
            ["path,set,label", "a.wav,holdout,yes"],
            "line 2 has set 'holdout', expected train, calib",
        ),
        (["path,set,label"], "no recordings found"),
        (
            ["path,set,label,speaker", "a.wav,train,yes,s1", "b.wav,eval,no,s1"],
            "1 speakers are in more than one set, as 's1' in eval and train; split by speaker",
        ),
        (
            ["path,set,label,task", "a.wav,train,yes,kws", "b.wav,train,no,wake"],
            "several tasks, choose one: kws, wake",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(manifest, lines, message):
    with pytest.raises(CorpusError, match=message):
        read_corpus(manifest(*lines))


def test_a_task_that_is_not_there_is_refused(manifest):
    root = manifest("path,set,label,task", "a.wav,train,yes,kws")
    with pytest.raises(CorpusError, match="no task 'asr', it has kws"):
        read_corpus(root, "asr")


def test_a_recording_beside_the_label_folders_is_refused(touch):
    with pytest.raises(CorpusError, match="lies outside the label folders"):
        read_corpus(touch("yes/a.wav", "b.wav"))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no such folder or manifest"):
        read_corpus(tmp_path / "none")


def test_other_words_are_unknown_to_a_model_that_has_the_label():
    clips = [Clip(Path(word), word, "eval", "") for word in ("yes", "house")]
    assert list(match_labels(clips, ("unknown", "yes")).values()) == ["yes", "unknown"]
    with pytest.raises(CorpusError, match="label 'house' is not in the model, which has no, yes"):
        match_labels(clips, ("no", "yes"))


def test_training_clips_help_out_where_few_are_for_calibration(demo):
    assert calibration_clips(demo, 100) == demo.of("calib")
    assert set(calibration_clips(demo, 1000)) == {*demo.of("calib"), *demo.of("train")}


def test_recordings_without_labels_can_calibrate(touch):
    root = touch("a.wav", "more/b.flac")
    assert calibration_sources(root, None, 1) == [root / "a.wav", root / "more/b.flac"]


def test_evaluation_clips_do_not_calibrate(demo):
    paths = calibration_sources(demo.root, None, 100)
    assert not set(paths) & {clip.path for clip in demo.of("eval")}
    assert len(paths) == len(demo.of("calib"))


def test_the_demo_clips_are_there(demo):
    assert all(clip.path.is_file() for clip in demo.clips)
    assert len(demo.clips) >= 300
    for set_name in ("calib", "eval"):
        assert len({clip.label for clip in demo.of(set_name)}) == 12


def test_a_text_is_its_column_or_the_word_or_the_label(manifest):
    texts = [clip.text for clip in read_corpus(manifest("path,set,label", "a.wav,eval,yes")).clips]
    assert texts == ["yes"]
    root = manifest(
        "path,set,label,word", "a.wav,eval,unknown,Bed", "b.wav,eval,silence,", "c.wav,eval,go,"
    )
    assert [clip.text for clip in read_corpus(root).clips] == ["bed", "", "go"]
    root = manifest("path,set,text", "a.wav,eval,it's the café", "b.wav,eval,")
    assert [(clip.label, clip.text) for clip in read_corpus(root).clips] == [
        ("", "it's the café"),
        ("silence", ""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("go  left", "line 3 has a space too many in its text 'go  left'"),
        ("go ", "line 3 has a space too many in its text 'go '"),
    ],
)
def test_a_text_that_is_not_written_as_it_should_be_is_refused(manifest, text, message):
    root = manifest("path,set,text", "a.wav,train,go left", f"b.wav,train,{text}")
    with pytest.raises(CorpusError, match=message):
        read_corpus(root)


def test_a_manifest_without_files_lists_phrases(manifest):
    root = manifest("text,label,set", "Turn it on!,on,train", "turn it off,off,eval")
    first, second = read_corpus(root).clips
    assert (first.source, first.label, first.set) == ("Turn it on!", "on", "train")
    assert second.path.name == "manifest.csv:3"
    root = manifest("text,label,set", ",on,train")
    with pytest.raises(CorpusError, match="line 2 has no text"):
        read_corpus(root)
    root = manifest("text,label", "turn it on,on")
    with pytest.raises(CorpusError, match="no column set"):
        read_corpus(root)


def test_a_text_needs_the_characters_of_the_model():
    clips = [Clip(Path("a.wav"), "", "eval", "", "no go"), Clip(Path("b.wav"), "", "eval", "")]
    labels = ("<blank>", " ", "g", "n", "o")
    assert match_texts(clips, labels) == {Path("a.wav"): "no go", Path("b.wav"): ""}
    with pytest.raises(CorpusError, match=r"a.wav: text 'no go' has 'g', and .* model are ' no'"):
        match_texts(clips, ("<blank>", " ", "n", "o"))


def test_a_text_needs_the_words_of_a_model_that_writes_words():
    clips = [Clip(Path("a.wav"), "", "eval", "", "no go"), Clip(Path("b.wav"), "", "eval", "")]
    labels = ("<blank>", " go", " no")
    assert match_texts(clips, labels) == {Path("a.wav"): "no go", Path("b.wav"): ""}
    with pytest.raises(CorpusError) as caught:
        match_texts(clips, labels[:2])
    assert str(caught.value) == ("a.wav: text 'no go' has 'no', and the words of this model are go")


def test_an_unknown_word_has_no_text():
    with pytest.raises(CorpusError, match="label 'unknown' does not say what is said"):
        match_texts([Clip(Path("a.wav"), "unknown", "eval", "", "unknown")], tuple("unkow"))
