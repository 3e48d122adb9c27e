"""Registration of an exemplar to a part: translation, rotation and scale, with a confidence.

1. Start: on small high-passed greys, the best by correlation of: as it lies, shifted (phase correlation), and
   turned, scaled and shifted (phase correlation of the log-polar spectra, Reddy and Chatterji 1996).
2. Refinement: OpenCV's ECC (Evangelidis and Psarakis 2008), which does not care about gain and offset of the light.
3. Confidence: the correlation of the two high-passed greys over their overlap. It asks whether the same details lie in
   the same places, whatever the light; a defect is a small part of them. Feature matches (ORB) were less exact and fail
   on stripes and on bare surfaces; optical flow (Lucas and Kanade) fails on larger motions.

Confidence as measured on the training rows of deeppcb and magnetic_tile; min_confidence lies in the gap.
  the same thing                                      n   quantiles .01 .05 .50
    defective boards, own template, moved by 2 deg    200           .05 .95 .97
    quadrants of boards, moved likewise               200           .76 .87 .96
    one tile, exposures up to threefold               116           .87 .89 .95
  not the same thing                                  n   quantiles .50 .95 .99
    a board and another board's template              317           .05 .14 .22
    two tiles                                         200           .07 .30 .43
    two tiles of the same size                        382           .24 .60 .70
The low boards are bare or striped: they lie the same in many ways. The last row leaves out 18 pairs over .8: the dozen
looked at were one tile under two group numbers. Of boards moved by up to 6 degrees and 5 % of scale .98 are found, by
up to 15 degrees and 12 % .90.
"""

import math
from collections.abc import Iterator
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

    start_px: int = 96
    start_iterations: int = 20
    # A start of this agreement ends the search.
    good_start: float = 0.8
    refine_px: int = 192
    refine_iterations: int = 30
    min_px: int = 20  # shorter side after shrinking to refine_px; thinner strips hold too little to register
    # What ECC's affine model may bend beyond a similarity (shear, unequal scales); more is a runaway fit.
    max_bend: float = 0.03
    min_overlap: float = 0.5  # of the part's area; under it nothing is registered
    min_confidence: float = 0.7


DEFAULTS = RegistrationParameters()


@dataclass(frozen=True)
class Registration:
    """`matrix` (2x3) takes a pixel (x, y) of the part to the pixel of the exemplar that shows the same spot.

    `gain` and `offset` bring the exemplar's light to the part's: gain * grey + offset, on the scale of 0 to 255.
    """

    matrix: Matrix
    confidence: float  # in [0, 1]
    registered: bool  # the confidence reached the threshold
    gain: float = 1.0
    offset: float = 0.0


def register(part: Image.Image, exemplar: Image.Image, parameters: RegistrationParameters = DEFAULTS) -> Registration:
    """Find where each pixel of the part lies in the exemplar. Deterministic; never raises for two decodable images."""
    part_small, part_scale = _grey(part, parameters.refine_px)
    exemplar_small, exemplar_scale = _grey(exemplar, parameters.refine_px)
    if min(*part_small.shape, *exemplar_small.shape) < parameters.min_px:
        return Registration(np.eye(2, 3), 0.0, registered=False)
    matrix = _start(part_small, exemplar_small, parameters)
    part_fine, exemplar_fine = _high_passed(part_small), _high_passed(exemplar_small)
    matrix, confidence = _refined(part_fine, exemplar_fine, matrix, parameters)
    full = _snapped(_rescaled(matrix, part_scale, exemplar_scale), part.size)
    if confidence < parameters.min_confidence:
        return Registration(full, confidence, registered=False)
    return Registration(full, confidence, True, *_light(part_small, exemplar_small, matrix))


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
    best, agreement = _centred(p.shape, e.shape), -1.0
    for candidate in _candidates(p, e, best):
        for matrix in (candidate, _ecc(p, e, candidate, cv2.MOTION_EUCLIDEAN, parameters.start_iterations, blur=5)):
            if (found := _agreement(p, e, matrix, parameters)) > agreement:
                best, agreement = matrix, found
            if agreement >= parameters.good_start:
                return _rescaled(best, part_scale, exemplar_scale)
    return _rescaled(best, part_scale, exemplar_scale)


