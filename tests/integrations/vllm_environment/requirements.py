"""What a wheel asks for beside torch and its companions, a line each: ``python requirements.py WHEEL``."""

from __future__ import annotations

import email
import sys
import zipfile

from pip._vendor.packaging.requirements import Requirement

INSTALLED_APART = {"torch", "torchvision", "torchaudio", "torchcodec"}

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    asked = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []
for text in asked:
    one = Requirement(text)
    if one.name not in INSTALLED_APART and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        sys.stdout.write(f"{one}\n")
