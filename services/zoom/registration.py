"""Registration of an exemplar to a part: translation, rotation and scale, with a confidence.

1. Start: on small high-passed greys, the best by correlation of: as it lies, shifted (phase correlation), and
   turned, scaled and shifted (phase correlation of the log-polar spectra, Reddy and Chatterji 1996).
2. Refinement: OpenCV's ECC (Evangelidis and Psarakis 2008), which does not care about gain and offset of the light.
3. Confidence: the correlation of the two high-passed greys over the overlap, times the share of the part it covers.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Grey: TypeAlias = npt.NDArray[np.float32]
Matrix: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RegistrationParameters:
    """Sizes in pixels of the images' longer side at each step; the rest is dimensionless."""

    start_px: int = 128
    refine_px: int = 192
    refine_iterations: int = 30
    # A start this good needs no search over rotation and scale.
    good_start: float = 0.6
    # What ECC's affine model may bend beyond a similarity (shear, unequal scales); more is a runaway fit.
    max_bend: float = 0.03
    min_overlap: float = 0.5  # of the part's area; under it nothing is registered
    min_confidence: float = 0.5


DEFAULTS = RegistrationParameters()


@dataclass(frozen=True)
class Registration:
    """`matrix` (2x3) takes a pixel (x, y) of the part to the pixel of the exemplar that shows the same spot."""

    matrix: Matrix
    confidence: float  # in [0, 1]
    registered: bool  # the confidence reached the threshold


def register(part: Image.Image, exemplar: Image.Image, parameters: RegistrationParameters = DEFAULTS) -> Registration:
    """Find where each pixel of the part lies in the exemplar. Deterministic; never raises for two decodable images."""
    part_small, part_scale = _shrunk(part, parameters.refine_px)
    exemplar_small, exemplar_scale = _shrunk(exemplar, parameters.refine_px)
    matrix = _start(part_small, exemplar_small, parameters)
    part_fine, exemplar_fine = _high_passed(part_small), _high_passed(exemplar_small)
    matrix = _refined(part_fine, exemplar_fine, matrix, parameters)
    confidence = _agreement(part_fine, exemplar_fine, matrix, parameters)
    full = _rescaled(matrix, part_scale, exemplar_scale)
    return Registration(_snapped(full, part.size), confidence, confidence >= parameters.min_confidence)


def warp(exemplar: npt.NDArray[np.uint8], matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The exemplar drawn over the part's pixels; size is (width, height). Zero where it has none."""
    warped: npt.NDArray[np.uint8] = cv2.warpAffine(
        exemplar, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    return warped


def _start(part: Grey, exemplar: Grey, parameters: RegistrationParameters) -> Matrix:
    small_part, part_scale = _resized(part, parameters.start_px)
    small_exemplar, exemplar_scale = _resized(exemplar, parameters.start_px)
    p, e = _high_passed(small_part), _high_passed(small_exemplar)
    as_it_lies = _centred(p.shape, e.shape)
    candidates = [as_it_lies, _shifted(p, e, as_it_lies)]
    best = max(candidates, key=lambda matrix: _agreement(p, e, matrix, parameters))
    if _agreement(p, e, best, parameters) < parameters.good_start:
        candidates += [_shifted(p, e, turned) for turned in _turned(p, e, as_it_lies)]
        best = max(candidates, key=lambda matrix: _agreement(p, e, matrix, parameters))
    return _rescaled(best, part_scale, exemplar_scale)


def _centred(part: tuple[int, ...], exemplar: tuple[int, ...]) -> Matrix:
    """Centre on centre, areas made equal. Shapes are (height, width)."""
    scale = math.sqrt(exemplar[0] * exemplar[1] / (part[0] * part[1]))
    x = (exemplar[1] - 1) / 2 - scale * (part[1] - 1) / 2
    y = (exemplar[0] - 1) / 2 - scale * (part[0] - 1) / 2
    return np.array([[scale, 0.0, x], [0.0, scale, y]])


def _shifted(part: Grey, exemplar: Grey, matrix: Matrix) -> Matrix:
    """The matrix with the translation that phase correlation finds after it."""
    window = cv2.createHanningWindow(part.shape[::-1], cv2.CV_32F)
    shift, _ = cv2.phaseCorrelate(part, _warped(exemplar, matrix, part.shape), window)
    return np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ np.array(shift)])