def _candidates(part: Grey, exemplar: Grey, as_it_lies: Matrix) -> Iterator[Matrix]:
    """Cheapest and likeliest first; each is worked out only when the ones before it were not good."""
    yield as_it_lies
    yield _shifted(part, exemplar, as_it_lies)
    turned = _turned(part, exemplar, as_it_lies)
    yield turned
    yield _shifted(part, exemplar, turned)


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


def _turned(part: Grey, exemplar: Grey, matrix: Matrix) -> Matrix:
    """The matrix after the rotation and scale, about the part's centre, that the log-polar spectra differ by."""
    angles, radii = 180, 128  # one degree a row; of a spectrum half a turn is all
    a, b = (_log_polar(image, angles, radii) for image in (part, _warped(exemplar, matrix, part.shape)))
    (radius, angle), _ = cv2.phaseCorrelate(a, b, cv2.createHanningWindow((radii, angles), cv2.CV_32F))
    scale = math.exp(-radius * math.log(max(part.shape) / 2) / radii)
    centre = ((part.shape[1] - 1) / 2, (part.shape[0] - 1) / 2)
    turn = np.vstack([cv2.getRotationMatrix2D(centre, -angle, scale), [0.0, 0.0, 1.0]])
    turned: Matrix = matrix @ turn
    return turned


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


def _refined(part: Grey, exemplar: Grey, start: Matrix, parameters: RegistrationParameters) -> tuple[Matrix, float]:
    """The matrix and its agreement: the refined one's, unless it is worse or bent."""
    agreement = _agreement(part, exemplar, start, parameters)
    refined = _ecc(part, exemplar, start, cv2.MOTION_AFFINE, parameters.refine_iterations, blur=1)
    found = _agreement(part, exemplar, refined, parameters)
    if found > agreement and _bend(refined) <= parameters.max_bend:
        return refined, found
    return start, agreement


def _ecc(part: Grey, exemplar: Grey, matrix: Matrix, model: int, iterations: int, blur: int) -> Matrix:
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, iterations, 1e-4)
    try:
        _, found = cv2.findTransformECC(part, exemplar, matrix.astype(np.float32), model, criteria, None, blur)
    except cv2.error:  # it did not converge: the two have nothing in common there
        return matrix
    refined: Matrix = found.astype(np.float64)
    return refined


def _light(part: Grey, exemplar: Grey, matrix: Matrix) -> tuple[float, float]:
    """Gain and offset between the two exposures, from mean and spread over the tenths that agree best.

    Two photographs of one tile in magnetic_tile differ up to threefold in exposure, which would drown every mark. The
    tenth that agrees least is left out, because a defect is no light. A change that moves no grey by 8 is noise.
    """
    inside = _warped(np.ones_like(exemplar), matrix, part.shape) > 0.999
    sampled = np.s_[::2, ::2]  # a quarter of the pixels tells two numbers well enough
    ours, theirs = (image[sampled][inside[sampled]] for image in (part, _warped(exemplar, matrix, part.shape)))
    gain, offset = 1.0, 0.0
    for _ in range(2):
        gain = float(np.clip(ours.std() / max(theirs.std(), 1.0), 1 / 3, 3.0))
        offset = float(ours.mean() - gain * theirs.mean())
        residual = np.abs(gain * theirs + offset - ours)
        agrees = residual <= np.quantile(residual, 0.9)
        ours, theirs = ours[agrees], theirs[agrees]
    moved = max(abs(offset), abs((gain - 1.0) * 255 + offset))
    return (gain, offset) if moved >= 8 else (1.0, 0.0)


def _bend(matrix: Matrix) -> float:
    """How far the linear part is from a similarity: 1 - (smaller / larger singular value)."""
    large, small = np.linalg.svd(matrix[:, :2], compute_uv=False)
    return float(1.0 - small / max(large, 1e-9))


def _agreement(part: Grey, exemplar: Grey, matrix: Matrix, parameters: RegistrationParameters) -> float:
    """Correlation over the overlap, in [0, 1]; 0 where the overlap is too small."""
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


def _grey(image: Image.Image, side: int) -> tuple[Grey, float]:
    return _resized(np.asarray(image.convert("L")), side)


def _resized(grey: npt.NDArray[np.uint8] | Grey, side: int) -> tuple[Grey, float]:
    """Shrunk to `side` pixels at the longer side, and by how much; smaller images stay as they are."""
    scale = min(1.0, side / max(grey.shape))
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    shrunk = cv2.resize(grey, size, interpolation=cv2.INTER_AREA) if scale < 1.0 else grey
    return shrunk.astype(np.float32), scale


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
