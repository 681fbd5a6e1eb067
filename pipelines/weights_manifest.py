"""Write weights/manifest.json: what ships, and the sha256 of every file of it.

    python pipelines/weights_manifest.py

A folder with a model_index.json is a model that can be asked for by name; any other folder with weights is a
measure, such as the scene detector.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from varaccel.files import atomic_path

WEIGHTS = Path(__file__).parent.parent / "weights"


def main() -> None:
    manifest: dict[str, dict[str, dict[str, dict[str, str]]]] = {"models": {}, "measures": {}}
    for folder in sorted(p for p in WEIGHTS.iterdir() if p.is_dir()):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors"})
        digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        kind = "models" if (folder / "model_index.json").is_file() else "measures"
        manifest[kind][folder.name] = {"sha256": digests}
    with atomic_path(WEIGHTS / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    size = sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file())
    print(f"{WEIGHTS / 'manifest.json'}: {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