def _turned(part: Grey, exemplar: Grey, matrix: Matrix) -> list[Matrix]:
    """The matrix after the rotation and scale, about the part's centre, that the log-polar spectra differ by."""
    angles, radii = 180, 128  # one degree a row; of a spectrum half a turn is all
    a, b = (_log_polar(image, angles, radii) for image in (part, _warped(exemplar, matrix, part.shape)))
    (radius, angle), _ = cv2.phaseCorrelate(a, b, cv2.createHanningWindow((radii, angles), cv2.CV_32F))
    scale = math.exp(-radius * math.log(max(part.shape) / 2) / radii)
    centre = ((part.shape[1] - 1) / 2, (part.shape[0] - 1) / 2)
    turn = np.vstack([cv2.getRotationMatrix2D(centre, -angle, scale), [0.0, 0.0, 1.0]])
    return [matrix @ turn]


def _log_polar(image: Grey, angles: int, radii: int) -> Grey:
    side = max(image.shape)
    square = np.zeros((side, side), np.float32)
    window = cv2.createHanningWindow(image.shape[::-1], cv2.CV_32F)
    square[: image.shape[0], : image.shape[1]] = image * window
    spectrum = cv2.dft(square, flags=cv2.DFT_COMPLEX_OUTPUT)
    magnitude = np.fft.fftshift(cv2.log(1.0 + cv2.magnitude(spectrum[..., 0], spectrum[..., 1])))
    centre = (side // 2, side // 2)
    flags = cv2.WARP_POLAR_LOG | cv2.INTER_LINEAR
    polar = cv2.warpPolar(magnitude, (radii, 2 * angles), centre, side / 2, flags)[:angles]
    flat: Grey = polar - cv2.blur(polar, (31, 31))
    return flat


def _refined(part: Grey, exemplar: Grey, matrix: Matrix, parameters: RegistrationParameters) -> Matrix:
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, parameters.refine_iterations, 1e-4)
    start = matrix.astype(np.float32)
    try:
        _, found = cv2.findTransformECC(part, exemplar, start, cv2.MOTION_AFFINE, criteria, None, 1)
    except cv2.error:  # it did not converge: the two have nothing in common there
        return matrix
    refined: Matrix = found.astype(np.float64)
    better = _agreement(part, exemplar, refined, parameters) > _agreement(part, exemplar, matrix, parameters)
    return refined if better and _bend(refined) <= parameters.max_bend else matrix


def _bend(matrix: Matrix) -> float:
    """How far the linear part is from a similarity: 1 - (smaller / larger singular value)."""
    large, small = np.linalg.svd(matrix[:, :2], compute_uv=False)
    return float(1.0 - small / max(large, 1e-9))


def _agreement(part: Grey, exemplar: Grey, matrix: Matrix, parameters: RegistrationParameters) -> float:
    """Correlation over the overlap times the overlap's share, in [0, 1]."""
    inside = _warped(np.ones_like(exemplar), matrix, part.shape) > 0.999
    overlap = float(inside.mean())
    if overlap < parameters.min_overlap:
        return 0.0
    a, b = part[inside], _warped(exemplar, matrix, part.shape)[inside]
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return max(0.0, float(a @ b) / norm) if norm > 1e-6 else 0.0


def _warped(image: Grey, matrix: Matrix, shape: tuple[int, ...]) -> Grey:
    out: Grey = cv2.warpAffine(image, matrix, shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return out


def _high_passed(grey: Grey) -> Grey:
    """Without what is wider than 1/24 of the side: light falls differently on two photographs, edges stay."""
    out: Grey = grey - cv2.GaussianBlur(grey, (0, 0), max(grey.shape) / 24)
    return out


def _shrunk(image: Image.Image, side: int) -> tuple[Grey, float]:
    return _resized(np.asarray(image.convert("L"), np.float32), side)


def _resized(grey: Grey, side: int) -> tuple[Grey, float]:
    scale = side / max(grey.shape)
    if scale >= 1.0:
        return grey, 1.0
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA), scale


def _rescaled(matrix: Matrix, part_scale: float, exemplar_scale: float) -> Matrix:
    """The matrix between the images that were shrunk by these scales. Pixel centres lie at whole numbers."""
    linear = matrix[:, :2] * (part_scale / exemplar_scale)
    half = np.full(2, 0.5)
    offset = (matrix[:, :2] @ (half * part_scale - half) + matrix[:, 2] + half) / exemplar_scale - half
    return np.column_stack([linear, offset])


def _snapped(matrix: Matrix, size: tuple[int, int]) -> Matrix:
    """A whole-pixel translation where the matrix is within a quarter pixel of one everywhere.

    It needs no interpolation, so that equal images have a difference of exactly zero.
    """
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], [size[0], size[1]]], np.float64)
    motion = corners @ matrix[:, :2].T + matrix[:, 2] - corners
    whole = np.round(motion.mean(axis=0))
    if np.abs(motion - whole).max() > 0.25:
        return matrix
    return np.column_stack([np.eye(2), whole])
