"""A labelled synthetic image set, shapes x textures x backgrounds: for the demo, the tests, first steps without data.

Every image shows one large textured shape on a background. The *texture* is the class: it fills most of the image, so
neighbouring patches predict each other, from which masked image modelling learns, and they share what tells the class.
Shape, background, colours, orientation, scale and position vary; shape and background are stored beside the image.
Image `i` depends on `(seed, i)` alone, so a set can be drawn in parallel and in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

TEXTURES = ("bricks", "checks", "dots", "grid", "rays", "rings", "scales", "stripes", "triangles", "waves")
SHAPES = ("disk", "square", "triangle", "ring", "cross")
BACKGROUNDS = ("plain", "gradient", "clouds")

# Two-colour palettes (ink, paper) as RGB. Few on purpose: colour says nothing about the class, and a small network that
# could describe an image by its colours would not learn its structure.
PALETTES = (
    ((28, 42, 92), (236, 226, 202)),
    ((140, 38, 44), (240, 212, 178)),
    ((30, 88, 60), (222, 236, 200)),
    ((92, 52, 112), (244, 222, 132)),
)


class SyntheticImage(NamedTuple):
    """One drawn image: `pixels` (H, W, 3) uint8, `segmentation` (H, W) uint8 (0 = background, 1 + class inside)."""

    pixels: np.ndarray
    segmentation: np.ndarray
    shape: str
    background: str


def draw(index: int, seed: int, size: int) -> SyntheticImage:
    """Draw image `index` of the set `seed` at `size` x `size` pixels. Classes take turns: label = index mod 10."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    label = index % len(TEXTURES)
    shape = SHAPES[rng.integers(len(SHAPES))]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    centre = rng.uniform(-0.1, 0.1, 2)
    inside = _soft(_shape_distance(shape, x - centre[0], y - centre[1], rng), 1.5 / size)
    ink, paper = (np.asarray(c, np.float32) for c in PALETTES[rng.integers(len(PALETTES))])
    pattern = _pattern(TEXTURES[label], x, y, rng, 1.0 / size)[..., None]
    foreground = ink + (paper - ink) * pattern
    pixels = foreground * inside[..., None] + _background(background, x, y, rng) * (1 - inside[..., None])
    pixels = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
    segmentation = np.where(inside > 0.5, label + 1, 0).astype(np.uint8)
    return SyntheticImage(pixels, segmentation, shape, background)


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 where `distance` < 0, 0 where it is > 0, linear over `width` (so that edges are not jagged)."""
    return np.clip(0.5 - distance / width, 0, 1)


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _shape_distance(shape: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Signed distance (negative inside) to a large shape about the origin, in units of the image side."""
    x, y = _rotate(x, y, rng.uniform(0, 2 * np.pi))
    radius = rng.uniform(0.42, 0.56)
    arm, r, across, along = radius * 0.5, np.hypot(x, y), abs(x), abs(y)
    cross = np.minimum(np.maximum(across - arm, along - radius), np.maximum(along - arm, across - radius))
    triangle = np.maximum(-y, 0.5 * y + 0.866 * across) - radius * 0.62
    square = np.maximum(across, along) - radius * 0.85
    ring = np.maximum(r - radius, radius * 0.22 - r)
    return {"disk": r - radius, "square": square, "triangle": triangle, "ring": ring, "cross": cross}[shape]


def _pattern(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, pixel: float) -> np.ndarray:
    """The texture's value in [0, 1] at every pixel: one motif repeated with a random period, turn and phase."""
    period = rng.uniform(0.16, 0.24)
    edge = 2 * pixel / period  # softness of edges in periods: about two pixels
    if name in ("rays", "rings"):  # these two have a centre
        cx, cy = rng.uniform(-0.25, 0.25, 2)
        if name == "rings":
            return _soft(abs((np.hypot(x - cx, y - cy) / period + rng.uniform()) % 1 - 0.5) - 0.25, edge)
        turn = np.arctan2(y - cy, x - cx) / (2 * np.pi) * rng.integers(8, 13)
        return _soft(abs((turn + rng.uniform()) % 1 - 0.5) - 0.25, edge)
    # Turns of less than a right angle either way: enough that no pixel template names the class.
    u, v = _rotate(x, y, rng.uniform(-0.6, 0.6) + rng.integers(2) * np.pi / 2)
    u, v = u / period + rng.uniform(), v / period + rng.uniform()
    if name == "stripes":
        return _soft(abs(u % 1 - 0.5) - 0.25, edge)
    if name == "waves":
        return _soft(abs((u + 0.3 * np.sin(2 * np.pi * v * 0.8)) % 1 - 0.5) - 0.25, edge)
    if name == "checks":
        return _soft(np.sin(np.pi * u) * np.sin(np.pi * v), 3 * edge)
    if name == "grid":
        return _soft(np.minimum(abs(u % 1 - 0.5), abs(v % 1 - 0.5)) - 0.13, edge)
    if name == "dots":
        return _soft(np.hypot(u % 1 - 0.5, v % 1 - 0.5) - 0.32, edge)
    if name == "triangles":
        a, b = u % 1, v % 1
        return _soft(abs(a - 0.5) - 0.5 * (1 - b), edge)
    row = np.floor(v)
    if name == "bricks":
        a = (u * 0.6 + 0.5 * (row % 2)) % 1
        return _soft(0.16 - np.minimum(np.minimum(a, 1 - a) / 0.6, np.minimum(v - row, 1 - v + row)), edge)
    # scales: overlapping discs in offset rows
    a = (u + 0.5 * (row % 2)) % 1 - 0.5
    return _soft(abs(np.hypot(a, v - row) - 0.55) - 0.12, edge)


def _background(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quiet (H, W, 3) background, so that the texture stands out."""
    first, second = rng.uniform(90, 190, (2, 1, 1, 3)).astype(np.float32)
    if name == "plain":
        return np.broadcast_to(first, (*x.shape, 3))
    if name == "gradient":
        u, _ = _rotate(x, y, rng.uniform(0, 2 * np.pi))
        return first + (second - first) * np.clip(u + 0.5, 0, 1)[..., None]
    coarse = Image.fromarray(rng.uniform(0, 255, (6, 6)).astype(np.uint8))
    clouds = np.asarray(coarse.resize((x.shape[1], x.shape[0]), Image.Resampling.BICUBIC), np.float32) / 255
    return first + (second - first) * clouds[..., None]
