"""Reports: what was dropped where, how long it took, how it looks on the image."""

from .records import (
    CompressedImage,
    CompressionReport,
    CompressorReport,
    GroupReport,
    ImageReport,
    KVBytes,
    Origins,
    SampleReport,
    StageReport,
)

__all__ = [
    "CompressedImage",
    "CompressionReport",
    "CompressorReport",
    "GroupReport",
    "ImageReport",
    "KVBytes",
    "Origins",
    "SampleReport",
    "StageReport",
]
