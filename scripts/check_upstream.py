"""Try the live sources once, from a machine with network: python scripts/check_upstream.py

Tests never leave the machine, so only this script shows that the real Google Drive and the real Hub still answer as
the loopback servers of the tests do. It fetches the authors' files into a temporary cache, converts and loads them,
says what they hold, and prints the hashes seen. It needs about 300 MB.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from gvsl_zoo import GvslZooError, hub, list_models, load, model_info
from gvsl_zoo.sources import RECORD
from gvsl_zoo.weights import open_weights

PUBLIC_FILE = hub.HubFile("hf-internal-testing/tiny-random-bert", "model.safetensors", "main")  # a few hundred kB


def main() -> int:
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as cache_dir:
        try:
            path = hub.fetch(PUBLIC_FILE, open_weights, cache_dir=cache_dir)
            print(f"PASS  {PUBLIC_FILE}: {path.stat().st_size} bytes, announced {hub.announced_sha256(path)}")
        except GvslZooError as error:
            failures += 1
            print(f"FAIL  {PUBLIC_FILE}: {error}")
        for name in list_models():
            if model_info(name).status != "upstream":
                continue
            try:
                net = load(name, cache_dir=cache_dir)
            except GvslZooError as error:
                failures += 1
                print(f"FAIL  {name}: {error}")
                continue
            heads = ", ".join(net.entry.heads) or "no heads"
            record = (Path(cache_dir) / "gvsl-zoo" / "upstream" / name / RECORD).read_text()
            print(f"PASS  {name}: {net.load_report}; {heads}; {' '.join(record.split())}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
