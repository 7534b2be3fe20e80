"""Pairs of a digit's picture and its spoken name, for multimodal.py.

The pictures are scikit-learn's handwritten digits, real. The speech is synthetic: espeak-ng's voices say the digits,
others of the same part babble over them. Pictures are split by sample, speech by voice, and pairs are made within each
part: to choose by voices that were trained on would be to choose what knows them by heart. As in AV-MNIST the pictures
lose the leading principal components, which hold most of their energy: as they are, they would need no help.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm.auto import tqdm

WORDS = "zero one two three four five six seven eight nine".split()
ACCENTS = "en-us en-gb en-gb-scotland en-gb-x-rp en-029".split()
TRAIN_VOICES = (
    "Alex Andy Annie Denis Gene Jacky Lee Mario Michael adam anika antonio aunty belinda boris croak david ed"
)
TRAIN_VOICES += " f1 f2 f5 grandma iven iven3 linda m1 m3 m5 m7 max"
TEST_VOICES = "Alicia Andrea Diogo Hugo Marco edward f3 f4 grandpa john m2 m4"
Halves = dict[str, tuple[list[np.ndarray], np.ndarray]]  # by name, utterances and their digits
RATE, BINS = 8000, 16  # Hz; of the spectrogram, along time and along frequency
BABBLE, TAKEN = 3, 0.75  # voices over each utterance; share of the energy that the pictures lose
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.2


class Pairs(NamedTuple):
    """``x`` is ``[n, 2, 16, 16]``: the picture, and the spectrogram or whatever goes with it; ``y`` is ``[n]``."""

    x: Tensor
    y: Tensor


def say(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A word as samples of -1 to 1 at 8 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    with wave.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)) as file:
        rate = file.getframerate()
        sound = np.frombuffer(file.readframes(2**24), np.int16) / 2**15
    loud = np.flatnonzero(np.abs(sound) > 0.02)
    sound = sound[loud[0] : loud[-1] + 1]
    at = np.arange(0, len(sound) - 1, rate / RATE)
    smooth = np.convolve(sound, np.ones(3) / 3, "same")  # what 8 kHz cannot hold
    return np.interp(at, np.arange(len(sound)), smooth)


def speech(cache: Path, accents: list[str]) -> Halves:
    """By half, utterances and their digits; kept in ``cache`` once they are spoken."""
    file = cache / f"speech-{len(accents)}.npz"
    if not file.exists():
        if shutil.which("espeak-ng") is None:
            raise SystemExit(
                "espeak-ng, which speaks the digits, is not here: apt-get install espeak-ng, or --data builtin"
            )
        rng = np.random.default_rng(0)
        kept: dict[str, np.ndarray] = {}
        for half, names in (("train", TRAIN_VOICES), ("test", TEST_VOICES)):
            jobs = [(d, f"{accent}+{name}") for name in names.split() for accent in accents for d in range(10)]
            sounds = [
                say(WORDS[digit], voice, int(rng.integers(120, 200)), int(rng.integers(20, 80)))
                for digit, voice in tqdm(jobs, desc=f"speak, {half}", unit="word")
            ]
            kept[half], kept[f"{half}_lengths"] = np.concatenate(sounds), np.array([len(sound) for sound in sounds])
            kept[f"{half}_digits"] = np.array([digit for digit, _ in jobs])
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, **kept)
    found = np.load(file)
    return {
        half: (np.split(found[half], found[f"{half}_lengths"].cumsum()[:-1]), found[f"{half}_digits"])
        for half in ("train", "test")
    }


def babbled(sounds: list[np.ndarray], decibels: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Each utterance with some others over it, ``decibels`` quieter than it is."""
    mixed = []
    for sound in sounds:
        noise = sum(np.resize(sounds[i], len(sound)) for i in rng.integers(len(sounds), size=BABBLE))
        gain = np.sqrt((sound**2).mean() / (noise**2).mean()) * 10 ** (-decibels / 20)
        mixed.append(sound + gain * noise)
    return mixed


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """The logarithm of 16 mel bands ``[16, 16]``, over time that is stretched to the utterance."""
    size = 256
    starts = np.linspace(0, max(len(sound) - size, 0), BINS).astype(int)
    padded = np.pad(sound, (0, size))
    power = np.abs(np.fft.rfft(np.stack([padded[s : s + size] for s in starts]) * np.hanning(size))) ** 2
    mel = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BINS + 2) / 2595) - 1)
    hertz = np.fft.rfftfreq(size, 1 / RATE)
    up = (hertz - mel[:-2, None]) / (mel[1:-1] - mel[:-2])[:, None]
    down = (mel[2:, None] - hertz) / (mel[2:] - mel[1:-1])[:, None]
    return np.log(np.maximum(0, np.minimum(up, down)) @ power.T + 1e-4)


