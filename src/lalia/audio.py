"""Audio files in and out: decode anything to mono float32, resample, trim, write atomically.

soundfile reads wav, flac, ogg (Vorbis, Opus), mp3, aiff and au of any bit depth. PyAV reads the rest: G.722, the
browser's webm/Opus, m4a. Whatever cannot be read whole is an :class:`AudioError` that names the file and the reason; a
damaged file never becomes silence or a shorter clip. Legend: S samples.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import soxr

log = logging.getLogger(__name__)

Source = Path | BinaryIO  # what both decoders open

RAW_FORMATS = {".g722": "g722"}  # headerless streams that only their suffix identifies → FFmpeg demuxer
MIME_SUFFIX = {"audio/g722": ".g722", "audio/x-g722": ".g722"}
WRITABLE = {".wav": "WAV", ".flac": "FLAC"}
END_TOLERANCE = 0.1  # seconds a requested segment may reach past the end: manifests round their times
STREAMED_SIZE = 0x7FFFFF00  # writers to a pipe put a size at or above this into the header, meaning "unknown"
RESIZED = re.compile(r": (\d+) \(should be (\d+)\)")  # libsndfile's log: header size (size that the file has room for)


#: demuxers that an upload may be given to: formats that hold their sound themselves. Playlists (HLS, DASH, concat, SDP) name
#: other files and addresses, and FFmpeg would open those.
UPLOAD_FORMATS = "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,caf,flac,flv,g722,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
HIGHEST_RATE = 192_000  # Hz; with a limit of seconds, a limit of samples


class AudioError(ValueError):
    """Audio that cannot be used. The message names the file and the reason."""


class EmptyAudio(AudioError):
    """No bytes, or no samples."""


class NotAudio(AudioError):
    """Bytes that are no sound in any known format."""


class AudioTooLong(AudioError):
    """Longer than the limit of :func:`decode_bytes`."""


@dataclass
class AudioInfo:
    """What a file holds. ``seconds`` is exact (header or decoding), never guessed from the file size."""

    sample_rate: int
    channels: int
    seconds: float
    codec: str


def info(path: str | Path) -> AudioInfo:
    """Rate, channels, exact length and codec of ``path``.

    Formats without a trustworthy length (webm, G.722, m4a) are decoded to count their samples.

    Raises:
        AudioError: missing, empty, truncated or not audio.
    """
    path = _checked(path)
    opened = None if path.suffix.lower() in RAW_FORMATS else _open_soundfile(path, str(path))
    if opened is None:
        wave, found = _decode_av(path, str(path), RAW_FORMATS.get(path.suffix.lower()), 0.0, 0.0)
        return AudioInfo(found.sample_rate, found.channels, len(wave) / found.sample_rate, found.codec)
    with opened as file:
        return AudioInfo(file.samplerate, file.channels, file.frames / file.samplerate, file.subtype.lower())


def read(
    path: str | Path, sample_rate: int | None = None, start: float = 0.0, duration: float = 0.0
) -> tuple[np.ndarray, int]:
    """Decode ``path`` (or the ``duration`` seconds from ``start``; 0 = to the end) to mono.

    Channels are averaged. wav, flac, ogg and mp3 seek to ``start``; other containers are decoded up to the end of the
    segment, because their codecs carry state and a seek would change the first samples.

    Returns:
        wave: float32 ``[S]`` in [-1, 1] for integer formats, and its sample rate (``sample_rate`` when given).

    Raises:
        AudioError: missing, empty, truncated, not audio, non-finite samples, or a segment outside the file.
    """
    path = _checked(path)
    return _decode(path, str(path), RAW_FORMATS.get(path.suffix.lower()), sample_rate, start, duration)


def decode_bytes(
    data: bytes, sample_rate: int | None = None, hint: str = "", max_seconds: float = 0.0
) -> tuple[np.ndarray, int]:
    """Decode an upload held in memory. ``hint`` is a file name, suffix or MIME type; only headerless formats need it.

    Nothing but ``data`` is read: formats that refer to other files are refused. Sound above ``max_seconds`` (0 = no limit) is
    refused before it fills the memory, whatever its header says.

    Returns and raises as :func:`read`; EmptyAudio, NotAudio and AudioTooLong tell the common reasons apart.
    """
    name = f"{len(data)} bytes of audio" + (f" ({hint})" if hint else "")
    if not data:
        raise EmptyAudio(f"{name}: empty (0 bytes)")
    suffix = MIME_SUFFIX.get(hint.split(";")[0].strip().lower(), Path("x." + hint.rsplit(".", 1)[-1].lower()).suffix)
    return _decode(io.BytesIO(data), name, RAW_FORMATS.get(suffix), sample_rate, 0.0, 0.0, max_seconds)


def write(path: str | Path, wave: np.ndarray, sample_rate: int) -> None:
    """Write a mono ``wave [S]`` as 16-bit wav or flac (by the suffix). Readers see the old file or the whole new one.

    Samples outside [-1, 1] are clipped and a warning says how many. What ``read`` returns is written back identically.

    Raises:
        AudioError: wrong suffix or shape, no samples, or non-finite samples.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise AudioError(f"{path}: can write {', '.join(WRITABLE)}, not {path.suffix or 'a name without suffix'!r}")
    samples = np.asarray(wave, dtype=np.float32)
    if samples.ndim != 1 or samples.size == 0:
        raise AudioError(f"{path}: expected mono samples of shape [S], S > 0, got {list(samples.shape)}")
    _require_finite(samples, str(path))
    over = int(np.count_nonzero(np.abs(samples) > 1.0))
    if over:
        log.warning("%s: %d of %d samples clipped (peak %.2f)", path, over, samples.size, float(np.abs(samples).max()))
    integers = np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        soundfile.write(temporary, integers, sample_rate, format=WRITABLE[path.suffix.lower()], subtype="PCM_16")
        Path(temporary).chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr HQ) of ``wave [S]`` to float32.

    The result has S · to_rate / from_rate samples, give or take one.
    """
    samples = np.ascontiguousarray(wave, dtype=np.float32)
    if from_rate <= 0 or to_rate <= 0:
        raise AudioError(f"sample rates must be above 0, got {from_rate} and {to_rate}")
    if from_rate == to_rate:
        return samples
    return np.asarray(soxr.resample(samples, from_rate, to_rate), dtype=np.float32)


def trim_silence(wave: np.ndarray, sample_rate: int, keep: float = 0.05, below_peak_db: float = 40.0) -> np.ndarray:
    """Cut silence off both ends of ``wave [S]``, keeping ``keep`` seconds of it.

    Silence is where the RMS of 10 ms frames lies more than ``below_peak_db`` under the loudest frame. An all-zero wave
    comes back as it is.
    """
    frame = max(1, sample_rate // 100)
    count = len(wave) // frame
    if count < 2:
        return wave
    energy = np.square(wave[: count * frame].astype(np.float64)).reshape(count, frame).mean(axis=1)
    loud = np.flatnonzero(energy > energy.max() * 10.0 ** (-below_peak_db / 10.0))
    if loud.size == 0:
        return wave
    margin = int(keep * sample_rate)
    return wave[max(0, loud[0] * frame - margin) : (loud[-1] + 1) * frame + margin]


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.is_dir():
        raise AudioError(f"{path}: is a folder, not an audio file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty (0 bytes)")
    if path.suffix.lower() in (".raw", ".pcm"):
        raise AudioError(f"{path}: headerless samples carry neither rate nor format; convert the file to wav first")
    return path


def _decode(
    source: Source,
    name: str,
    raw_format: str | None,
    sample_rate: int | None,
    start: float,
    duration: float,
    max_seconds: float = 0.0,
) -> tuple[np.ndarray, int]:
    if start < 0 or duration < 0:
        raise AudioError(f"{name}: start and duration must not be negative, got {start} and {duration}")
    opened = None if raw_format else _open_soundfile(source, name)
    if opened is None:
        wave, found = _decode_av(source, name, raw_format, start, duration, max_seconds)
        rate = found.sample_rate
    else:
        with opened as file:
            _require_short(name, file.frames, file.samplerate, max_seconds)
            wave, rate = _decode_soundfile(file, name, start, duration), file.samplerate
    _require_finite(wave, name)
    if sample_rate and sample_rate != rate:
        wave, rate = resample(wave, rate, sample_rate), sample_rate
    if wave.size == 0:
        raise EmptyAudio(f"{name}: holds no samples")
    return wave, rate


def _require_short(name: str, samples: int, rate: int, max_seconds: float) -> None:
    if max_seconds and samples > max_seconds * min(rate, HIGHEST_RATE):
        raise AudioTooLong(f"{name}: longer than the limit of {max_seconds:g} s; cut it into parts")


def _require_finite(wave: np.ndarray, name: str) -> None:
    if not np.isfinite(wave).all():
        raise AudioError(f"{name}: holds samples that are NaN or infinite")


def _require_within(name: str, start: float, duration: float, length: float) -> None:
    if start >= length or start + duration > length + END_TOLERANCE:
        end = f"{start + duration:.3f}" if duration else "the end"
        raise AudioError(f"{name}: asked for {start:.3f} s to {end}, but it ends at {length:.3f} s")


def _open_soundfile(source: Source, name: str) -> soundfile.SoundFile | None:
    """The open file, or None when libsndfile does not know the format."""
    try:
        file = soundfile.SoundFile(str(source) if isinstance(source, Path) else source)
    except soundfile.LibsndfileError:
        if not isinstance(source, Path):
            source.seek(0)
        return None
    reason = _damage(file)
    if reason:
        empty = file.frames <= 0 and "truncated" not in reason
        file.close()
        raise (EmptyAudio if empty else AudioError)(f"{name}: {reason}")
    return file


def _damage(file: soundfile.SoundFile) -> str:
    """Why the file is not whole, or ``""``. libsndfile mends a truncated header and tells only its log."""
    for declared, present in RESIZED.findall(file.extra_info):
        if int(present) + 8 < int(declared) < STREAMED_SIZE:
            return f"truncated: the header promises {declared} bytes of audio, {present} are there"
    if "File ended unexpectedly" in file.extra_info or "Junk after the last page" in file.extra_info:
        return "truncated: the stream ends in the middle of a page"
    return "" if file.frames > 0 else "holds no samples"


def _decode_soundfile(file: soundfile.SoundFile, name: str, start: float, duration: float) -> np.ndarray:
    rate = file.samplerate
    _require_within(name, start, duration, file.frames / rate)
    first = round(start * rate)
    wanted = min(round(duration * rate) or file.frames, file.frames - first)
    try:
        file.seek(first)
        samples = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: damaged or truncated ({error})") from error
    if len(samples) < wanted:
        raise AudioError(f"{name}: truncated: the header promises {wanted} samples, {len(samples)} are there")
    return samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]


def _open_av(source: Source, name: str, raw_format: str | None) -> Any:
    """The opened container. An upload may only be in a format that holds its sound itself."""
    try:
        if isinstance(source, Path):
            return av.open(str(source), format=raw_format)
        return av.open(source, format=raw_format, options={"format_whitelist": UPLOAD_FORMATS, "protocol_whitelist": "none"})
    except av.error.FFmpegError as error:
        raise NotAudio(f"{name}: not audio, damaged or truncated ({error.strerror})") from error


def _decode_av(
    source: Source, name: str, raw_format: str | None, start: float, duration: float, max_seconds: float = 0.0
) -> tuple[np.ndarray, AudioInfo]:
    """Decode the first audio stream with FFmpeg. ``AudioInfo.seconds`` is the length that was decoded."""
    try:
        with _open_av(source, name, raw_format) as container:
            if not container.streams.audio:
                raise NotAudio(f"{name}: holds no audio stream")
            stream = container.streams.audio[0]
            rate, channels, codec = stream.rate, stream.channels, stream.codec_context.name
            stop = round((start + duration) * rate) if duration else 0
            pieces, total = [], 0
            for piece in _blocks(container, stream):
                pieces.append(piece)
                total += len(piece)
                _require_short(name, total, rate, max_seconds)
                if stop and total >= stop:
                    break
            declared = _declared_seconds(container, stream)
    except av.error.FFmpegError as error:
        raise AudioError(f"{name}: not audio, damaged or truncated ({error.strerror})") from error
    seconds = total / rate
    if not total:
        raise EmptyAudio(f"{name}: holds no samples")
    if declared > max(1.05 * seconds, seconds + 0.5) and not stop:
        raise AudioError(f"{name}: truncated: the header promises {declared:.2f} s, {seconds:.2f} s are there")
    _require_within(name, start, duration, seconds)
    wave = np.concatenate(pieces)[round(start * rate) : stop or None]
    return wave, AudioInfo(rate, channels, seconds, codec)


def _blocks(container: Any, stream: Any) -> Iterator[np.ndarray]:
    """Mono float32 blocks of one stream. Planar float at the stream's own rate and layout; channels averaged here."""
    converter = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        for block in converter.resample(frame):
            yield block.to_ndarray().mean(axis=0, dtype=np.float32)
    for block in converter.resample(None):
        yield block.to_ndarray().mean(axis=0, dtype=np.float32)


def _declared_seconds(container: Any, stream: Any) -> float:
    """The length in the header, or 0 where there is none (streamed webm) or FFmpeg only estimates it."""
    if container.format.name in ("mp3", "aac", *RAW_FORMATS.values()):
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0
