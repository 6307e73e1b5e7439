from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from factories import make_wave, write_container, write_wav

from lalia import audio

RATE = 16000


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("flac", "PCM_16", 1e-4),
        ("flac", "PCM_24", 1e-6),
        ("aiff", "PCM_16", 1e-4),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossless_formats_are_read_exactly(tmp_path, suffix, subtype, tolerance, channels):
    path = tmp_path / f"clip.{suffix}"
    wave = write_wav(path, 0.5, 22050, channels=channels, subtype=subtype)
    got, rate = audio.read(path)
    assert rate == 22050 and got.dtype == np.float32 and got.shape == wave.shape
    assert np.abs(got - wave).max() < tolerance
    found = audio.info(path)
    assert (found.sample_rate, found.channels) == (22050, channels)
    assert found.seconds == len(wave) / 22050  # V-18: by the header, whatever the bytes per sample


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The highest normalised cross-correlation over small delays."""
    size = min(len(a), len(b)) - 2000
    windows = np.lib.stride_tricks.sliding_window_view(b[: size + 2000], size)[::8]
    return float(max(np.corrcoef(a[:size], window)[0, 1] for window in windows))


@pytest.mark.parametrize(("suffix", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")])
def test_lossy_formats_of_soundfile(tmp_path, suffix, subtype):
    path = tmp_path / f"clip.{suffix}"
    wave = write_wav(path, 1.0, RATE, subtype=subtype)
    got, rate = audio.read(path, RATE)
    assert rate == RATE and abs(len(got) - len(wave)) <= 0.1 * RATE
    assert correlation(wave, got) > 0.95


@pytest.mark.parametrize(
    ("name", "codec", "container", "rate"),
    [
        ("clip.g722", "g722", "g722", 16000),
        ("clip.webm", "libopus", "webm", 48000),
        ("clip.m4a", "aac", "ipod", 44100),
        ("clip.mka", "pcm_s16le", "matroska", 44100),
    ],
)
def test_containers_of_ffmpeg(tmp_path, name, codec, container, rate):
    path = tmp_path / name
    wave = make_wave(1.0, rate)
    write_container(path, wave, rate, codec, container)
    got, got_rate = audio.read(path)
    assert got_rate == rate and got.ndim == 1 and abs(len(got) - len(wave)) <= 0.1 * rate
    assert correlation(wave, got) > 0.9
    found = audio.info(path)
    assert found.channels == 1 and found.seconds == len(got) / rate and codec in (found.codec, "lib" + found.codec)


def test_stereo_container_is_averaged(tmp_path):
    wave = make_wave(0.6, 48000)
    write_container(tmp_path / "two.webm", wave, 48000, "libopus", "webm", layout="stereo")
    got, rate = audio.read(tmp_path / "two.webm", RATE)
    assert rate == RATE and got.ndim == 1 and correlation(audio.resample(wave, 48000, RATE), got) > 0.9
    assert audio.info(tmp_path / "two.webm").channels == 2


@pytest.mark.parametrize("name", ["clip.wav", "clip.flac", "clip.g722"])
def test_a_segment_equals_the_slice_of_the_whole(tmp_path, name):
    path = tmp_path / name
    if name.endswith("g722"):
        write_container(path, make_wave(1.0), RATE, "g722", "g722")
    else:
        write_wav(path, 1.0, RATE)
    whole, _ = audio.read(path)
    part, _ = audio.read(path, start=0.25, duration=0.5)
    assert np.array_equal(part, whole[4000:12000])
    tail, _ = audio.read(path, start=0.75)
    assert np.array_equal(tail, whole[12000:])
    with pytest.raises(audio.AudioError, match=r"ends at 1\.000 s"):
        audio.read(path, start=1.5)
    with pytest.raises(audio.AudioError, match="asked for 0.500 s to 1.500"):
        audio.read(path, start=0.5, duration=1.0)
    rounded, _ = audio.read(path, start=0.5, duration=0.55)  # within the tolerance for rounded manifests
    assert np.array_equal(rounded, whole[8000:])


@pytest.mark.parametrize("name", ["clip.wav", "clip.flac", "clip.mp3", "clip.g722", "clip.webm"])
def test_bytes_decode_like_files(tmp_path, name):
    path = tmp_path / name
    if path.suffix in (".g722", ".webm"):
        codec = {"g722": (16000, "g722"), "webm": (48000, "libopus")}[path.suffix[1:]]
        write_container(path, make_wave(0.5, codec[0]), codec[0], codec[1], path.suffix[1:])
    else:
        write_wav(path, 0.5, RATE)
    expected, rate = audio.read(path)
    for hint in (name, path.suffix, f"audio/{path.suffix[1:]}"):
        got, got_rate = audio.decode_bytes(path.read_bytes(), hint=hint)
        assert got_rate == rate and np.array_equal(got, expected)


@pytest.mark.parametrize("container", ["wav", "flac", "ogg", "mp3", "webm", "m4a"])
def test_a_truncated_file_is_an_error_or_not_shorter(tmp_path, container):
    """Cut in the middle, every container that says its length is refused."""
    path = tmp_path / f"cut.{container}"
    if container in ("webm", "m4a"):
        codec, kind = {"webm": ("libopus", "webm"), "m4a": ("aac", "ipod")}[container]
        write_container(path, make_wave(3.0, 48000), 48000, codec, kind)
    else:
        write_wav(path, 3.0, RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError, match=r"cut\.\w+: .*(truncated|no samples)"):
        audio.read(path)


def test_a_streamed_wav_header_is_no_truncation(tmp_path):
    path = tmp_path / "pipe.wav"
    wave = write_wav(path, 0.5, RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert len(audio.read(path)[0]) == len(wave)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"hello, this is no audio " * 50, "not audio"), (bytes(3000), "not audio")]
)
@pytest.mark.parametrize("name", ["bad.wav", "bad.webm", "bad.mp3"])
def test_bad_files_are_named(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    for call in (audio.read, audio.info):
        with pytest.raises(audio.AudioError, match=f"{name}: .*{reason}"):
            call(tmp_path / name)
    with pytest.raises(audio.AudioError, match=reason):
        audio.decode_bytes(content, hint=name)


def test_missing_folder_headerless_and_empty_stream(tmp_path):
    with pytest.raises(audio.AudioError, match=r"gone\.wav: no such file"):
        audio.read(tmp_path / "gone.wav")
    with pytest.raises(audio.AudioError, match="is a folder"):
        audio.info(tmp_path)
    (tmp_path / "samples.raw").write_bytes(bytes(100))
    with pytest.raises(audio.AudioError, match="headerless"):
        audio.read(tmp_path / "samples.raw")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(audio.AudioError, match="no samples"):
        audio.read(tmp_path / "none.wav")


def test_non_finite_samples_are_refused(tmp_path):
    wave = make_wave(0.1)
    wave[10] = np.nan
    soundfile.write(tmp_path / "nan.wav", wave, RATE, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="NaN"):
        audio.read(tmp_path / "nan.wav")
    with pytest.raises(audio.AudioError, match="NaN"):
        audio.write(tmp_path / "out.wav", wave, RATE)
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("name", ["out.wav", "deep/er/out.flac"])
def test_write_then_read_then_write_is_identical(tmp_path, name):
    wave = make_wave(0.3)
    audio.write(tmp_path / name, wave, RATE)
    first, rate = audio.read(tmp_path / name)
    assert rate == RATE and np.abs(first - wave).max() <= 0.5 / 32768 + 1e-7
    data = (tmp_path / name).read_bytes()
    audio.write(tmp_path / name, first, RATE)
    assert (tmp_path / name).read_bytes() == data
    assert os.listdir((tmp_path / name).parent) == [Path(name).name]  # no temporary file stays


def test_clipping_is_said_aloud(tmp_path, caplog):
    audio.write(tmp_path / "loud.wav", np.array([0.0, 1.5, -2.0, 0.5], dtype=np.float32), RATE)
    assert "2 of 4 samples clipped (peak 2.00)" in caplog.text
    assert np.allclose(audio.read(tmp_path / "loud.wav")[0], [0, 1, -1, 0.5], atol=1e-4)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "keep.wav"
    audio.write(path, make_wave(0.1), RATE)
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(OSError, match="no space"):
        audio.write(path, make_wave(0.2), RATE)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["keep.wav"]


@pytest.mark.parametrize("bad", [np.zeros((2, 10)), np.zeros(0)])
def test_write_wants_mono_samples(tmp_path, bad):
    with pytest.raises(audio.AudioError, match="mono"):
        audio.write(tmp_path / "x.wav", bad, RATE)
    with pytest.raises(audio.AudioError, match="can write"):
        audio.write(tmp_path / "x.mp3", make_wave(0.1), RATE)


@pytest.mark.parametrize(("source", "target"), [(16000, 22050), (44100, 16000), (48000, 16000), (8000, 24000)])
def test_resampling_keeps_a_tone_and_removes_what_cannot_be_kept(source, target):
    time = np.arange(source) / source
    got = audio.resample(np.sin(2 * np.pi * 440 * time), source, target)
    assert got.dtype == np.float32 and abs(len(got) - target) <= 1
    inner = slice(target // 10, -target // 10)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(got)) / target)
    assert np.abs(got - expected)[inner].max() < 1e-3
    if target < source:
        alias = audio.resample(np.sin(2 * np.pi * 0.6 * target * time), source, target)
        assert np.abs(alias[inner]).max() < 1e-3


def test_trim_keeps_a_margin_and_leaves_silence_alone():
    speech = make_wave(0.5)
    wave = np.concatenate([np.zeros(8000), speech, np.zeros(4000)]).astype(np.float32)
    trimmed = audio.trim_silence(wave, RATE)
    assert abs(len(trimmed) - (len(speech) + 2 * 800)) <= 2 * 160
    start = 8000 - 800
    assert np.array_equal(trimmed[160:-160], wave[start + 160 : start + len(trimmed) - 160]) or len(trimmed) < len(wave)
    silent = np.zeros(1000, dtype=np.float32)
    assert len(audio.trim_silence(silent, RATE)) == 1000


def test_reading_from_memory_leaves_no_state(tmp_path):
    """libsndfile tries first and moves the position; FFmpeg must see the stream from its start."""
    write_container(tmp_path / "a.webm", make_wave(0.4, 48000), 48000, "libopus", "webm")
    data = (tmp_path / "a.webm").read_bytes()
    first, _ = audio.decode_bytes(data)
    second, _ = audio.decode_bytes(io.BytesIO(data).getvalue())
    assert np.array_equal(first, second)