def parted(halves: Halves, each: int, rng: np.random.Generator) -> Halves:
    """The voices to train on without some of them, which are "held", and those to test on; ``each`` utterances each."""
    sounds, digits = halves["train"]
    voices = rng.permutation(len(sounds) // each)
    cut = round(VALIDATION_SHARE * len(voices))
    parts = {"train": sorted(voices[cut:]), "held": sorted(voices[:cut])}
    rows = {part: [each * v + i for v in chosen for i in range(each)] for part, chosen in parts.items()}
    return {part: ([sounds[i] for i in chosen], digits[chosen]) for part, chosen in rows.items()} | {
        "test": halves["test"]
    }


def without_leading(parts: dict[str, np.ndarray], taken: float) -> dict[str, np.ndarray]:
    """Pictures ``[n, 64]`` less the principal components of "train" that hold ``taken`` of its energy."""
    mean = parts["train"].mean(0)
    _, strength, axes = np.linalg.svd(parts["train"] - mean, full_matrices=False)
    leading = axes[: int(np.searchsorted(np.cumsum(strength**2) / (strength**2).sum(), taken)) + 1]
    return {part: x - mean - (x - mean) @ leading.T @ leading for part, x in parts.items()}


def pairs(kind: str, cache: Path, seed: int, decibels: float = 0.0, accents: int = 5) -> tuple[Pairs, Pairs, Pairs]:
    """To train on, to choose by, to test on, no voice and no picture in two of them.

    What is tested on is always the same but for babble and pairs.

    Args:
        kind: "spoken", or "builtin": in place of speech the profiles of the same picture, which is no second modality
            and needs nothing installed.
        cache: folder for the speech.
        seed: of pairs, of babble, and of what is chosen by.
        decibels: how much louder than the babble the utterance is.
        accents: how many of each voice.
    """
    rng, digits = np.random.default_rng(seed), load_digits()
    halves = train_test_split(digits.data, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=0)
    rows, held_rows = train_test_split(
        np.arange(len(halves[0])), test_size=VALIDATION_SHARE, stratify=halves[2], random_state=seed
    )
    square = {"train": halves[0][rows], "held": halves[0][held_rows], "test": halves[1]}
    labels = {"train": halves[2][rows], "held": halves[2][held_rows], "test": halves[3]}
    pictures = without_leading(square, TAKEN)
    spoken = parted(speech(cache, ACCENTS[:accents]), 10 * accents, rng) if kind == "spoken" else None
    made = {}
    for part, images in pictures.items():
        picture = F.interpolate(torch.tensor(images).view(-1, 1, 8, 8), scale_factor=2.0)
        if spoken is None:
            whole = torch.tensor(square[part]).view(-1, 8, 8)
            noise = 4 * torch.tensor(rng.normal(size=whole.shape))
            profile = whole.mean(1)[:, :, None] + whole.mean(2)[:, None] + noise
            made[part] = torch.cat((picture, F.interpolate(profile[:, None], scale_factor=2.0)), 1), labels[part]
            continue
        sounds, said = spoken[part]
        heard = torch.tensor(np.stack([spectrogram(sound) for sound in babbled(sounds, decibels, rng)]))
        # every utterance once, each with a picture of its digit
        which = np.array([rng.choice(np.flatnonzero(labels[part] == digit)) for digit in said])
        made[part] = torch.cat((picture[which], heard[:, None]), 1), said
    mean, deviation = (f(made["train"][0], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    train, held, test = (Pairs(((x - mean) / deviation).float(), torch.tensor(y).long()) for x, y in made.values())
    return train, held, test
