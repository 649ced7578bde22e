"""The pictures behind the embedded source: where each lies, what is known of it, where it may be cut.

Facts come from the packages' documentation and from the DICOM tags Modality, BodyPartExamined and StudyDescription;
what a picture visibly shows (which organ, which landmark where) was set by looking at it. Boxes leave out burnt-in
text and empty margins; train and test boxes never overlap.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the picture


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, volume or clip of a package, and how it is cut.

    Attributes:
      name: short and unique; package, file: where it lies; license, article: of the package, and what to cite.
      read: path -> list of frames, uint8 [H, W] or [H, W, 3].
      source: the labelled set it belongs to; modality; subject: what it shows, for captions.
      label: class of every crop, or (crop, box) -> class, "" for none.
      sizes: sides of the crops in pixels of the picture.
      boxes, frames: for each split, the regions to cut from, and the numbers of the frames.
    """

    name: str
    package: str
    file: str
    read: Callable[[str], list[np.ndarray]]
    source: str
    modality: str
    subject: str
    label: str | Callable[[np.ndarray, Box], str]
    sizes: tuple[int, ...]
    boxes: dict[str, tuple[Box, ...]]
    frames: dict[str, Sequence[int]] = dataclasses.field(default_factory=lambda: {"train": (0,), "test": (0,)})
    license: str = "MIT"
    article: str = ""


def _scaled(frame: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey values between `low` and `high` as uint8."""
    return (np.clip((frame - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def _dicom(path: str, window: tuple[float, float] | None = None, every: int = 0) -> list[np.ndarray]:
    """Picture of a DICOM file, or `every` n-th frame of a colour clip.

    Grey values pass through `window` (centre and width in Hounsfield units) or are scaled to their own range.
    """
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, pixel_array

    record = dcmread(path)
    photometric = record.PhotometricInterpretation
    if every:
        return [pixel_array(record, index=i) for i in range(0, int(record.NumberOfFrames), every)]
    picture = pixel_array(record)
    if photometric == "PALETTE COLOR":
        return [(apply_color_lut(picture, record) >> 8).astype(np.uint8)]
    if picture.shape[-1] == 3:
        return [picture]
    if window:
        picture = picture * float(record.RescaleSlope) + float(record.RescaleIntercept)
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        low, high = np.percentile(picture, (0.5, 99.5))
    grey = _scaled(picture.astype(np.float32), low, high)
    return [255 - grey if photometric == "MONOCHROME1" else grey]


def _nifti(path: str) -> list[np.ndarray]:
    """Axial slices of the first volume of a NIfTI file, front up."""
    import nibabel

    volume = np.asarray(nibabel.load(path).dataobj[..., 0], np.float32)
    low, high = np.percentile(volume, (0.5, 99.5))
    return [np.ascontiguousarray(_scaled(volume[:, ::-1, z].T, low, high)) for z in range(volume.shape[2])]


def _plain(path: str) -> list[np.ndarray]:
    """An ordinary picture file; 16-bit grey is scaled to its own range."""
    picture = np.asarray(Image.open(path))
    if picture.dtype != np.uint8:
        picture = _scaled(picture.astype(np.float32), *np.percentile(picture, (0.5, 99)))
    return [picture[..., :3] if picture.ndim == 3 else picture]


def _stain(crop: np.ndarray, box: Box) -> str:
    """Epithelium is where most of the crop is brown (DAB against FHL2), stroma where almost nothing is."""
    del box
    brown = float(np.mean(crop[..., 0].astype(int) - crop[..., 2] > 40))
    return "immunostained epithelium" if brown > 0.6 else "immunostained stroma" if brown < 0.2 else ""


def _retina(crop: np.ndarray, box: Box) -> str:
    """By distance in pixels from landmarks of this picture: disc (215, 645), fovea (705, 700), centre (705, 705)."""
    del crop
    centre = np.array([box[0] + box[2], box[1] + box[3]]) / 2
    disc, fovea, middle = (np.linalg.norm(centre - point) for point in ((215, 645), (705, 700), (705, 705)))
    if disc < 130:
        return "optic disc"
    if fovea < 160:
        return "macula"
    return "peripheral retina" if middle > 400 and disc > 280 else ""


_HEAD_CT = functools.partial(_dicom, window=(40, 300))
_ABDOMEN_CT = functools.partial(_dicom, window=(40, 400))
_pydicom = functools.partial(Picture, package="data_store", read=_dicom, article="test files of pydicom")

PICTURES = (
    _pydicom(
        name="chest",
        file="data/RG1_UNCR.dcm",
        source="sample_radiology",
        modality="xray",
        subject="Frontal chest X-ray with lungs, ribs and heart",
        label="chest x-ray",
        sizes=(480, 700),
        boxes={"train": ((60, 60, 1150, 1900),), "test": ((1150, 60, 1780, 1900),)},
    ),
    _pydicom(
        name="leg",
        file="data/RG3_UNCR.dcm",
        source="sample_radiology",
        modality="xray",
        subject="X-ray of the lower leg and ankle, non-ossifying fibroma of the distal tibia",
        label="lower leg x-ray",
        sizes=(320, 480),
        boxes={"train": ((640, 0, 1160, 1160),), "test": ((640, 1160, 1160, 1760),)},
    ),
    _pydicom(
        name="head-ct",
        file="data/693_UNCR.dcm",
        read=_HEAD_CT,
        source="sample_radiology",
        modality="ct",
        subject="Axial plain head CT with skull and brain",
        label="head ct",
        sizes=(128, 192),
        boxes={"train": ((110, 90, 410, 450),)},
    ),
    _pydicom(
        name="head-ct-base",
        package="pydicom",
        file="data/test_files/J2K_pixelrep_mismatch.dcm",
        read=_HEAD_CT,
        source="sample_radiology",
        modality="ct",
        subject="Axial head CT at the base of the skull",
        label="head ct",
        sizes=(128, 192),
        boxes={"test": ((80, 40, 440, 460),)},
    ),
    _pydicom(
        name="abdomen-ct",
        file="data/explicit_VR-UN.dcm",
        read=_ABDOMEN_CT,
        source="sample_radiology",
        modality="ct",
        subject="Axial abdominal CT at the pancreas, patient prone",
        label="abdominal ct",
        sizes=(96, 128),
        boxes={"train": ((75, 110, 300, 385),), "test": ((300, 110, 450, 385),)},
    ),
    _pydicom(
        name="abdomen-mri",
        file="data/MR-SIEMENS-DICOM-WithOverlays.dcm",
        source="sample_radiology",
        modality="mri",
        subject="Axial abdominal MRI with liver and kidneys",
        label="abdominal mri",
        sizes=(96, 128),
        boxes={"train": ((45, 110, 290, 400),), "test": ((290, 110, 450, 400),)},
    ),
    _pydicom(
        name="shoulder",
        file="data/MR2_UNCR.dcm",
        source="sample_radiology",
        modality="mri",
        subject="Coronal shoulder MRI with the head of the humerus",
        label="shoulder mri",
        sizes=(240, 360),
        boxes={"train": ((60, 60, 1010, 560),), "test": ((60, 560, 1010, 920),)},
    ),
    Picture(
        name="brain",
        package="nibabel",
        file="tests/data/example4d.nii.gz",
        read=_nifti,
        source="sample_radiology",
        modality="mri",
        subject="Axial brain MRI",
        label="brain mri",
        sizes=(48, 72),
        boxes={"train": ((14, 8, 116, 92),), "test": ((14, 8, 116, 92),)},
        frames={"train": range(5, 15), "test": range(18, 21)},
        article="example data of nibabel",
    ),
    _pydicom(
        name="heart",
        file="data/color3d_jpeg_baseline.dcm",
        source="sample_ultrasound",
        modality="ultrasound",
        read=functools.partial(_dicom, every=8),
        subject="Echocardiogram with the chambers of the heart",
        label="heart chambers",
        sizes=(200, 330),
        boxes={"train": ((150, 60, 540, 400),), "test": ((150, 60, 540, 400),)},
        frames={"train": range(10), "test": range(12, 15)},
    ),
    _pydicom(
        name="heart-flow",
        file="data/color-px.dcm",
        source="sample_ultrasound",
        modality="ultrasound",
        subject="Transesophageal echocardiogram with colour Doppler",
        label="blood flow in the heart",
        sizes=(56, 72),
        boxes={"train": ((34, 0, 134, 120),), "test": ((134, 0, 220, 120),)},
    ),
    _pydicom(
        name="lymph-node",
        file="data/US1_UNCR.dcm",
        source="sample_ultrasound",
        modality="ultrasound",
        subject="Ultrasound of a lymph node with power Doppler",
        label="lymph node",
        sizes=(96, 128),
        boxes={"train": ((62, 112, 312, 336),), "test": ((312, 112, 568, 336),)},
    ),
    _pydicom(
        name="pelvis",
        file="data/gdcm-US-ALOKA-16.dcm",
        source="sample_ultrasound",
        modality="ultrasound",
        subject="Ultrasound of the pelvis",
        label="pelvis",
        sizes=(96, 144),
        boxes={"train": ((40, 84, 330, 408),), "test": ((342, 84, 630, 408),)},
    ),
    Picture(
        name="colon",
        package="skimage",
        file="data/ihc.png",
        read=_plain,
        source="sample_microscopy",
        modality="histopathology",
        subject="Colon glands, immunohistochemistry, FHL2 in brown with haematoxylin in blue",
        label=_stain,
        sizes=(72, 96),
        boxes={"train": ((0, 0, 340, 512),), "test": ((340, 0, 512, 512),)},
        license="BSD-3-Clause",
        article="ihc of scikit-image: Human Protein Atlas",
    ),
    Picture(
        name="nuclei",
        package="mahotas",
        file="demos/data/nuclear.png",
        read=_plain,
        source="sample_microscopy",
        modality="microscopy",
        subject="Cells in culture with fluorescent DNA stain",
        label="fluorescent cell nuclei",
        sizes=(160, 240),
        boxes={"train": ((0, 0, 900, 1024),), "test": ((900, 0, 1344, 1024),)},
        article="nuclear_image of mahotas",
    ),
    Picture(
        name="fundus",
        package="skimage",
        file="data/retina.jpg",
        read=_plain,
        source="sample_retina",
        modality="fundus",
        subject="Fundus of a healthy eye",
        label=_retina,
        sizes=(112, 144),
        boxes={"train": ((40, 60, 1370, 675),), "test": ((40, 675, 1370, 1350),)},
        license="CC0-1.0",
        article="retina of scikit-image: Mikael Haggstrom, CC0",
    ),
)
